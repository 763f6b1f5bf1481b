"""Options that cannot be honoured, and failures of reward functions and processes: errors with a remedy."""
