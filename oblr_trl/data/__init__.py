"""Where prompts, answers and rewards come from. Every complaint is a `ValueError` with the field, the reason and the remedy."""
