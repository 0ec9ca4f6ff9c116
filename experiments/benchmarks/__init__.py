"""Measurements, each of its rivals side by side in one run."""
