"""`transfer` held to what optax makes of the factorized tree, for many chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from rmtjax import Factors, prune_entries, PruneEntriesState, transfer_opt_state

# Factors are not pruned, and nothing else is left of these trees.
pytestmark = pytest.mark.filterwarnings("ignore:.*will never change a kernel")


def random_tree(seed=0):
    """Kernels whose paths end alike, and a bias."""
    normal = lambda *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    return {
        "kernel": normal(12, 9),
        "a": {"kernel": normal(10, 8), "bias": normal(8)},
        "b": {"kernel": normal(9, 3)},
    }


def assert_close(actual, expected, **tolerance):
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(lambda a, b: close(np.float64(a), np.float64(b)), actual, expected)


PARAMS = random_tree()
# "b/kernel" stays: its place ends with that of "kernel".
THIN = PARAMS | {
    "kernel": Factors(PARAMS["kernel"][:, :2], PARAMS["kernel"][:2]),
    "a": PARAMS["a"]
    | {"kernel": Factors(PARAMS["a"]["kernel"][:, 3:], PARAMS["a"]["kernel"][3:8])},
}
IS_WIDE = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
NOTHING = lambda params: jax.tree.map(lambda _: False, params)
LABELS = lambda params: {name: "kernel" if name == "a" else "rest" for name in params}
CHAINS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, mask=IS_WIDE, mu_dtype=jnp.bfloat16),
    "amsgrad": optax.amsgrad(0.1),
    "adabelief": optax.adabelief(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "lion": optax.lion(0.1),
    "rmsprop, centered": optax.rmsprop(0.1, centered=True),
    "adagrad": optax.adagrad(0.1, initial_accumulator_value=0.7),
    "optimistic": optax.optimistic_gradient_descent(0.1),
    "injected": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 9)),
    "multi steps": optax.MultiSteps(optax.adam(0.1), 2),
    "masked": optax.masked(optax.adam(0.1), IS_WIDE),
    "masked by a tree": optax.masked(optax.adam(0.1), {"kernel": False, "a": True, "b": True}),
    "left out": optax.masked(optax.adam(0.1), NOTHING),
    "partition": optax.partition({"kernel": optax.adam(0.1), "rest": optax.sgd(0.1, 0.9)}, LABELS),
    "if finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "named": optax.named_chain(("clip", optax.clip(1.0)), ("kernel", optax.adam(0.1))),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(1e-3, IS_WIDE),
        optax.scale_by_adam(),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 9)),
        rmtjax.prune_spectrum(100, min_size=4),
        prune_entries(every=100, sparsity=0.5),
    ),
}
LEFT_OUT = ("masked by a tree", "left out", "partition")


@functools.cache
def switched(name):
    """The states before and after the switch, a fresh one, and a step on: one program for all."""
    optimizer = CHAINS[name]

    @jax.jit
    def run(params, thin):
        old = optimizer.init(params)
        for seed in (1, 2, 3):
            _, old = optimizer.update(random_tree(seed), old, params)
        new = transfer_opt_state(
            old, params, thin, optimizer=optimizer if name in LEFT_OUT else None
        )
        reset = transfer_opt_state(old, params, thin, moments="reset", optimizer=optimizer)
        step = optimizer.update(jax.tree.map(jnp.ones_like, thin), new, thin)
        return old, new, reset, optimizer.init(thin), *step

    return run(PARAMS, THIN)


def shapes_of(state):
    """Shapes and dtypes, without the states of this package: they stay as they are."""
    ours = lambda node: isinstance(node, (rmtjax.PruneState, PruneEntriesState))
    shape = lambda leaf: None if ours(leaf) else (leaf.shape, leaf.dtype)
    return jax.tree.map(shape, state, is_leaf=ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_structure_shapes_and_dtypes_are_those_of_a_fresh_state(name):
    _, new, reset, fresh, updates, later = switched(name)
    for state in (new, reset, later):
        assert shapes_of(state) == shapes_of(fresh)
        assert jax.tree.structure(state) == jax.tree.structure(new)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    for field in ("nu", "nu_max", "sum_of_squares"):
        assert all((leaf >= 0).all() for leaf in jax.tree.leaves(optax.tree.get(new, field)))


@pytest.mark.parametrize("name", CHAINS)
def test_reset_starts_the_factors_anew_and_nothing_else(name):
    old, _, reset, fresh, *_ = (
        dict(jax.tree_util.tree_leaves_with_path(state)) for state in switched(name)
    )
    for key, leaf in reset.items():
        is_factor = {"left", "right"} & {getattr(entry, "name", None) for entry in key}
        np.testing.assert_array_equal(leaf, (fresh if is_factor else old)[key])


@pytest.mark.parametrize("name", ["adamw", "multi steps"])
def test_jit_changes_nothing(name):
    old, new, *_ = switched(name)
    # The compiler may sum in another order, and the mu of "adamw" is stored with 8 bits.
    assert_close(transfer_opt_state(old, PARAMS, THIN), new, rtol=0.01, atol=1e-5)


def test_pruning_goes_on_with_the_kernels_that_are_left():
    # The rank of "kernel" has the place in `PruneState` that its moments have in theirs.
    thin = PARAMS | {"kernel": THIN["kernel"]}
    prune = rmtjax.prune_spectrum(2, rule=rmtjax.ranks.fixed(5), min_size=4)
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(0.1, momentum=0.9), prune), 2)
    state = transfer_opt_state(optimizer.init(PARAMS), PARAMS, thin)
    traces, structure = [], jax.tree.structure(state)
    step = jax.jit(lambda *args: traces.append(1) or optimizer.update(*args))
    for _ in range(4):
        _, state = step(thin, state, thin)
        assert jax.tree.structure(state) == structure
    assert len(traces) == 1
    ranks = jax.tree.map(int, optax.tree.get(state, "ranks"))
    # The other kernel is too small; the rank of the one with factors stays.
    assert ranks == {"kernel": 9, "a/kernel": 5}


def test_nothing_factorized_is_nothing_changed():
    old, _, _, fresh, *_ = switched("chain")
    assert_close(transfer_opt_state(old, PARAMS, PARAMS), old, rtol=0)
    same = transfer_opt_state(old, PARAMS, PARAMS, moments="reset", optimizer=CHAINS["chain"])
    assert_close(same, old, rtol=0)
    assert_close(
        transfer_opt_state(fresh, THIN, THIN), fresh, rtol=0
    )  # nor what had factors before


REFUSED = {
    "z": optax.contrib.schedule_free_sgd(0.1),  # a copy of the parameters
    "ema": optax.ema(0.9),  # of gradients or of parameters: who knows
    "e_g": optax.adadelta(0.1),
    "v_row": optax.adafactor(0.1, min_dim_size_to_factor=4),  # mean squares in two parts
    "nu": optax.novograd(0.1),  # a number for a kernel
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_known_is_refused_and_can_be_reset(field):
    state = jax.eval_shape(REFUSED[field].init, PARAMS)
    with pytest.raises(ValueError, match=f"`opt_state` has '{field}' of .*`optimizer`"):
        jax.eval_shape(transfer_opt_state, state, PARAMS, THIN)
    reset = functools.partial(transfer_opt_state, moments="reset", optimizer=REFUSED[field])
    fresh = jax.eval_shape(REFUSED[field].init, THIN)
    assert jax.eval_shape(reset, state, PARAMS, THIN) == fresh


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_kernel_that_a_mask_leaves_out_needs_the_optimizer(name):
    with pytest.raises(ValueError, match=r"leaves out '.*kernel'.* Give `optimizer`"):
        transfer_opt_state(switched(name)[0], PARAMS, THIN)
