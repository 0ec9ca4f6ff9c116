"""`prune_spectrum` held to what optax asks of the transforms in `optax.contrib`."""

import functools
import inspect
import itertools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from rmtjax import factorize_matrix, prune_spectrum, PruneState, ranks

SHAPE = (64, 96)
# Singular values of reference and transform differ by rounding: a few eps of the largest, 5.
ATOL = 1e-5
STATIC = ("min_size", "rule", "where", "axes")
# As users have it: the type checker of the tests would speak first, in its own words.
UNCHECKED = inspect.unwrap(prune_spectrum)


def planted(seed=0, num_spikes=3, noise=0.1):
    """Noise with a few directions far above the threshold: their number is known beforehand."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, num_spikes)))[0] for n in SHAPE)
    strengths = noise * np.sqrt(SHAPE).sum() * np.linspace(3, 2, num_spikes)
    return jnp.asarray(noise * rng.normal(size=SHAPE) + left * strengths @ right.T, jnp.float32)


def truncated(matrix, rank=3):
    """The reference, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def make_params():
    return {
        "a": {"kernel": planted(0), "bias": jnp.ones(96)},
        "b": {"kernel": planted(1)},
    }


def make_gradients(seed=0, scale=0.01):
    rng = np.random.default_rng(seed)
    noise = lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(noise, make_params())


def run(optimizer, num_steps, params=None, **jit_options):
    """Parameters and states after each step; the state before the first comes first."""
    params = make_params() if params is None else params

    @functools.partial(jax.jit, **jit_options)
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    history = [(params, optimizer.init(params))]
    for seed in range(num_steps):
        history.append(step(*history[-1], make_gradients(seed)))
    return history


