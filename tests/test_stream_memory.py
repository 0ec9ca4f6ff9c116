"""How much memory it takes to analyze and compress a file."""

import os
import subprocess
import sys

import numpy as np

MEASURE = """
import sys
from rmtjax import checkpoint, ranks
from rmtjax._files import Entry, write_tensors
import numpy as np
entry = Entry((int(sys.argv[2]), 256), np.dtype(np.float32))
draw = lambda name: np.random.default_rng(0).standard_normal(entry.shape, np.float32)
write_tensors(sys.argv[1], {"a.weight": entry, "b": entry, "c": entry, "d": entry}, draw, {})
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
checkpoint.analyze_file(sys.argv[1])
analyzed = peak()
for mode in ("factorize", "truncate"):
    out = sys.argv[1].replace("big", "out")
    checkpoint.compress_file(sys.argv[1], out, rule=ranks.fixed(8), mode=mode)
print(analyzed, peak())
"""


def test_memory_grows_with_the_largest_tensor_and_not_with_the_file(tmp_path):
    # Large arrays go back to the system at once, so that the peak is that of what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}
    peaks = []
    for rows in (2**15, 3 * 2**15):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "big.safetensors"), str(rows)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        peaks.append([float(peak) for peak in done.stdout.split()])
    # Per MiB that the largest tensor grows by: three copies of it, of a file that has four such
    # tensors. The tolerance is for what allocators keep, which differs from run to run by 30 MiB.
    growth, tolerance = np.subtract(*peaks[::-1]), 48
    assert (growth < 3 * 64 + tolerance).all(), growth
