"""What happens when a reward function or a process fails."""
