"""Run by `whole_model` in an environment of its own: WeightWatcher's analysis of stored kernels.

The arguments are .npy files of matrices. Each becomes the weight of a `torch.nn.Linear`; the last
line printed is a JSON object with the seconds that the analysis took and the number of its rows.
"""

import json
import sys
import time

import numpy as np


def main() -> None:
    """Analyzes with its Marchenko-Pastur fit, and draws nothing."""
    import torch  # pyright: ignore[reportMissingImports]
    import weightwatcher  # pyright: ignore[reportMissingImports]

    layers = []
    for path in sys.argv[1:]:
        weight = torch.from_numpy(np.load(path))
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight)
        layers.append(layer)
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(*layers))
    begin = time.perf_counter()
    rows = watcher.analyze(mp_fit=True, plot=False)
    print(json.dumps({"seconds": time.perf_counter() - begin, "rows": len(rows)}))


if __name__ == "__main__":
    main()
