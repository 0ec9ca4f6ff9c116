"""Plans of all trees and stacks, the options of a plan, and the noise levels that it is given."""

import re

import flax
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from helpers.plan_cases import assert_same_row, Count, GOOD, planted, row_of, STACK
from hypothesis import given, strategies as st

import rmtjax
from rmtjax import ranks


@pytest.mark.parametrize("rule", [ranks.bema(), ranks.gavish_donoho()], ids=str)
def test_kernels_planned_together_are_planned_as_one_by_one(rule):
    shapes = [(60, 80), (60, 80), (80, 60), (60, 80)]
    kernels = {f"{i}": {"kernel": planted(s, 3 * i + 1, i)} for i, s in enumerate(shapes)}
    together = rmtjax.plan(kernels, rule=rule, multiple=1)
    assert len({row.rank for row in together.values()}) == 4
    for name, params in kernels.items():
        assert_same_row(together[f"{name}/kernel"], row_of(params["kernel"], rule=rule, multiple=1))


def test_a_stack_has_a_fit_for_each_and_the_rank_of_the_richest():
    stack = np.stack([planted((60, 80), spikes, spikes + 3) for spikes in (1, 5, 3)])
    row = row_of(stack, axes=lambda path, leaf: STACK, multiple=1)
    assert row.rank == 5
    assert list(row.fit.num_spikes) == [1, 5, 3]
    assert row.fit.variance.shape == (3,)
    assert row.spectrum.eigenvalues.shape == (3, 60)
    assert row.spectrum.ratio == np.float32(60 / 80)
    assert row_of(stack[:1], axes=lambda path, leaf: STACK).fit.variance.shape == (1,)


def test_the_row_tells_the_spectrum_and_the_fit():
    row = row_of(GOOD)
    reference = np.linalg.svd(GOOD.astype(np.float64), compute_uv=False) ** 2 / 80
    # float32 singular values, squared.
    np.testing.assert_allclose(row.spectrum.eigenvalues, reference, rtol=1e-4)
    assert row.fit.num_spikes == 2
    assert abs(row.fit.variance - 1) < 0.1  # noise of unit variance, 4800 draws
    assert all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in row.fit + row.spectrum)


@pytest.mark.parametrize(
    "kind",
    [jnp.asarray, lambda a: jnp.asarray(a, jnp.bfloat16), lambda a: a.astype(np.float64)],
    ids=["jax", "bfloat16", "NumPy float64"],
)
@pytest.mark.parametrize("tree", [dict, flax.core.FrozenDict])
def test_arrays_and_trees_of_all_kinds_are_planned_alike(kind, tree):
    plan = rmtjax.plan(tree({"Dense_0": tree({"kernel": kind(GOOD)})}))
    assert str(plan) == "Dense_0/kernel  factorized: 2 of 60 are signal, rank 8"


def test_a_plan_changes_nothing():
    params = {"kernel": GOOD.copy()}
    rmtjax.plan(params)
    np.testing.assert_array_equal(params["kernel"], GOOD)


def test_where_chooses_leaves_by_path_and_shape():
    params = {"a": {"kernel": GOOD, "table": GOOD}, "b": {"kernel": GOOD, "bias": np.ones(80)}}
    chosen = lambda **options: list(rmtjax.plan(params, rule=Count(1), **options))
    assert chosen() == ["a/kernel", "b/kernel", "a/table"]  # the last is only told
    assert chosen(where=lambda path, leaf: path == "a/table") == ["a/table"]
    assert chosen(where=lambda path, leaf: leaf.ndim == 1) == ["b/bias"]
    words = r"no tensor is chosen by the function `where` as a kernel, of 4 such as 'a/kernel'"
    with pytest.raises(ValueError, match=words):
        chosen(where=lambda path, leaf: False)
    assert chosen(where="b/*") == ["b/kernel"]  # vectors are chosen by their complete names
    assert chosen(where=["b/bias", "re:^b/k"]) == ["b/bias", "b/kernel"]
    assert chosen(where=re.compile("table|bias")) == ["a/table"]
    mask = {"a": {"kernel": True, "table": False}, "b": False}  # a prefix, as optax's masks
    assert chosen(where=mask) == ["a/kernel"]


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("re:(", ValueError, r"`where` must be a regular expression after 're:', got 're:\('"),
        ("kern", ValueError, r"'kern' matches no tensor, of 1 such as 'kernel'\. .*'\*kern\*'"),
        (["kernel", "b"], ValueError, "'b' matches no tensor, of 1 such as 'kernel'"),
        ({"a": True}, ValueError, "`where` must be a tree of booleans with the structure"),
        ({"kernel": 1.0}, TypeError, "`where` must be a function .* got 1.0 at 'kernel'"),
        (
            lambda path: True,
            TypeError,
            r"`where` must take the path .* of \(path\): write `where=l",
        ),
    ],
)
def test_a_wrong_choice_is_refused(where, error, words):
    with pytest.raises(error, match=words):
        rmtjax.plan({"kernel": GOOD}, where=where)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 8),
        ({"multiple": 1}, 3),
        ({"multiple": 5}, 5),
        ({"multiple": 1, "min_rank": 11}, 11),
        ({"min_rank": 11}, 16),
        ({"multiple": 1, "keep": 0.1}, 3 + 5),  # floor of 5.7
        ({"multiple": 1, "keep": 1 / 3}, 3 + 19),
        ({"keep": 1.0}, 60),
        ({"multiple": 64}, 60),
        ({"min_rank": 100}, 60),
    ],
    ids=str,
)
def test_the_rank_is_that_of_the_formula_rounded_up(options, rank):
    assert row_of(GOOD, rule=Count(3), **options).rank == rank


