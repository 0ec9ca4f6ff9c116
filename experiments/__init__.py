"""Experiments: each module is a command, `python experiments/NAME.py --help`."""
