"""Ten neighbours of this library, running and compared at equal size.

`tracks` has the tasks, `networks` the modules, `trainer` trains a phase. The arms are functions in
`low_rank`, `tensors`, `few_entries` and `dynamical`; `arms` lists them. `claims` counts what the
papers count. `python -m experiments.neighbours --track a` runs a track and prints a table.
"""
