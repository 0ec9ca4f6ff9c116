"""The study: what pruning by random matrix theory does for a network, and what it does not.

    python -m experiments.study PART --help

PART is one of `truncation`, `memorisation`, `elsewhere`, `pilot`, `clean`, `artefact` and
`cnn`. Each writes its runs one by one to `experiments/results/PART.json`, goes on where it
was stopped, and ends with tables and a figure; `--show-only` draws these from the file alone.

Data flow one way: options -> runs, each a frozen value with all its settings -> records
-> outcomes of the arms -> summaries, tables and the figure. All arms of a seed share the
images, the redrawn labels, the initial weights and the order of the batches.
"""