def ranks_of(state):
    return {path: int(rank) for path, rank in optax.tree.get(state, "ranks").items()}


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def assert_close(actual, expected):
    """For results of two programs, which the compiler may have rounded in other places."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=ATOL), actual, expected)


def describe(tree):
    """Structure, shapes and dtypes: what decides whether `jit` compiles again."""
    return jax.tree.structure(tree), [
        (a.shape, a.dtype, a.weak_type) for a in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adam(1e-3),
        optax.adamw(1e-3, weight_decay=0.1),
        optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1), optax.sgd(0.5)),
    ],
    ids=["momentum", "adam", "adamw", "clip"],
)
def test_last_in_a_chain_it_prunes_what_the_others_would_land_on(inner):
    history = run(optax.chain(inner, prune_spectrum(2)), 3)
    plain = run(inner, 2)
    assert_close(history[1][0], plain[1][0])
    expected = plain[2][0]
    for name in ("a", "b"):
        expected[name]["kernel"] = truncated(expected[name]["kernel"])
    assert_close(history[2][0], expected)
    assert ranks_of(history[3][1]) == {"a/kernel": 3, "b/kernel": 3}
    assert not np.isnan(optax.tree.get(history[3][1], "fits")["a/kernel"].threshold)


def test_masked_prunes_what_the_mask_names():
    params, state = run(optax.masked(prune_spectrum(1), {"a": True, "b": False}), 1)[1]
    assert ranks_of(state) == {"a/kernel": 3}
    landed = optax.apply_updates(make_params(), make_gradients())
    np.testing.assert_allclose(params["a"]["kernel"], truncated(landed["a"]["kernel"]), atol=ATOL)
    assert_same_bits(params["b"], landed["b"])


def test_partition_prunes_one_group():
    transforms = {
        "pruned": optax.chain(optax.sgd(1.0), prune_spectrum(1)),
        "plain": optax.sgd(1.0),
    }
    labels = {"a": "plain", "b": "pruned"}
    params, state = run(optax.partition(transforms, labels), 1)[1]
    landed = optax.apply_updates(make_params(), optax.tree.scale(-1, make_gradients()))
    np.testing.assert_allclose(params["b"]["kernel"], truncated(landed["b"]["kernel"]), atol=ATOL)
    assert_same_bits(params["a"], landed["a"])
    assert ranks_of(state) == {"b/kernel": 3}


def test_multi_steps_counts_the_real_steps():
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(0.1), prune_spectrum(2)), 2)
    history = run(optimizer, 5)
    full, pruned = {"a/kernel": 64, "b/kernel": 64}, {"a/kernel": 3, "b/kernel": 3}
    assert [ranks_of(state) for _, state in history] == [*[full] * 4, *[pruned] * 2]
    kernels = [params["a"]["kernel"] for params, _ in history]
    moved = [bool((a != b).any()) for a, b in itertools.pairwise(kernels)]
    assert moved == [False, True, False, True, False]


def test_inject_hyperparams_changes_nothing():
    options = {"start": 1, "keep": 0.3, "min_rank": 2}
    injected = optax.inject_hyperparams(prune_spectrum, STATIC)(2, **options)
    plain, wrapped = run(prune_spectrum(2, **options), 3), run(injected, 3)
    assert ranks_of(wrapped[3][1]) == {"a/kernel": 21, "b/kernel": 21}
    assert_close((wrapped[3][0], wrapped[3][1].inner_state), plain[3])
    assert describe(wrapped[1][1]) == describe(wrapped[3][1])


def test_injected_hyperparams_can_be_changed_and_scheduled():
    optimizer = optax.inject_hyperparams(prune_spectrum, STATIC)(
        100, keep=optax.linear_schedule(0.5, 0.0, 2)
    )
    update, params = jax.jit(optimizer.update), {"kernel": planted()}
    state = optimizer.init(params)
    _, state = update(optax.tree.zeros_like(params), state, params)
    assert ranks_of(state) == {"kernel": 64}
    state.hyperparams["every"] = jnp.asarray(1)
    _, state = update(optax.tree.zeros_like(params), state, params)
    keep = float(state.hyperparams["keep"])
    assert 0 < keep < 1
    assert ranks_of(state) == {"kernel": 3 + int(keep * 61)}


def test_inject_hyperparams_with_a_static_schedule_and_callables():
    options = {
        "keep": optax.linear_schedule(1.0, 0.0, 2),
        "rule": ranks.fixed(4),
        "where": lambda path, leaf: path == "b/kernel",
    }
    factory = optax.inject_hyperparams(prune_spectrum, (*STATIC, "keep"))
    history = run(factory(1, **options), 2)
    assert [ranks_of(state) for _, state in history[1:]] == [{"b/kernel": 64}, {"b/kernel": 34}]


def test_inject_hyperparams_says_that_min_size_is_static():
    factory = optax.inject_hyperparams(UNCHECKED)
    with pytest.raises(TypeError, match=r"`min_size` .* static_args"):
        factory(2).init(make_params())


def test_unknown_extra_arguments_are_ignored():
    optimizer, params = optax.chain(optax.sgd(0.1), prune_spectrum(1)), make_params()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    plain = update(make_gradients(), state, params)
    extra = update(make_gradients(), state, params, value=1.0, unheard_of=2)
    assert_same_bits(extra, plain)


def test_apply_if_finite_keeps_the_state_of_a_skipped_step():
    optimizer, params = optax.apply_if_finite(prune_spectrum(2), 5), make_params()
    bad = jax.tree.map(lambda a: a * jnp.nan, make_gradients())
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    steps = []
    for gradients in (make_gradients(), bad, make_gradients()):
        updates, state = update(gradients, state, params)
        steps.append(int(state.inner_state.step))
    assert steps == [1, 1, 2]
    landed = optax.apply_updates(params, updates)["b"]["kernel"]
    expected = truncated(params["b"]["kernel"] + make_gradients()["b"]["kernel"])
    np.testing.assert_allclose(landed, expected, atol=ATOL)


def test_flax_train_state():
    optimizer = optax.chain(optax.sgd(0.1), prune_spectrum(1))
    state = TrainState.create(apply_fn=lambda: None, params=make_params(), tx=optimizer)
    state = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(
        state, make_gradients()
    )
    assert ranks_of(state.opt_state) == {"a/kernel": 3, "b/kernel": 3}
    assert np.linalg.matrix_rank(state.params["a"]["kernel"], tol=1e-4) == 3


def test_scan_over_steps_is_the_loop():
    optimizer = prune_spectrum(2, keep=optax.linear_schedule(0.5, 0.0, 4))
    gradients = [make_gradients(seed) for seed in range(4)]

    def step(carry, gradients):
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), state.ranks["a/kernel"]

    start = (make_params(), optimizer.init(make_params()))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    end, seen = jax.jit(functools.partial(jax.lax.scan, step))(start, stacked)
    # 3 + floor(keep * 61) for keep = 0.375 after one step and 0.125 after three.
    assert seen.tolist() == [64, 25, 25, 10]
    assert_close(end, run(optimizer, 4)[4])


def test_vmap_over_an_ensemble():
    optimizer = prune_spectrum(1)
    members = [{"kernel": planted(seed, num_spikes=seed + 1)} for seed in range(3)]
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    state = jax.vmap(optimizer.init)(ensemble)
    zeros = optax.tree.zeros_like(ensemble)
    updates, state = jax.jit(jax.vmap(optimizer.update))(zeros, state, ensemble)
    assert state.ranks["kernel"].tolist() == [1, 2, 3]
    landed = optax.apply_updates(ensemble, updates)["kernel"]
    for rank, member in enumerate(members):
        np.testing.assert_allclose(landed[rank], truncated(member["kernel"], rank + 1), atol=ATOL)


def test_nothing_is_compiled_again():
    traces = []
    optimizer = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        prune_spectrum(2, start=3, keep=optax.linear_schedule(0.5, 0.0, 6)),
    )

    @jax.jit
    def step(params, state, gradients):
        traces.append(1)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = make_params(), optimizer.init(make_params())
    seen = set()
    for seed in range(7):
        params, state = step(params, state, make_gradients(seed))
        seen.add(ranks_of(state)["a/kernel"])
    assert len(seen) == 4  # full, and three ranks of the schedule
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("dtype", "update_dtype"),
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float64"),
        ("float64", "float64"),
    ],
)
def test_updates_keep_their_dtype_and_the_state_its_form(dtype, update_dtype):
    with jax.enable_x64("float64" in (dtype, update_dtype)):
        params = {"kernel": planted().astype(dtype)}
        updates = {"kernel": jnp.zeros(SHAPE, update_dtype)}
        optimizer = prune_spectrum(1)
        state = optimizer.init(params)
        pruned, later = jax.jit(optimizer.update)(updates, state, params)
        assert pruned["kernel"].dtype == update_dtype
        assert describe(later) == describe(state)
        assert ranks_of(later) == {"kernel": 3}


def test_the_state_is_a_tree_of_arrays():
    _, state = run(prune_spectrum(1), 1)[1]
    assert isinstance(state, PruneState)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert_same_bits(jax.tree.unflatten(treedef, leaves), state)
    assert optax.tree.get(state, "fits") is state.fits


def test_a_state_saved_as_numpy_arrays_goes_on_as_if_nothing_had_happened():
    optimizer = optax.chain(optax.adam(1e-3), prune_spectrum(2))
    update = jax.jit(optimizer.update)
    params, state = run(optimizer, 3)[3]
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(optimizer.init(make_params())), saved)
    expected = update(make_gradients(), state, params)
    assert_same_bits(update(make_gradients(), restored, params), expected)


@pytest.mark.parametrize("rule", [ranks.bema(), ranks.fixed(3)], ids=str)
def test_buffers_can_be_donated_from_the_first_step_on(rule):
    optimizer = optax.chain(optax.adam(1e-3), prune_spectrum(2, rule=rule))
    params, state = make_params(), optimizer.init(make_params())
    before = jax.tree.leaves((params, state))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(4):
        params, state = step(params, state, make_gradients(seed))
    assert all(leaf.is_deleted() for leaf in before)
    assert_same_bits(params, run(optimizer, 4)[4][0])


def test_init_can_be_compiled_or_only_shaped():
    optimizer, params = prune_spectrum(1), make_params()
    state = optimizer.init(params)
    assert_same_bits(jax.jit(optimizer.init)(params), state)
    shapes = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [(flax.core.freeze, ""), (lambda tree: {"params": tree}, "params/")],
    ids=["frozen", "outer"],
)
def test_other_containers(wrap, prefix):
    params, gradients = wrap(make_params()), wrap(make_gradients())
    optimizer = prune_spectrum(1)
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert ranks_of(state) == {f"{prefix}a/kernel": 3, f"{prefix}b/kernel": 3}


@pytest.mark.parametrize(
    "params",
    [{}, {"bias": jnp.ones(96)}, {"kernel": factorize_matrix(planted(), 60)}],
    ids=["empty", "vector", "factors"],
)
def test_a_tree_without_kernels_passes(params):
    optimizer = prune_spectrum(1, where=lambda path, leaf: True)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert_same_bits(updates, params)
    assert (state.fits, state.ranks, int(state.step)) == ({}, {}, 1)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("every", 0, ValueError),
        ("every", -1, ValueError),
        ("every", 1.5, TypeError),
        ("every", True, TypeError),
        ("start", -1, ValueError),
        ("start", 0.5, TypeError),
        ("keep", -0.1, ValueError),
        ("keep", 1.1, ValueError),
        ("keep", float("nan"), ValueError),
        ("min_rank", 0, ValueError),
        ("min_size", 0, ValueError),
    ],
)
def test_wrong_arguments_are_named(name, value, error):
    with pytest.raises(error, match=f"^`{name}` must be .* got {value}"):
        UNCHECKED(**{"every": 2, name: value})


def test_params_are_needed():
    optimizer = prune_spectrum(1)
    with pytest.raises(ValueError, match=r"`params` must be given"):
        optimizer.update(make_gradients(), optimizer.init(make_params()))
