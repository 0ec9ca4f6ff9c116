"""How far the tensors of two checkpoints are from one another, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import checkpoint


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def paths(tmp_path):
    return str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")


def test_rows_are_those_of_numpy(paths):
    kernel, mask = draw(0, 60, 80), np.full((4, 4), -np.inf, np.float32)
    before = {"kernel": kernel, "half": jnp.asarray(kernel, jnp.bfloat16), "mask": mask}
    after = {"kernel": kernel + 0.1 * draw(1, 60, 80), "half": before["half"] * 2, "mask": mask}
    checkpoint.save(paths[0], before | {"same": np.arange(5), "zero": np.zeros(3), "old": kernel})
    checkpoint.save(paths[1], after | {"same": np.arange(5), "zero": np.ones(3), "old": kernel.T})
    found = checkpoint.compare_files(*paths)
    rows = {row.path: row for row in found.rows}
    one, other = (np.float64(tree["kernel"]) for tree in (before, after))
    expected = [
        np.linalg.norm(other - one) / np.linalg.norm(one),
        np.vdot(one, other) / np.linalg.norm(one) / np.linalg.norm(other),
        np.abs(other - one).max(),
    ]
    np.testing.assert_allclose(rows["kernel"][2:], expected, rtol=1e-12)
    np.testing.assert_allclose(rows["half"][2:4], [1, 1], rtol=1e-12)
    assert (rows["mask"].relative, rows["mask"].largest) == (0, 0)
    assert (rows["same"].relative, rows["zero"].relative) == (0, np.inf)
    assert found.unmatched == ("old",)


def test_a_thin_file_stands_beside_the_dense_one(paths):
    params = {"a": {"kernel": draw(0, 90, 70)}, "b": {"kernel": draw(1, 90, 70)}}
    plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16), where="a/*")
    thin = rmtjax.factorize(params, plan)
    checkpoint.save(paths[0], params)
    checkpoint.save(paths[1], thin, plan)
    first, second = checkpoint.compare_files(*paths).rows
    removed = rmtjax.Report(plan).rows[0].removed
    # Cut by singular values, the share of squares that is lost is that of the report.
    np.testing.assert_allclose(first.relative**2, removed, rtol=1e-4)
    assert (first.shape, second.relative) == ((90, 70), 0)


def test_files_without_a_common_tensor_are_an_error(paths):
    checkpoint.save(paths[0], {"a": np.ones(3)})
    checkpoint.save(paths[1], {"b": np.ones(3)})
    with pytest.raises(ValueError, match="no tensor of one name and shape"):
        checkpoint.compare_files(*paths)
