"""Moments in files: they come back as they were, and other files are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import checkpoint, KernelAxes
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


@pytest.mark.parametrize(
    ("shape", "order"), [((60, 60), (1, 0)), ((80, 60), (1, 0)), ((50, 6, 3, 3), (1, 2, 3, 0))]
)
def test_a_kernel_of_torch_is_cut_as_its_transpose(tmp_path, shape, order):
    """A square one too, whose moments fit both of its sides."""
    rng = np.random.default_rng(0)
    stored = rng.normal(size=shape).astype(np.float32)
    turned, last = np.transpose(stored, order), len(shape) - 1
    met = KernelAxes(tuple(range(1, last + 1)), (0,))
    inputs = np.prod(shape[1:])
    rows = sums_of_rows(jnp.asarray(rng.normal(size=(1, 90, inputs)), jnp.float32))
    moments = lambda *axes: Moments({"n": rows}, {}, (("conv.weight", "n"),), axes=axes)
    checkpoint.save(tmp_path / "t.safetensors", {"conv.weight": stored})
    checkpoint.save_moments(tmp_path / "m.safetensors", moments(("conv.weight", met)))
    known = checkpoint.load_moments(tmp_path / "m.safetensors")
    assert known.axes == (("conv.weight", met),)
    out = tmp_path / "out.safetensors"
    report = checkpoint.compress_file(tmp_path / "t.safetensors", out, moments=known, budget=0.5)
    inner = {"conv.weight": turned}
    axes = {"conv.weight": KernelAxes(tuple(range(last)), (last,))}
    plan = rmtjax.plan(inner, moments=moments(), budget=0.5, axes=axes)
    (row,) = report.rows
    assert row.shape == shape
    assert (row.rank, row.action) == (plan["conv.weight"].rank, "factorize")
    assert str(report.plan) == str(plan)
    factors = checkpoint.restore(out)["conv.weight"]
    assert factors.left.shape == (shape[0], row.rank)
    assert factors.right.shape == (row.rank, *shape[1:])
    expected = rmtjax.merge(rmtjax.factorize(inner, plan, moments=moments()))["conv.weight"]
    found = rmtjax.merge({"kernel": factors})["kernel"]
    # float32, entries of about 1
    np.testing.assert_allclose(np.transpose(found, order), expected, atol=1e-4)
    # The same axes by hand, and the thin file again: its factors stay within its directions.
    same = checkpoint.analyze_file(
        tmp_path / "t.safetensors", moments=known, budget=0.5, multiple=8, axes={"conv.weight": met}
    )
    assert same.rows[0].rank == row.rank
    again = tmp_path / "again.safetensors"
    checkpoint.compress_file(out, again, moments=known, rule=rmtjax.ranks.fixed(8))
    low = rmtjax.merge({"kernel": checkpoint.restore(again)["conv.weight"]})["kernel"]
    cut = rmtjax.plan(inner, moments=moments(), axes=axes, rule=rmtjax.ranks.fixed(8), multiple=8)
    expected = rmtjax.merge(rmtjax.factorize(inner, cut, moments=moments()))["conv.weight"]
    np.testing.assert_allclose(np.transpose(low, order), expected, atol=1e-4)


def test_moments_along_other_axes_are_refused(tmp_path):
    path = tmp_path / "in.safetensors"
    checkpoint.save(path, {"kernel": np.ones((3, 3, 9))})
    rows = sums_of_rows(jnp.ones((3, 4, 3)))
    axes = ("kernel", KernelAxes((1,), (2,), (0,)))
    moments = Moments({"kernel": rows}, {}, (("kernel", "kernel"),), axes=(axes,))
    words = r"met 'kernel' along its axes \(1,\), and the file is read with inputs along \(0, 1\)"
    with pytest.raises(ValueError, match=words):
        checkpoint.analyze_file(path, moments=moments, axes={"kernel": KernelAxes((0, 1), (2,))})


def test_moments_of_other_axes_are_not_added():
    axes = lambda *inputs: (("kernel", KernelAxes(inputs, tuple({0, 1} - {*inputs}))),)
    one, other = (
        Moments({"kernel": sums_of_rows(X)}, {}, (("kernel", "kernel"),), axes=axes(place))
        for place in (0, 1)
    )
    assert (one + one).axes == axes(0)
    assert one.of(()).axes == ()
    with pytest.raises(ValueError, match="`\\+` needs moments of one model: 'kernel' has other"):
        one + other
