"""Plans: a row with a reason for every kernel, whatever it is."""

import inspect
from dataclasses import dataclass

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import rmtjax
from rmtjax import BulkFit, Factors, KernelAxes, ranks

MATRIX, STACK = KernelAxes((0,), (1,)), KernelAxes((1,), (2,), (0,))


def planted(shape, num_spikes=2, seed=3):
    """Unit noise with directions far above its edge; the leading axes make a stack.

    One draw in ten may have a false spike, by the level: these seeds have none.
    """
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    strength = 4 * np.sqrt(max(shape[-2:]))  # the edge is at 2 or below
    signal = strength * u[..., :num_spikes] @ vt[..., :num_spikes, :]
    return (rng.normal(size=shape) + signal).astype(np.float32)


GOOD = planted((60, 80))


@dataclass(frozen=True)
class Count:
    """A rule of a user's own: it need not know about noise, and compiles at once."""

    rank: int
    needs_noise = False

    def fit(self, spectrum):
        return BulkFit(*[jnp.ones_like(spectrum.ratio)] * 4, num_spikes=jnp.asarray(0, jnp.int32))

    def accepts(self, spectrum, fit):
        return jnp.isfinite(spectrum.eigenvalues).all()

    def __call__(self, spectrum, fit=None):
        return jnp.asarray(self.rank, jnp.int32)


def row_of(kernel, **options):
    (row,) = rmtjax.plan({"kernel": kernel}, **options).values()
    return row


def assert_same_row(row, other):
    """The same decision from the same numbers."""
    numbers = lambda row: (row.fit, row.spectrum)
    assert row._replace(fit=None, spectrum=None) == other._replace(fit=None, spectrum=None)
    # LAPACK sees the same matrix in a batch; only what is summed after it may round otherwise.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, numbers(row), numbers(other))


NO_NOISE = "kept: no noise above rounding; of a truncated kernel `fits` must tell it"
BAD = {
    "NaN": (np.where(GOOD > 3, np.nan, GOOD), MATRIX, "kept: not finite"),
    "infinite": (np.where(GOOD > 3, np.inf, GOOD), MATRIX, "kept: not finite"),
    "zero": (np.zeros((60, 80), np.float32), MATRIX, "kept: all zero"),
    "rank one": (np.ones((60, 80), np.float32), MATRIX, NO_NOISE),
    "1 x 1": (np.ones((1, 1), np.float32), MATRIX, "kept: short side 1 under 50"),
    "empty": (np.ones((0, 80), np.float32), MATRIX, "kept: empty (shape (0, 80))"),
    "empty stack": (
        np.ones((0, 60, 80), np.float32),
        STACK,
        "kept: empty (shape (0, 60, 80))",
    ),
    "integer": (np.ones((60, 80), np.int8), MATRIX, "kept: not floating (int8)"),
    "complex": (np.ones((60, 80), np.complex64), MATRIX, "kept: not floating (complex64)"),
    "float8": (np.ones((60, 80), jnp.float8_e4m3fn), MATRIX, "kept: too few bits (float8_e4m3fn)"),
    "number": (1.0, MATRIX, "kept: no matrix (shape ())"),
    "scalar": (np.float32(1), MATRIX, "kept: no matrix (shape ())"),
    "vector": (np.ones(80, np.float32), MATRIX, "kept: no matrix (shape (80,))"),
    "no axes": (GOOD, None, "kept: no matrix (shape (60, 80))"),
    "factors": (
        Factors(jnp.ones((60, 4)), jnp.ones((4, 80))),
        MATRIX,
        "kept: factorized, and `fits` has no noise level for it",
    ),
    "short factors": (
        Factors(jnp.ones((20, 4)), jnp.ones((4, 80))),
        MATRIX,
        "kept: short side 20 under 50",
    ),
    "integer factors": (
        Factors(jnp.ones((60, 4), jnp.int8), jnp.ones((4, 80), jnp.int8)),
        MATRIX,
        "kept: not floating (int8)",
    ),
    "NaN in a stack": (
        np.stack([GOOD, np.where(GOOD > 3, np.nan, GOOD)]),
        STACK,
        "kept: not finite",
    ),
    "zero in a stack": (
        np.stack([GOOD, np.zeros_like(GOOD)]),
        STACK,
        NO_NOISE,
    ),
}