@given(
    count=st.integers(0, 12),
    keep=st.floats(0, 1),
    min_rank=st.integers(1, 20),
    multiple=st.integers(1, 20),
)
def test_a_rounded_rank_is_never_above_the_size_nor_below_the_signal(
    count, keep, min_rank, multiple
):
    options = {"keep": keep, "min_rank": min_rank, "multiple": multiple, "min_size": 1}
    row = row_of(GOOD[:12, :20], rule=Count(count), **options)
    assert max(count, min(min_rank, 12)) <= row.rank <= 12
    assert row.rank == 12 or row.rank % multiple == 0
    assert (row.action == "keep") == (row.rank == 12)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": -0.1},
        {"keep": 1.5},
        {"keep": float("nan")},
        {"min_rank": 0},
        {"min_rank": 1.5},
        {"multiple": 0},
        {"multiple": 2.5},
        {"min_size": -1},
    ],
    ids=str,
)
def test_options_out_of_range_are_named_with_their_value(options, monkeypatch):
    # As users have it: the type checker of the tests would speak first, in its own words.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got {value}"):
        rmtjax.plan({"kernel": GOOD}, **options)


@pytest.mark.parametrize("rule", ["bema", 56, rmtjax.ranks.bema])
def test_what_is_no_rule_is_refused_by_name(rule, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="`rule` must be a rank rule"):
        rmtjax.plan({"kernel": GOOD}, rule=rule)


def test_kernels_that_share_a_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b/kernel'"):
        rmtjax.plan({"a/b": {"kernel": GOOD}, "a": {"b": {"kernel": GOOD}}})


def test_noise_levels_that_are_given_are_used():
    fit, eigenvalues = row_of(GOOD).fit, row_of(GOOD).spectrum.eigenvalues
    between = np.float32(eigenvalues[:2].mean())
    loud = jax.tree.map(jnp.asarray, fit._replace(threshold=between))
    row = row_of(GOOD, fits={"kernel": loud})
    assert row.reason == "factorized: 1 of 60 are signal, rank 8"
    assert row.fit.threshold == between
    assert row.fit.num_spikes == 1  # those of today, not those of the fit
    silent = loud._replace(threshold=jnp.asarray(1e6))
    assert row_of(GOOD, fits={"kernel": silent}).reason == (
        "kept: no signal stands out of the noise"
    )
    refused = loud._replace(distance=jnp.asarray(0.5))
    assert row_of(GOOD, fits={"kernel": refused}).reason == (
        "kept: law does not fit (distance 0.500)"
    )
    unknown = jax.tree.map(lambda a: jnp.asarray(np.nan), loud)._replace(num_spikes=jnp.asarray(0))
    assert row_of(GOOD, fits={"kernel": unknown}).fit == fit
    numbers = rmtjax.BulkFit(*(float(field) for field in loud[:4]), num_spikes=0)  # as from JSON
    assert (
        row_of(GOOD, fits={"kernel": numbers}).reason == row_of(GOOD, fits={"kernel": loud}).reason
    )


