"""Signal by the threshold in use and by ours: at a small size, and the page with the numbers."""

import re
from pathlib import Path

import numpy as np
import pytest

from experiments import signal_to_noise as study

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "files.md").read_text()


def test_noise_is_signal_to_their_threshold_and_not_to_ours():
    noise, signal = study.run(study.Config(shapes=((64, 128),), planted=(0, 3), kernels=4))
    assert noise.share > 0.5
    assert (noise.named, noise.ours, noise.selected) == (1, 0, 0)
    assert (signal.ours, signal.selected) == (3, 1)
    assert f"{noise.share:.1%}" in str(study.to_table([noise]).columns[3]._cells)


def test_the_threshold_is_that_of_the_page():
    rows = re.findall(r"^ *(\d+)x(\d+) +0 +([\d.]+) ", PAGE, re.MULTILINE)
    assert len(rows) == 3
    for p, n, told in rows:
        config = study.Config(kernels=1, seed=1)
        values = np.linalg.svd(study.draw(config, (int(p), int(n)), 0)[0], compute_uv=False)
        found = study.spectrum_threshold(values, (int(p), int(n)))
        edge = float(p) ** 0.5 + float(n) ** 0.5
        # Quartiles of the spectrum of one kernel stray by a percent.
        np.testing.assert_allclose(found / edge, float(told), rtol=0.02)
