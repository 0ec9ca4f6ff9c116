"""Moments in files: they come back as they were, and other files are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import checkpoint
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.moments import Moments
from rmtjax.moments._moment import sums_of_lookups, sums_of_rows

X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 4)), jnp.float32)


def made(**options):
    groups = {"a/kernel": sums_of_rows(X), "e/embedding": sums_of_lookups(jnp.arange(5), 7)}
    names = (("a/kernel", "a/kernel"), ("b/kernel", "a/kernel"), ("e/embedding", "e/embedding"))
    return Moments(groups, {"b/kernel": sums_of_rows(2 * X)}, names, **options)


@pytest.mark.parametrize("options", [{}, {"centred": True, "shrinkage": 0.5}])
def test_moments_come_back_as_they_were(tmp_path, options):
    path, moments = tmp_path / "moments.safetensors", made(**options)
    checkpoint.save_moments(path, moments)
    loaded = checkpoint.load_moments(path)
    assert (loaded.names, loaded.centred) == (moments.names, moments.centred)
    assert loaded.shrinkage == moments.shrinkage
    for name in moments:
        for field, value in vars(moments[name]).items():
            np.testing.assert_array_equal(getattr(loaded[name], field), value)
    assert loaded.gradients.keys() == {"b/kernel"}
    assert (loaded + moments)["e/embedding"].rows == 10


def test_other_files_and_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in \.safetensors, got 'm\.npz'"):
        checkpoint.save_moments("m.npz", made())
    with pytest.raises(TypeError, match="moments"):
        checkpoint.save_moments(tmp_path / "m.safetensors", {})
    checkpoint.save(tmp_path / "params.safetensors", {"kernel": np.ones((2, 3))})
    with pytest.raises(ValueError, match="holds no moments: give a file that"):
        checkpoint.load_moments(tmp_path / "params.safetensors")
    write_tensors(tmp_path / "bad.safetensors", {}, [], {"rmtjax.moments": '{"format": 9}'})
    with pytest.raises(
        ValueError, match="cannot be read: format 9 is newer than 1: upgrade rmtjax"
    ):
        checkpoint.load_moments(tmp_path / "bad.safetensors")
    text = '{"format": 1, "names": [["a", "a"]], "centred": false, "shrinkage": 0.0}'
    write_tensors(tmp_path / "less.safetensors", {}, [], {"rmtjax.moments": text})
    with pytest.raises(ValueError, match="cannot be read: the sums of 'a' are missing"):
        checkpoint.load_moments(tmp_path / "less.safetensors")


def test_a_file_is_planned_as_its_tree(tmp_path):
    rng = np.random.default_rng(0)
    kernel = lambda *shape: {"kernel": rng.normal(size=shape).astype(np.float32)}
    params = {"a": kernel(60, 80), "b": kernel(80, 60), "c": kernel(60, 60)}
    rows = jnp.asarray(rng.normal(size=(1, 90, 60)) * np.linspace(0, 2, 60), jnp.float32)
    names = (("a/kernel", "a/kernel"), ("c/kernel", "a/kernel"))
    moments = Moments({"a/kernel": sums_of_rows(rows)}, {}, names)
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    checkpoint.save(path, params)
    for known in (None, moments):
        report = checkpoint.compress_file(path, out, moments=known, budget=0.7)
        plan = rmtjax.plan(params, moments=known, budget=0.7)
        assert str(report.plan) == str(plan)
        expected = rmtjax.merge(rmtjax.factorize(params, plan, moments=known))
        found = rmtjax.merge(checkpoint.restore(out))
        for name in params:
            close = {"atol": 1e-4}  # float32, entries of about 1
            np.testing.assert_allclose(found[name]["kernel"], expected[name]["kernel"], **close)
    with pytest.raises(ValueError, match="`moments` has 'e/embedding', which is not in the file"):
        checkpoint.analyze_file(path, moments=made())
