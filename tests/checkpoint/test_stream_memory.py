"""How much memory it takes to analyze and compress a file."""

import os
import subprocess
import sys

import numpy as np
import pytest

MEASURE = """
import sys
from rmtjax import checkpoint, ranks
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensors import Entry
import numpy as np
path, cuts = sys.argv[1], [cut.split() for cut in sys.argv[2].split(",")]
rows, columns, copies = map(int, sys.argv[3:])
entries = {f"{i}.weight": Entry((rows, columns), np.dtype(np.float32)) for i in range(copies)}
draw = lambda: np.random.default_rng(0).standard_normal((rows, columns), np.float32)
write_tensors(path, entries, ((name, draw()) for name in entries), {})
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
checkpoint.analyze_file(path)
analyzed = peak()
out = path + ".out.safetensors"
for mode, parts in cuts:
    rank = int(parts) * min(rows, columns) // 64
    checkpoint.compress_file(path, out, rule=ranks.fixed(rank), mode=mode)
print(analyzed, peak())
"""


TALL = (2**15, 256), (3 * 2**15, 256), 4
SQUARE = (1024, 1024), (2560, 2560), 1


@pytest.mark.slow  # four processes, which compress up to 128 MiB each
@pytest.mark.parametrize(
    ("shapes", "cuts"),
    [
        (TALL, "factorize 2,truncate 2,factorize 60"),
        (SQUARE, "factorize 1,truncate 1,factorize 31,truncate 48"),
    ],
    ids=["tall", "square"],
)
def test_memory_grows_with_the_largest_tensor_and_not_with_the_file(shapes, cuts, tmp_path):
    """However many of 64 parts of its directions are kept."""
    small, large, copies = shapes
    # Large arrays go back to the system at once, so that the peak is that of what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}
    peaks = []
    for shape in (small, large):
        options = [str(tmp_path / "big.safetensors"), cuts, *map(str, (*shape, copies))]
        command = [sys.executable, "-c", MEASURE, *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        peaks.append([float(peak) for peak in done.stdout.split()])
    # Per MiB that the largest tensor grows by: three copies of it, of a file that has several.
    # The tolerance is for what allocators keep, which differs from run to run by 30 MiB.
    growth, tolerance = np.subtract(*peaks[::-1]), 48
    grown = 4 * (np.prod(large) - np.prod(small)) / 2**20
    assert (growth < 3 * grown + tolerance).all(), growth / grown
