"""A pretrained sentence encoder under truncation: `python -m experiments.minilm --help`."""
