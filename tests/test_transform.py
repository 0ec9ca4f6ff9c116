"""`prune_spectrum`: what lands, at which steps, at which rank and by which noise level."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import KernelAxes, prune_spectrum, ranks

SHAPE = (64, 96)
# Singular values of reference and transform differ by rounding: a few eps of the largest, 5.
ATOL = 1e-5


def planted(seed=0, shape=SHAPE, num_spikes=3, noise=0.1):
    """Noise with a few directions far above the threshold: their number is known beforehand."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, num_spikes)))[0] for n in shape)
    strengths = noise * np.sqrt(shape).sum() * np.linspace(3, 2, num_spikes)
    return jnp.asarray(noise * rng.normal(size=shape) + left * strengths @ right.T, jnp.float32)


def lawless():
    """Singular values that fall off geometrically: no Marchenko-Pastur law fits them."""
    rng = np.random.default_rng(9)
    left, right = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in SHAPE)
    return jnp.asarray(left * np.geomspace(10, 0.01, 64) @ right.T, jnp.float32)


def truncated(matrix, rank):
    """The reference, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u[..., :rank] * s[..., None, :rank] @ vt[..., :rank, :]


def perturbation(params, scale=0.01, seed=1):
    rng = np.random.default_rng(seed)
    noise = lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(noise, params)


def assert_same_bits(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def prune_once(params, updates=None, **options):
    """Parameters and state after one pruning step."""
    optimizer = prune_spectrum(1, **options)
    updates = optax.tree.zeros_like(params) if updates is None else updates
    updates, state = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    ("wrap", "dtype", "update_dtype"),
    [
        (lambda f: f, "float32", "float32"),
        (jax.jit, "float32", "float32"),
        (jax.jit, "bfloat16", "bfloat16"),
        (jax.jit, "bfloat16", "float32"),
    ],
    ids=["eager", "jit", "bfloat16", "mixed"],
)
@pytest.mark.parametrize(("keep", "rank"), [(0.0, 3), (0.3, 3 + 18)])  # floor(0.3 * 61) is 18
def test_a_pruning_step_lands_on_the_truncated_kernel(wrap, dtype, update_dtype, keep, rank):
    params = {"Dense_0": {"kernel": planted().astype(dtype)}}
    given_updates = perturbation(optax.tree.cast(params, jnp.dtype(update_dtype)))
    optimizer = prune_spectrum(1, keep=keep)
    updates, state = wrap(optimizer.update)(given_updates, optimizer.init(params), params)
    landed = optax.apply_updates(params, updates)["Dense_0"]["kernel"]
    before, change = (
        np.asarray(tree["Dense_0"]["kernel"], np.float64) for tree in (params, given_updates)
    )
    total = before + change
    # In bfloat16 kernel, sum and update are each rounded, by eps / 2 of the largest entry.
    atol = ATOL if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps) * np.abs(total).max()
    np.testing.assert_allclose(landed.astype(jnp.float32), truncated(total, rank), atol=atol)
    assert int(state.ranks["Dense_0/kernel"]) == rank
    assert updates["Dense_0"]["kernel"].dtype == update_dtype


def test_a_kernel_in_double_precision_is_truncated_in_double_precision():
    with jax.enable_x64(True):
        kernel = planted().astype("float64")
        params, _ = prune_once({"kernel": kernel})
        np.testing.assert_allclose(params["kernel"], truncated(kernel, 3), atol=1e-12)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_updates_pass_to_the_bit_where_nothing_is_pruned(wrap):
    params = {
        "Dense_0": {"kernel": planted(), "bias": jnp.ones(96)},
        "head": {"kernel": planted(shape=(96, 10))},
        "table": {"kernel": jnp.ones(SHAPE, jnp.int32)},
        "thin": {"kernel": rmtjax.factorize_matrix(planted(), 60)},
        "norm": {"scale": planted()},
    }
    given_updates = perturbation(params)
    optimizer = prune_spectrum(2)
    update = wrap(optimizer.update)
    updates, state = update(given_updates, optimizer.init(params), params)
    assert_same_bits(updates, given_updates)
    assert int(state.ranks["Dense_0/kernel"]) == 64  # full before the first pruning
    updates, state = update(given_updates, state, params)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), updates, given_updates)
    assert changed["Dense_0"].pop("kernel")
    assert not any(jax.tree.leaves(changed))
    assert list(state.ranks) == list(state.fits) == ["Dense_0/kernel"]


def test_a_kernel_that_keeps_its_full_rank_keeps_its_update_to_the_bit():
    params = {"kernel": planted()}
    updates = perturbation(params)
    optimizer = prune_spectrum(1, keep=1)
    pruned, state = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    assert_same_bits(pruned, updates)
    assert int(state.ranks["kernel"]) == 64


@pytest.mark.parametrize(
    ("every", "start", "expected"),
    [
        (1, 0, range(1, 11)),
        (3, 0, [3, 6, 9]),
        (3, 1, [1, 4, 7, 10]),
        (3, 7, [7, 10]),
        (20, 0, []),
        (20, 5, [5]),
    ],
)
def test_pruning_steps_are_counted_from_one(every, start, expected):
    params = {"kernel": planted()}
    optimizer = prune_spectrum(every, start=start)
    update = jax.jit(optimizer.update)
    state, seen = optimizer.init(params), []
    for step in range(1, 11):
        updates, state = update({"kernel": jnp.zeros(SHAPE)}, state, params)
        assert int(state.step) == step
        if updates["kernel"].any():
            seen.append(step)
    assert seen == list(expected)


def test_keep_may_be_a_schedule_of_the_step():
    params = {"kernel": planted()}
    optimizer = prune_spectrum(1, keep=optax.linear_schedule(1.0, 0.0, 4))
    update, state, seen = jax.jit(optimizer.update), optimizer.init(params), []
    for _ in range(5):
        updates, state = update({"kernel": jnp.zeros(SHAPE)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(int(state.ranks["kernel"]))
    # 3 + floor(keep * 61) for keep = 1, 0.75, 0.5, 0.25, 0: it counts from 0, as optax does.
    assert seen == [64, 48, 33, 18, 3]


@pytest.mark.parametrize(
    ("num_spikes", "min_rank", "rank"), [(0, 1, 64), (3, 2, 3), (3, 10, 10), (3, 99, 64)]
)
def test_min_rank_is_a_floor(num_spikes, min_rank, rank):
    kernel = planted(num_spikes=num_spikes)
    params, state = prune_once({"kernel": kernel}, min_rank=min_rank)
    assert int(state.ranks["kernel"]) == rank
    np.testing.assert_allclose(params["kernel"], truncated(kernel, rank), atol=ATOL)


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        (ranks.bema(trim=0.2, level=0.05), 3),
        (ranks.gavish_donoho(), 3),
        (ranks.fixed(7), 7),
        (ranks.energy(0.8), None),
    ],
    ids=str,
)
def test_every_rule_prunes(rule, rank):
    kernel = planted()
    if rank is None:
        squares = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False) ** 2
        rank = int(np.searchsorted(np.cumsum(squares), 0.8 * squares.sum())) + 1
    params, state = prune_once({"kernel": kernel}, rule=rule)
    assert int(state.ranks["kernel"]) == rank
    np.testing.assert_allclose(params["kernel"], truncated(kernel, rank), atol=ATOL)
    assert np.isfinite(state.fits["kernel"].threshold)


def test_where_and_min_size_choose_the_kernels():
    params = {"a": {"kernel": planted(), "w": planted()}, "b": {"w": planted(shape=(40, 96))}}
    chosen = {"where": lambda path, leaf: path.endswith("/w") and leaf.ndim == 2}
    _, state = prune_once(params, **chosen)
    assert list(state.ranks) == ["a/w"]
    pruned, state = prune_once(params, min_size=40, **chosen)
    assert {path: int(rank) for path, rank in state.ranks.items()} == {"a/w": 3, "b/w": 3}
    assert_same_bits(pruned["a"]["kernel"], params["a"]["kernel"])


@pytest.mark.parametrize("batch", [0, 2])
def test_a_stack_has_one_rank_that_of_its_richest(batch):
    matrices = jnp.stack([planted(0, num_spikes=2), planted(1, num_spikes=5)])
    inputs, outputs = sorted({0, 1, 2} - {batch})
    axes = lambda path, leaf: KernelAxes((inputs,), (outputs,), (batch,))
    params, state = prune_once({"kernel": jnp.moveaxis(matrices, 0, batch)}, axes=axes)
    lower = jnp.moveaxis(params["kernel"], batch, 0)
    np.testing.assert_allclose(lower, truncated(matrices, 5), atol=ATOL)
    assert int(state.ranks["kernel"]) == 5
    assert state.fits["kernel"].num_spikes.tolist() == [2, 5]  # but each its own noise


@pytest.mark.parametrize(
    ("path", "shape", "matrix_shape"),
    [
        ("query", (96, 4, 16), (96, 64)),
        ("out", (4, 16, 96), (64, 96)),
        ("Conv_0", (3, 3, 8, 96), (72, 96)),
    ],
)
def test_kernels_of_many_axes_are_matrices_by_flax_names(path, shape, matrix_shape):
    matrix = planted(shape=matrix_shape)
    params, state = prune_once({path: {"kernel": matrix.reshape(shape)}})
    lower = params[path]["kernel"]
    assert lower.shape == shape
    np.testing.assert_allclose(lower.reshape(matrix_shape), truncated(matrix, 3), atol=ATOL)
    assert int(state.ranks[f"{path}/kernel"]) == 3


def test_the_first_accepted_noise_level_is_carried():
    params = {"kernel": planted()}
    optimizer = prune_spectrum(2)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    seen = []
    for step in range(6):
        updates = perturbation(params, 0.02, seed=step)
        if step == 1:
            first = rmtjax.fit_bema(rmtjax.spectrum(params["kernel"] + updates["kernel"]))
        updates, state = update(updates, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(state.fits["kernel"])
    assert np.isnan(seen[0][:4]).all()
    # Compiled together with the rest, sums are taken in another order.
    np.testing.assert_allclose(seen[1], first, rtol=1e-5)
    for later in seen[2:]:
        assert_same_bits(later, seen[1])


def test_a_truncated_spectrum_is_not_refitted_as_the_published_code_does():
    """N9 of the reference notes: zeros of a truncation, fed to BEMA, make spikes of all."""
    params = {"kernel": planted()}
    optimizer = prune_spectrum(1)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    refit = jax.jit(lambda kernel: rmtjax.fit_bema(rmtjax.spectrum(kernel)).num_spikes)
    rng, naive = np.random.default_rng(5), params["kernel"]
    carried, refitted = [], []
    for _ in range(8):
        # As the gradient of a small batch: of low rank, far below the noise in size.
        updates = 0.003 * jnp.float32(rng.normal(size=(64, 4)) @ rng.normal(size=(4, 96)))
        naive = naive + updates
        refitted.append(int(refit(naive)))
        naive = jnp.asarray(truncated(naive, refitted[-1]), jnp.float32)
        updates, state = update({"kernel": updates}, state, params)
        params = optax.apply_updates(params, updates)
        carried.append(int(state.ranks["kernel"]))
    assert carried == [3] * 8
    assert refitted[0] == 3
    assert min(refitted[1:]) >= 10  # near trim * p, whatever the data


def test_a_refused_kernel_is_left_alone_and_tried_again():
    params = {"kernel": lawless(), "other": {"kernel": planted(4)}}
    optimizer = prune_spectrum(1)
    update = jax.jit(optimizer.update)
    wiggle = perturbation(params)
    updates, refused = update(wiggle, optimizer.init(params), params)
    assert_same_bits(updates["kernel"], wiggle["kernel"])
    assert np.isnan(refused.fits["kernel"].threshold)
    assert {path: int(rank) for path, rank in refused.ranks.items()} == {
        "kernel": 64,
        "other/kernel": 3,
    }
    wiggle["kernel"] = planted() - params["kernel"]
    updates, state = update(wiggle, refused, params)
    landed = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_allclose(landed, truncated(planted(), 3), atol=ATOL)
    assert int(state.ranks["kernel"]) == 3
    assert_same_bits(state.fits["other/kernel"], refused.fits["other/kernel"])


def test_a_stack_with_a_refused_matrix_is_left_alone():
    params = {"kernel": jnp.stack([planted(), lawless()])}
    axes = lambda path, leaf: KernelAxes((1,), (2,), (0,))
    updates = perturbation(params)
    landed, state = prune_once(params, updates, axes=axes)
    assert_same_bits(landed, optax.apply_updates(params, updates))
    assert int(state.ranks["kernel"]) == 64
    assert np.isnan(state.fits["kernel"].threshold).tolist() == [False, True]


@pytest.mark.parametrize("rule", [ranks.bema(), ranks.gavish_donoho(), ranks.fixed(3)], ids=str)
def test_a_kernel_that_is_no_longer_finite_is_left_alone(rule):
    params = {"a": {"kernel": planted(0)}, "b": {"kernel": planted(1)}}
    optimizer = prune_spectrum(1, rule=rule)
    update = jax.jit(optimizer.update)
    zeros = optax.tree.zeros_like(params)
    updates, state = update(zeros, optimizer.init(params), params)
    params = optax.apply_updates(params, updates)
    wiggle = perturbation(params)
    expected = truncated(params["b"]["kernel"] + wiggle["b"]["kernel"], 3)
    for bad in (np.nan, np.inf):
        broken = {**wiggle, "a": {"kernel": wiggle["a"]["kernel"].at[5, 7].set(bad)}}
        updates, later = update(broken, state, params)
        assert_same_bits(updates["a"], broken["a"])
        assert_same_bits(later.fits, state.fits)
        landed = optax.apply_updates(params, updates)["b"]["kernel"]
        np.testing.assert_allclose(landed, expected, atol=ATOL)
    _, healed = update(wiggle, later, params)
    assert int(healed.ranks["a/kernel"]) == 3


@pytest.mark.parametrize(
    "rule", [ranks.bema(), ranks.gavish_donoho(), ranks.fixed(3), ranks.energy(0.9)], ids=str
)
def test_a_kernel_of_zeros_stays_zero(rule):
    params, state = prune_once({"kernel": jnp.zeros(SHAPE)}, rule=rule)
    assert not params["kernel"].any()
    if isinstance(rule, ranks.bema | ranks.gavish_donoho):  # no noise to carry
        assert np.isnan(state.fits["kernel"].threshold)


@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_ranks_are_those_of_a_plan_with_the_carried_noise(keep):
    params = {
        "a": {"kernel": planted(0)},
        "b": {"kernel": lawless()},
        "c": {"kernel": jnp.stack([planted(1), planted(2, num_spikes=6)])},
        "d": {"kernel": planted(3).astype(jnp.bfloat16)},
    }
    batch = {"c/kernel": KernelAxes((1,), (2,), (0,))}
    options = {"keep": keep, "axes": lambda path, _: batch.get(path, KernelAxes((0,), (1,)))}
    pruned, state = prune_once(params, **options)
    fits, expected = optax.tree.get(state, "fits"), jax.tree.map(int, state.ranks)
    assert len(set(expected.values())) == 3  # 3 spikes, 6 spikes and a refusal
    for tree in (params, pruned):
        plan = rmtjax.plan(tree, fits=fits, multiple=1, **options)
        assert {path: row.rank for path, row in plan.items()} == expected


@jax.jit
def prune_by(keep, params):
    """With `keep` traced, so that one program serves all of its values."""
    optimizer = prune_spectrum(1, keep=keep)
    updates = optax.tree.zeros_like(params)
    updates, state = optimizer.update(updates, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state.ranks


@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(64, 96), (90, 56), (50, 200)]),
    num_spikes=st.integers(0, 8),
    keep=st.floats(0, 1, width=32),
)
@settings(max_examples=20)
def test_the_state_has_the_numerical_rank(seed, shape, num_spikes, keep):
    params = {"kernel": planted(seed, shape, num_spikes)}
    pruned, rank = prune_by(keep, params)
    # Rounding leaves singular values of 1e-6; those of the noise are above 0.05.
    assert np.linalg.matrix_rank(pruned["kernel"], tol=1e-4) == int(rank["kernel"])
    assert int(rank["kernel"]) >= max(num_spikes, 1)
