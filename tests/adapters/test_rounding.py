"""Changes between two checkpoints that the rounding of a dtype explains."""

import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import adapters, checkpoint

NAME = "layers.0.proj.weight"


def save(folder, *trees):
    paths = [folder / f"{place}.safetensors" for place in range(2)]
    for path, tree in zip(paths, trees, strict=True):
        checkpoint.save(path, tree)
    return paths


@pytest.mark.parametrize("kept_as", [jnp.bfloat16, np.float32])
def test_rounding_alone_is_told_and_has_no_spikes(tmp_path, kept_as):
    rng = np.random.default_rng(0)
    # Rows of other sizes have other rounding, which looks like signal.
    kernel = rng.standard_normal((60, 80), np.float32) * 4 ** rng.integers(0, 4, (60, 1))
    kernel = kernel.astype(np.float32)
    rounded = kernel.astype(jnp.bfloat16).astype(kept_as)
    paths = save(tmp_path, {NAME: kernel}, {NAME: rounded})
    (row,) = adapters.analyze_difference(*paths).report.rows
    assert row.reason.startswith("kept: rounding of bfloat16 explains the change")
    assert (row.spikes, row.parameters_after) == (None, 4800)
    plan = adapters.analyze_difference(*paths, rule=rmtjax.ranks.fixed(2)).report.plan
    assert plan[NAME].rank == 2  # as it was asked for


def test_a_change_beyond_the_last_place_is_no_rounding(tmp_path):
    draw = lambda seed, *shape: np.random.default_rng(seed).standard_normal(shape, np.float32)
    step = 1e-3 * np.outer(draw(1, 60), draw(2, 80)) + 1e-4 * draw(3, 60, 80)
    paths = save(tmp_path, {NAME: draw(0, 60, 80)}, {NAME: draw(0, 60, 80) + step})
    (row,) = adapters.analyze_difference(*paths).report.rows
    assert row.spikes == 1
