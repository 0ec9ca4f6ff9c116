"""Ten small tasks, one recipe: what pruning while training does to networks of many kinds.

`models` has the networks, `problems` the tasks, `compare` trains and measures them.
`python -m experiments.tasks` runs all and prints a table.
"""
