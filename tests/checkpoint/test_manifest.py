"""A plan as text, and back: equal in all but the spectra, and never trusted."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import KernelAxes
from rmtjax.checkpoint import _manifest
from rmtjax.checkpoint._tensors import Entry

NOISE = np.random.default_rng(0).standard_normal((3, 60, 80), np.float32)
FIVE = lambda count: np.float32(5) * (np.arange(80) < count)  # in the first columns
PARAMS = {
    "Dense_0": {"kernel": jnp.asarray(NOISE[0] + FIVE(2)), "bias": np.zeros(80)},
    "Stack": {"kernel": jnp.asarray(NOISE + FIVE(1))},
    "Head": {"kernel": jnp.asarray(NOISE[0, :, :10])},
    "Bad": {"kernel": jnp.asarray(np.where(np.eye(60, 80) > 0, np.nan, NOISE[0]))},
}
AXES = {"Stack/kernel": KernelAxes((1,), (2,), (0,))}


@pytest.fixture(scope="module")
def plan():
    return rmtjax.plan(PARAMS, axes=AXES, shrink=rmtjax.shrinkage.frobenius)


def same_row(left, right):
    for name in ("rank", "action", "reason", "shape", "axes", "shrink", "cost"):
        assert getattr(left, name) == getattr(right, name), name
    assert (left.fit is None) == (right.fit is None)
    for one, other in zip(left.fit or (), right.fit or (), strict=True):
        np.testing.assert_array_equal(one, other)  # NaN equals NaN
        assert (np.shape(one), one.dtype) == (np.shape(other), other.dtype)


def test_a_plan_comes_back_without_its_spectra(plan):
    assert [row.action for row in plan.values()] == ["keep", "factorize", "keep", "factorize"]
    restored = _manifest.parse(_manifest.to_json(plan, rmtjax.ranks.bema())).plan
    assert isinstance(restored, rmtjax.Plan)
    assert str(restored) == str(plan)
    assert [*restored] == [*plan]
    for path, row in plan.items():
        same_row(restored[path], row)
        assert restored[path].spectrum is None


def test_a_plan_that_was_read_can_be_carried_out_and_its_fits_used(plan):
    restored = _manifest.parse(_manifest.to_json(plan)).plan
    thin = rmtjax.factorize(PARAMS, restored)
    jax.tree.map(np.testing.assert_array_equal, thin, rmtjax.factorize(PARAMS, plan))
    path = "Dense_0/kernel"
    again = rmtjax.plan({"Dense_0": PARAMS["Dense_0"]}, fits={path: restored[path].fit})
    assert again[path].rank == plan[path].rank
    assert again[path].fit.threshold == plan[path].fit.threshold


def test_what_else_is_told():
    entries = {
        "a": Entry((2, 3), np.dtype(jax.numpy.bfloat16)),
        "b/left": Entry((), np.dtype(bool)),
    }
    keys = {"a": None, "l/0": ("l", 0), "x/y": ("x/y",)}
    rule = rmtjax.ranks.energy(0.9)
    parts = {"c": {"kind": "TensorTrain", "names": ["cores/0"], "inputs": [2], "outputs": [3]}}
    options = {"entries": entries, "keys": keys, "parts": parts}
    text = _manifest.to_json(None, rule, factors={"b"}, **options)
    told = _manifest.parse(text)
    versions = {"rmtjax": rmtjax.__version__, "jax": jax.__version__}
    assert json.loads(text)["versions"] == versions
    assert told == (None, "energy(share=0.9)", ("b",), entries, keys, parts)
    # Older readers know manifests without parts.
    plain = _manifest.to_json(None)
    assert _manifest.parse(plain)[2:] == (None, None, {}, {})
    assert [json.loads(one)["format"] for one in (plain, text)] == [1, 2]


def test_a_measured_cost_is_told(plan):
    cost = rmtjax.Cost(10, 20, 0.5, 5, 10, None)
    timed = rmtjax.Plan({"a": dataclasses.replace(plan["Dense_0/kernel"], cost=cost)})
    assert _manifest.parse(_manifest.to_json(timed)).plan["a"].cost == cost


def test_a_shrinker_of_ones_own_is_named_and_not_called(plan):
    def own(y, ratio):
        return y * ratio

    row = dataclasses.replace(plan["Dense_0/kernel"], shrink=own)
    text = _manifest.to_json(rmtjax.Plan({"a": row}))
    assert "own" in json.loads(text)["plan"]["a"]["shrink"]
    assert _manifest.parse(text).plan["a"].shrink is None


def test_a_newer_format_asks_for_an_upgrade(plan):
    told = json.loads(_manifest.to_json(plan))
    with pytest.raises(ValueError, match=r"format 4, and this rmtjax knows 3: upgrade it"):
        _manifest.parse(json.dumps({"format": 4, "all": "else"}))
    told["plan"]["Dense_0/kernel"]["mood"] = told["comment"] = "of a later version"
    same_row(
        _manifest.parse(json.dumps(told)).plan["Dense_0/kernel"],
        _manifest.parse(_manifest.to_json(plan)).plan["Dense_0/kernel"],
    )


def change(told, place, value):
    *parents, last = place
    for key in parents:
        told = told[key]
    if value is ...:
        del told[last]
    else:
        told[last] = value


ROW = ("plan", "Dense_0/kernel")
WRONG = {
    "no format": (("format",), ..., "lacks 'format'"),
    "format": (("format",), "1", "'1' is not int"),
    "boolean": (("format",), True, "True is not int"),
    "row": (ROW, [], "[] is not dict"),
    "no reason": ((*ROW, "reason"), ..., "lacks 'reason'"),
    "axes as list": ((*ROW, "axes"), [0, 1], "[0, 1] is not dict"),
    "rank": ((*ROW, "rank"), 1.5, "1.5 is not int or NoneType"),
    "action": ((*ROW, "action"), "explode", "'explode' is none of"),
    "nothing to do": ((*ROW, "rank"), None, "no rank to factorize it"),
    "shape": ((*ROW, "shape"), [60, -1], "sizes of at least 0"),
    "axes": ((*ROW, "axes", "inputs"), [1], "must name each of the 2 axes"),
    "dtype": ((*ROW, "fit", "dtype"), "object", "lacks 'object'"),
    "number": ((*ROW, "fit", "edge"), "1.0", "'1.0' is not int or float"),
    "spikes": ((*ROW, "fit", "num_spikes"), 2**40, "out of bounds"),
    "lengths": (("plan", "Stack/kernel", "fit", "edge"), [1.0], "different lengths"),
    "entry": (("entries",), {"a": ["F99", 2]}, "'a' has dtype 'F99', not one of"),
    "huge": (("entries",), {"a": ["F32", 2**61, 0]}, "larger than any memory"),
    "factors": (("factors",), [1], "1 is not str"),
    "keys": (("keys",), {"a/b": ["a", 3]}, "are not the keys of 'a/b'"),
}


@pytest.mark.parametrize(("place", "value", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_damaged_manifest_is_refused(plan, place, value, words):
    told = json.loads(_manifest.to_json(plan))
    change(told, place, value)
    with pytest.raises(ValueError, match="the plan in the metadata cannot be read") as caught:
        _manifest.parse(json.dumps(told))
    assert words in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=40)
@given(data=st.data())
def test_no_text_does_anything_but_parse_or_raise(plan, data):
    told = json.loads(
        _manifest.to_json(plan, factors=["a"], entries={"a": Entry((2,), np.dtype(int))})
    )
    node, place = told, []
    while isinstance(node, dict | list) and node and (not place or data.draw(st.booleans())):
        place.append(
            data.draw(st.sampled_from([*(node if isinstance(node, dict) else range(len(node)))]))
        )
        node = node[place[-1]]
    change(told, place, data.draw(JSON | st.just(...)))
    text = json.dumps(told)
    text = data.draw(st.just(text) | st.integers(0, len(text)).map(lambda end: text[:end]))
    with contextlib.suppress(ValueError):
        assert isinstance(_manifest.parse(text), _manifest.Manifest)
