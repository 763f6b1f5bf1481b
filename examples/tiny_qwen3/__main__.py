"""`python -m examples.tiny_qwen3` makes the start model."""

from examples.tiny_qwen3.start_model import main

main()
