"""A Qwen3 of a million parameters, made without any hub: what demo, studies and tests train."""
