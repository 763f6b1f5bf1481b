"""Memory and rollouts of a run by arithmetic, from models on the meta device."""
