"""Agreement of replicas beside its rivals: which networks learn wrong labels, and what it costs.

`arms` has the ways to train, `cells` the tasks and the plan, `trainer` runs one, and `tables`
shows them. `python -m experiments.agreement` runs what is missing and prints the tables.
"""
