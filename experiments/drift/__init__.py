"""The drift of pruning if labels are wrong: `python -m experiments.drift --help`."""
