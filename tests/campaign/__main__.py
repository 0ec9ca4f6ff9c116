"""Runs the long form: `python -m tests.campaign --rounds 200 --seed 1 --part trees`."""

import argparse
import os
import sys
import time
from pathlib import Path

# Four devices, over which some kernels are divided.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"
)

# The folder of the tests, as under pytest.
sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign import files, names, training, trees, writers
from campaign.tally import Tally
from campaign.verbs import matrices, modules

# How many trials of a part make a round: a round takes about a second.
PARTS = {
    "trees": (trees.run, 1),
    "large": (trees.run_large, 0.1),
    "verbs": (trees.run_verbs, 1),
    "matrices": (matrices.run, 1),
    "modules": (modules.run, 1),
    "training": (training.run, 0.5),
    "files": (files.run, 500),
    "writers": (writers.run, 2.5),
    "names": (names.run, 2),
}


def main():
    """Runs the parts, prints their counts and faults, and exits with 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS))
    args = parser.parse_args()
    tally = Tally()
    try:
        for part in args.part:
            run, trials = PARTS[part]
            begin = time.perf_counter()
            run(tally, max(1, int(args.rounds * trials)), args.seed)
            print(f"{part}: {time.perf_counter() - begin:.0f} s", flush=True)
    finally:  # also if it is interrupted
        print(tally, flush=True)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