@pytest.mark.parametrize(("kernel", "axes", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_kernel_is_kept_with_a_reason_and_costs_the_others_nothing(kernel, axes, reason):
    params = {"bad": {"kernel": kernel}, "good": {"kernel": GOOD}}
    named = lambda path, leaf: MATRIX if path == "good/kernel" or np.ndim(leaf) < 2 else axes
    plan = rmtjax.plan(params, axes=named if axes is not MATRIX else None)
    assert plan["bad/kernel"].reason == reason
    assert plan["bad/kernel"].action == "keep"
    alone = rmtjax.plan({"good": {"kernel": GOOD}})
    assert plan["good/kernel"].reason == "factorized: 2 of 60 are signal, rank 8"
    assert_same_row(plan["good/kernel"], alone["good/kernel"])
    dense = rmtjax.truncate(params, plan)
    assert dense["bad"]["kernel"] is kernel
    assert dense["good"]["kernel"] is not GOOD


TURNED = KernelAxes((1,), (0,))
GENERAL = KernelAxes((0, 1), (2, 3))
REASONS = {
    "factorized": ((60, 80), 6, {}, "factorize", 8, "factorized: 6 of 60 are signal, rank 8"),
    "no saving": (
        (60, 80),
        35,
        {},
        "truncate",
        40,
        "truncated: no saving from factors (35 of 60 are signal, rank 40)",
    ),
    "as many numbers": ((16, 16), 8, {}, "truncate", 8, "truncated: no saving from factors (8 of"),
    "full rank": ((60, 80), 57, {}, "keep", 60, "kept: full rank (57 of 60 are signal, rank 60)"),
    "just long": ((60, 80), 57, {"min_size": 60}, "keep", 60, "kept: full rank (57 of 60 are"),
    "short": ((60, 80), 6, {"min_size": 61}, "keep", None, "kept: short side 60 under 61"),
    "turned": (
        (60, 80),
        6,
        {"axes": lambda path, leaf: TURNED},
        "truncate",
        8,
        "truncated: factors have their axes in another order (6 of 60",
    ),
    "stacked last": (
        (60, 80, 3),
        6,
        {"axes": lambda path, leaf: KernelAxes((0,), (1,), (2,))},
        "truncate",
        8,
        "truncated: factors have their axes in another order (6 of 60",
    ),
    "stacked": (
        (3, 60, 80),
        6,
        {"axes": lambda path, leaf: STACK},
        "factorize",
        8,
        "factorized: 6 of 60 are signal, rank 8",
    ),
}


@pytest.mark.parametrize(
    ("shape", "count", "options", "action", "rank", "reason"), REASONS.values(), ids=REASONS.keys()
)
def test_each_action_has_its_reason(shape, count, options, action, rank, reason):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    options = {"min_size": 1} | options
    row = row_of(kernel, rule=Count(count), **options)
    assert (row.action, row.rank, row.shape) == (action, rank, shape)
    assert row.reason.startswith(reason)
    assert (row.fit is None) == (row.spectrum is None) == (rank is None)


def test_factors_that_merge_could_misread_are_not_made():
    # Left (8, 4, 8) and right (8, 8, 6): a stack of eight, by their shapes.
    kernel = np.random.default_rng(0).normal(size=(8, 4, 8, 6)).astype(np.float32)
    params, axes = {"kernel": kernel}, lambda path, leaf: GENERAL
    plan = rmtjax.plan(params, rule=Count(8), axes=axes, min_size=8)
    merged = rmtjax.merge(rmtjax.factorize(params, plan))["kernel"]
    # Two ways to the same truncation, a float32 product apart.
    np.testing.assert_allclose(merged, rmtjax.truncate(params, plan)["kernel"], atol=1e-5)
    assert row_of(kernel, rule=Count(8), axes=axes, min_size=8, multiple=7).action == "factorize"


def test_a_law_that_does_not_fit_is_named_with_its_distance():
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(1.5, size=(80, 100)).astype(np.float32)
    row = row_of(heavy)
    assert row.action == "keep"
    assert row.rank == 80
    assert row.reason == f"kept: law does not fit (distance {row.fit.distance:.3f})"
    assert row.fit.distance > 5 / 80
    assert row_of(heavy, rule=ranks.bema(tolerance=1.0)).action != "keep"


def test_a_plan_has_a_row_for_every_kernel_and_nothing_else():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            hidden = nn.BatchNorm(use_running_average=True)(nn.Embed(70, 64)(tokens))
            return nn.Dense(3)(nn.Conv(60, (3,), feature_group_count=1)(hidden))

    shapes = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    plan = rmtjax.plan(params, rule=Count(3))
    assert {path: row.action for path, row in plan.items()} == {
        "Conv_0/kernel": "factorize",
        "Dense_0/kernel": "keep",
        "Embed_0/embedding": "factorize",
    }
    assert all(row.reason for row in plan.values())
    assert str(plan).splitlines() == [
        "Conv_0/kernel      factorized: 3 of 60 are signal, rank 8",
        "Dense_0/kernel     kept: short side 3 under 50",
        "Embed_0/embedding  factorized: 3 of 64 are signal, rank 8",
    ]


def test_a_tree_without_kernels_has_an_empty_plan():
    for params in ({}, {"Dense_0": {"bias": np.ones(3)}}, {"kernel": None}):
        assert rmtjax.plan(params) == {}
        assert str(rmtjax.plan(params)) == ""


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


def test_where_chooses_leaves_by_path_and_shape():
    params = {"a": {"kernel": GOOD, "weight": GOOD}, "b": {"kernel": GOOD, "bias": np.ones(80)}}
    chosen = lambda **options: list(rmtjax.plan(params, rule=Count(1), **options))
    assert chosen() == ["a/kernel", "b/kernel"]
    assert chosen(where=lambda path, leaf: path == "a/weight") == ["a/weight"]
    assert chosen(where=lambda path, leaf: leaf.ndim == 1) == ["b/bias"]
    assert chosen(where=lambda path, leaf: False) == []


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


def test_noise_levels_of_another_tree_are_refused():
    fit = jax.tree.map(jnp.asarray, row_of(GOOD).fit)
    with pytest.raises(ValueError, match="`fits` has 'params/kernel', which is no path"):
        row_of(GOOD, fits={"params/kernel": fit})


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


def test_the_noise_levels_of_training_are_taken_from_its_state():
    optimizer = optax.chain(optax.sgd(0.0), rmtjax.prune_spectrum(every=1))
    params = {"kernel": jnp.asarray(GOOD)}
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    params = optax.apply_updates(params, updates)
    plan = rmtjax.plan(params, fits=optax.tree.get(state, "fits"), multiple=1)
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


@pytest.mark.parametrize("side", [0, 1])
def test_factors_that_have_no_spectrum_are_kept(side):
    factors = [jnp.ones((2, 60, 4)), jnp.ones((2, 4, 80))]
    for value, reason in ((np.nan, "not finite"), (np.inf, "not finite"), (0, "all zero")):
        bad = factors.copy()
        bad[side] = jnp.full_like(bad[side], value)
        assert row_of(Factors(*bad), rule=Count(2)).reason == f"kept: {reason}"
    empty = Factors(jnp.ones((60, 0)), jnp.ones((0, 80)))
    assert row_of(empty, rule=Count(2)).reason == "kept: all zero"


def test_a_plan_changes_nothing():
    params = {"kernel": GOOD.copy()}
    rmtjax.plan(params)
    np.testing.assert_array_equal(params["kernel"], GOOD)


@pytest.mark.parametrize("rule", ["bema", 56, rmtjax.ranks.bema])
def test_what_is_no_rule_is_refused_by_name(rule):
    plan = inspect.unwrap(rmtjax.plan)
    with pytest.raises(TypeError, match="`rule` must be a rank rule"):
        plan({"kernel": GOOD}, rule=rule)


def test_kernels_that_share_a_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b/kernel'"):
        rmtjax.plan({"a/b": {"kernel": GOOD}, "a": {"b": {"kernel": GOOD}}})


def test_a_kernel_of_noise_is_kept():
    noise = np.random.default_rng(0).standard_normal((60, 90)).astype(np.float32)
    assert row_of(noise).reason == "kept: no signal stands out of the noise"


@pytest.mark.parametrize("fits", [(), ("a",), rmtjax.prune_spectrum(1).init({"kernel": GOOD})])
def test_a_state_given_for_its_fits_is_an_error(fits):
    # The checks of types during tests come first.
    with pytest.raises(TypeError, match="fits"):
        rmtjax.plan({"kernel": GOOD}, fits=fits)
