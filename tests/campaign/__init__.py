"""A campaign against the whole package: random trees, files, writers, names and histories.

    python -m tests.campaign --rounds 200 --seed 1

runs the long form and prints what was tried. `test_campaign.py` runs a short part of it always.
Each trial must end in a result that an independent computation confirms, or in an error that the
package itself raises. A part is a function of a `Tally`, a number of rounds and a seed.
"""
