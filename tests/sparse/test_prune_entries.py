"""`prune_entries`: what goes, when, and that it never comes back."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import rmtjax
from rmtjax import prune_entries, sparsity

SIZE = 12 * 20 + 20 * 5
# As users have it: the type checker of the tests would speak first, in its own words.
UNCHECKED = inspect.unwrap(prune_entries)
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "lion": optax.lion(0.01),
}


def make_params(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "a": {"kernel": normal(12, 20), "bias": normal(20)},
        "b": {"kernel": normal(20, 5), "bias": normal(5)},
    }


def make_gradients(seed):
    return make_params(seed + 100)


def run(optimizer, num_steps, params=None):
    """Parameters and states after each step; the state before the first comes first."""
    params = make_params() if params is None else params

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    history = [(params, optimizer.init(params))]
    for seed in range(num_steps):
        history.append(step(*history[-1], make_gradients(seed)))
    return history


def kernels_of(tree):
    return {f"{name}/kernel": np.asarray(tree[name]["kernel"]) for name in tree}


def num_zeros(tree):
    return sum(int((kernel == 0).sum()) for kernel in kernels_of(tree).values())


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("dtype", "update_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.93])
def test_a_pruning_step_lands_on_the_masked_kernels(wrap, dtype, update_dtype, share):
    params, updates = make_params(dtype=dtype), optax.tree.cast(make_gradients(0), update_dtype)
    landed = optax.apply_updates(params, updates)
    optimizer = prune_entries(every=1, sparsity=share)
    pruned, state = wrap(optimizer.update)(updates, optimizer.init(params), params)
    # In float64 by a stable sort, over both kernels.
    sizes = [np.abs(kernel.astype(np.float64)).ravel() for kernel in kernels_of(landed).values()]
    gone = np.argsort(np.concatenate(sizes), kind="stable")[: round(share * SIZE)]
    kept = np.ones(SIZE, bool)
    kept[gone] = False
    for (path, mask), expected in zip(state.masks.items(), np.split(kept, [240]), strict=True):
        np.testing.assert_array_equal(mask.ravel(), expected)
        landed[path[0]]["kernel"] = jnp.where(mask, landed[path[0]]["kernel"], 0)
    assert_same_bits(optax.apply_updates(params, pruned), landed)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, pruned, updates))


@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_n17_what_is_pruned_never_grows_again(inner):
    """The published code keeps no mask, so that momentum and gradients bring zeros back."""
    schedule = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=30)
    history = run(optax.chain(inner, prune_entries(every=5, start=2, sparsity=schedule)), 40)
    zero = np.zeros(SIZE, bool)
    for step, (params, state) in enumerate(history):
        now = np.concatenate([kernel.ravel() == 0 for kernel in kernels_of(params).values()])
        assert not (zero & ~now).any()
        masks = optax.tree.get(state, "masks").values()
        np.testing.assert_array_equal(now, ~np.concatenate([mask.ravel() for mask in masks]))
        last = step - (step - 2) % 5 if step >= 2 else 0  # the last pruning step
        target = round(float(schedule(last - 1)) * SIZE) if last else 0
        assert now.sum() == target
        assert not any((params[name]["bias"] == 0).any() for name in params)
        zero = now
    assert zero.sum() == round(0.9 * SIZE)
    # The optimizer alone does bring them back: the test above can fail.
    params, (inner_state, _) = history[-1]
    updates, _ = inner.update(make_gradients(99), inner_state, params)
    assert num_zeros(optax.apply_updates(params, updates)) == 0


@pytest.mark.parametrize(
    ("every", "start", "expected"),
    [
        (1, 0, range(1, 9)),
        (3, 0, [3, 6]),
        (3, 1, [1, 4, 7]),
        (3, 7, [7]),
        (20, 0, []),
        (20, 5, [5]),
    ],
)
def test_pruning_steps_are_counted_from_one(every, start, expected):
    history = run(prune_entries(every=every, start=start, sparsity=lambda step: 0.1 * step), 8)
    seen, before = [], 0
    for step, (params, _) in enumerate(history):
        if num_zeros(params) > before or (step == 1 and 1 in expected):
            seen.append(step)
            assert num_zeros(params) == round(0.1 * (step - 1) * SIZE)
        before = num_zeros(params)
    assert seen == list(expected)


INJECTED = optax.inject_hyperparams(prune_entries, ("where", "budget"))(1)
INJECTED_UPDATE = jax.jit(INJECTED.update)  # compiled once for all examples


@given(st.lists(st.integers(0, 9), min_size=5, max_size=5))
def test_masks_only_shrink_whatever_the_sparsity_does(tenths):
    params, state, counts = make_params(), INJECTED.init(make_params()), []
    for seed, tenth in enumerate(tenths):
        state.hyperparams["sparsity"] = jnp.asarray(tenth / 10, jnp.float32)
        updates, state = INJECTED_UPDATE(make_gradients(seed), state, params)
        params = optax.apply_updates(params, updates)
        counts.append(num_zeros(params))
    assert counts == (np.maximum.accumulate(tenths) * SIZE // 10).tolist()


def test_once_the_share_is_reached_the_mask_stays():
    history = run(optax.chain(optax.sgd(1.0), prune_entries(every=1, sparsity=0.5)), 6)
    masks = [optax.tree.get(state, "masks") for _, state in history]
    assert all(mask.all() for mask in masks[0].values())
    for later in masks[2:]:
        assert_same_bits(later, masks[1])


def test_a_mask_made_beforehand_holds_from_the_first_step_and_counts():
    given_mask = sparsity.magnitude_mask(make_params(7), 0.3)
    for share, count in ((0.0, 102), (0.2, 102), (0.6, 204)):
        params, state = run(prune_entries(every=1, sparsity=share, mask=given_mask), 1)[1]
        assert num_zeros(params) == count
        for path, mask in state.masks.items():
            assert not (mask & ~given_mask[path[0]]["kernel"]).any()
        again = prune_entries(every=1, mask=state.masks).init(params)  # also by path, from a state
        assert_same_bits(again.masks, state.masks)


def test_weights_decide_between_kernels():
    shares = []
    for weights in ({"a/kernel": 1.0, "b/kernel": 4.0}, {"a/kernel": 4.0, "b/kernel": 1.0}):
        params, state = run(prune_entries(every=1, sparsity=0.5, budget=weights), 1)[1]
        landed = optax.apply_updates(make_params(), make_gradients(0))
        expected = sparsity.magnitude_mask(landed, 0.5, weights=weights)
        assert_same_bits(state.masks, {path: expected[path[0]]["kernel"] for path in state.masks})
        shares.append(float((params["b"]["kernel"] == 0).mean()))
    assert shares[0] > 0.5 > shares[1]


def test_weights_may_follow_the_sparsity():
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(scale * rng.normal(size=(60, 80)), jnp.float32)}
        for name, scale in (("a", 1.0), ("b", 3.0))
    }
    plan, zeros = rmtjax.plan(params), optax.tree.zeros_like(params)
    weights = functools.partial(sparsity.edge_weights, plan)
    optimizer = prune_entries(every=1, sparsity=lambda step: 0.2 + 0.2 * step, budget=weights)
    update, state, mask = optimizer.update, optimizer.init(params), None
    for share in (0.2, 0.4, 0.6):
        updates, state = update(zeros, state, params)
        fixed = sparsity.edge_weights(plan, share)
        mask = sparsity.magnitude_mask(params, share, weights=fixed, mask=mask)
        assert_same_bits(state.masks, {path: mask[path[0]]["kernel"] for path in state.masks})
        params = optax.apply_updates(params, updates)


def test_a_kernel_without_an_update_does_not_move():
    params, optimizer = make_params(), prune_entries(every=1, sparsity=0.5)
    updates = {**make_gradients(0), "b": {"kernel": None}}
    updates, state = optimizer.update(updates, optimizer.init(params), params)
    assert updates["b"]["kernel"] is None
    assert [int((~mask).sum()) for mask in state.masks.values()] == [120, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"`sparsity` must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, r"`sparsity` must be in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, ValueError, r"`sparsity` must be in \[0, 1\), got nan"),
        ({"every": 0}, ValueError, "`every` must be an integer of at least 1, got 0"),
        ({"every": 1.5}, ValueError, "`every` must be an integer .* got 1.5"),
        ({"every": True}, ValueError, "`every` must be an integer .* got True"),
        ({"start": -1}, ValueError, "`start` must be an integer of at least 0, got -1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        UNCHECKED(**{"every": 1, **arguments})


def test_weights_and_masks_of_another_tree_are_refused():
    params = make_params()
    with pytest.raises(ValueError, match=r"`mask` must have an entry .* none for 'b/kernel'"):
        prune_entries(every=1, mask={"a": sparsity.magnitude_mask(params["a"], 0.1)}).init(params)
    optimizer = prune_entries(every=1, sparsity=0.5, budget={"a/kernel": 1.0})
    with pytest.raises(ValueError, match=r"`budget` must have an entry .* none for 'b/kernel'"):
        optimizer.update(params, optimizer.init(params), params)


def test_params_are_needed():
    optimizer = prune_entries(every=1, sparsity=0.5)
    with pytest.raises(ValueError, match="`params` must be given"):
        optimizer.update(make_params(), optimizer.init(make_params()))


def test_metrics_tell_the_share_of_each_kernel():
    optimizer, params = prune_entries(every=1, sparsity=0.5), make_params()
    _, state = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
    expected = {f"sparsity/{path}": np.mean(~mask) for path, mask in state.masks.items()}
    found = jax.jit(rmtjax.metrics)({"chain": state})
    assert found.keys() == expected.keys()
    # Counts of less than 2**24 are exact; one division is rounded.
    np.testing.assert_allclose([found[name] for name in expected], [*expected.values()], rtol=1e-6)
