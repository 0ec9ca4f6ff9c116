"""Public verbs by what they take: each is tried, and its result checked by NumPy in float64."""