@pytest.mark.parametrize("rule", [ranks.fixed(1), Count(1), ranks.gavish_donoho()], ids=str)
def test_no_rule_goes_below_a_floor_of_training(rule):
    found = row_of(GOOD)
    below = np.float32(found.spectrum.eigenvalues[19:21].mean())
    level = jax.tree.map(jnp.asarray, found.fit._replace(threshold=below))
    floor = level._replace(edge=jnp.asarray(np.nan))
    options = {"rule": rule, "multiple": 1}
    assert row_of(GOOD, fits={"kernel": floor}, **options).rank == 20
    # With an edge the same number is a threshold of the noise, which a size does not ask for.
    expected = 20 if rule.needs_noise else 1
    assert row_of(GOOD, fits={"kernel": level}, **options).rank == expected
    options["shrink"] = rmtjax.shrinkage.frobenius
    words = "kept: shrinkage would remove what had to stay while training"
    assert row_of(GOOD, fits={"kernel": floor}, **options).reason == words


def test_noise_levels_of_another_tree_are_refused():
    fit = jax.tree.map(jnp.asarray, row_of(GOOD).fit)
    with pytest.raises(ValueError, match="`fits` has 'params/kernel', which is no path"):
        row_of(GOOD, fits={"params/kernel": fit})


def test_axes_of_another_tree_are_refused():
    axes = {"kernel": rmtjax.KernelAxes((0,), (1,)), "params/kernel": None}
    with pytest.raises(ValueError, match="`axes` has 'params/kernel', which is no path"):
        row_of(GOOD, axes=axes)


def test_axes_of_leaves_that_are_not_chosen_are_no_error():
    params, axes = {"a": GOOD, "b": GOOD}, {"a": None, "b": rmtjax.KernelAxes((1,), (0,))}
    (row,) = rmtjax.plan(params, axes=axes, where="b").values()
    assert row.axes == axes["b"]


def test_noise_levels_of_some_kernels_leave_the_others_alone():
    params = {name: {"kernel": GOOD} for name in "abc"}
    between = np.float32(row_of(GOOD).spectrum.eigenvalues[:2].mean())
    loud = jax.tree.map(jnp.asarray, row_of(GOOD).fit._replace(threshold=between))
    plan = rmtjax.plan(params, fits={"b/kernel": loud}, multiple=1)
    assert [row.rank for row in plan.values()] == [2, 1, 2]


def test_noise_levels_of_a_stack_are_used_each():
    stack, axes = np.stack([GOOD, GOOD, GOOD]), lambda path, leaf: STACK
    fits = row_of(stack, axes=axes).fit
    cut = fits._replace(threshold=np.asarray([1e6, 0.0, 1e6], np.float32))
    row = row_of(stack, axes=axes, fits={"kernel": jax.tree.map(jnp.asarray, cut)}, keep=0.0)
    assert row.rank == 60
    with pytest.raises(ValueError, match="`fits` must have an entry for each matrix of 'kernel'"):
        row_of(GOOD, fits={"kernel": jax.tree.map(jnp.asarray, fits)})


@pytest.mark.slow
def test_the_noise_levels_of_training_are_taken_from_its_state():
    optimizer = optax.chain(optax.sgd(0.0), rmtjax.prune_spectrum(every=1, max_removed=1.0))
    params = {"kernel": jnp.asarray(GOOD)}
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    params = optax.apply_updates(params, updates)
    plan = rmtjax.plan(params, fits=rmtjax.noise_levels(state), multiple=1)
    assert plan["kernel"].rank == 2
    assert plan["kernel"].action == "factorize"


def test_a_truncated_tree_is_refused_without_its_noise_level():
    params = {"kernel": GOOD}
    first = rmtjax.plan(params, multiple=1)
    lower = rmtjax.truncate(params, first)
    assert rmtjax.plan(lower, multiple=1)["kernel"].action == "keep"
    fits = {path: jax.tree.map(jnp.asarray, row.fit) for path, row in first.items()}
    again = rmtjax.plan(lower, multiple=1, fits=fits)
    assert again["kernel"].rank == first["kernel"].rank


@pytest.mark.parametrize("fits", [(), ("a",), rmtjax.prune_spectrum(1).init({"kernel": GOOD})])
def test_a_state_given_for_its_fits_is_an_error(fits):
    # The checks of types during tests come first.
    with pytest.raises(TypeError, match="fits"):
        rmtjax.plan({"kernel": GOOD}, fits=fits)
