"""SmolLM2-135M-Instruct as a model of transformers, from a Python package: a real pretrained model without a hub."""
