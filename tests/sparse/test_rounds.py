"""Rounds of `prune_entries` that restore, and those inside a pattern, against a loop in float64."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.transform_checks import run_from

import rmtjax
from rmtjax import prune_entries, sparsity

SHAPES = {"a": (16, 20), "b": (24, 8)}
SIZE = 16 * 20 + 24 * 8
UNCHECKED = inspect.unwrap(prune_entries)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {name: {"kernel": normal(shape)} for name, shape in SHAPES.items()}
    return {**params, "bias": jnp.ones(3)}


def make_gradients(step):
    return optax.tree.scale(0.3, make_params(step + 100))


def run(optimizer, num_steps, wrap=jax.jit):
    """Parameters and states after each step, from those of this file on."""
    return run_from(make_params(), make_gradients, optimizer, num_steps, wrap)


def flat(tree):
    return np.concatenate([np.asarray(tree[name]["kernel"], np.float64).ravel() for name in SHAPES])


def masks_of(state):
    return np.concatenate([np.asarray(mask).ravel() for mask in state.masks.values()])


def smallest(scores, count, m=None):
    """Where the smallest are: of all, or as many in each group of m inputs."""
    out = np.zeros(SIZE, bool)
    if m is None:
        out[np.argsort(scores, kind="stable")[:count]] = True
        return out
    parts, of_group = [], count // (SIZE // m)
    for name, part in zip(SHAPES, np.split(scores, [320]), strict=True):
        groups = part.reshape(-1, m, SHAPES[name][1])
        place = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1, kind="stable")
        parts.append((place < of_group).ravel())
    return np.concatenate(parts)


def reference(num_steps, due, goal_of, further_of, select, weights, m=None):
    """The rounds in float64: entries and masks after each step, for steps of plain gradients."""
    w, kept, left, goal, seen = flat(make_params()), np.ones(SIZE, bool), 0, 0, []
    for index in range(num_steps):
        landed = w + flat(make_gradients(index))
        if left:
            landed, left = np.where(kept, w, landed), left - 1
            if not left:
                score = np.where(kept, np.inf, np.abs(landed) / weights(index))
                kept = ~smallest(score, goal, m)
                landed = np.where(kept, landed, 0)
        else:
            if due(index + 1) and goal_of(index) > (~kept).sum():
                goal, first = goal_of(index), further_of(index)
                score = np.where(kept, np.abs(landed) / weights(index), -1)
                kept = kept & ~smallest(score, first, m)
                left = select if first > goal else 0
            landed = np.where(kept, landed, 0)
        w = landed
        seen.append((w, kept))
    return seen


def assert_follows(history, expected):
    for (params, state), (w, kept) in zip(history[1:], expected, strict=True):
        np.testing.assert_array_equal(masks_of(state), kept)
        # Some thirty sums of float32.
        np.testing.assert_allclose(flat(params), w, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_moves_most_comes_back_until_the_target_is_met(wrap):
    schedule = lambda step: 0.3 + 0.02 * step
    weights = {"a/kernel": 1.0, "b/kernel": 0.5}
    optimizer = prune_entries(
        schedule, every=6, start=2, restore=0.1, select=3, budget=lambda share: weights
    )
    share = lambda index: np.float32(0.3) + np.float32(0.02) * np.float32(index)
    goal = lambda index: int(np.round(share(index) * np.float32(SIZE)))
    divisors = np.repeat([1.0, 0.5], [320, 192])
    expected = reference(
        16,
        lambda step: step >= 2 and (step - 2) % 6 == 0,
        goal,
        lambda index: goal(index) + round(0.1 * SIZE),
        3,
        lambda index: divisors,
    )
    history = run(optimizer, 16, wrap)
    assert_follows(history, expected)
    removed = [int((~masks_of(state)).sum()) for _, state in history]
    sizes = [goal(1) + 51, goal(1), goal(7) + 51, goal(7), goal(13) + 51]
    assert removed == [0, 0, *np.repeat(sizes, 3)]
    came_back = masks_of(history[5][1]) & ~masks_of(history[4][1])
    assert came_back.sum() == 51
    # Other parameters rest in a selection, and kept entries too.
    biases = [float(params["bias"][0]) for params, _ in history]
    rests = [one == other for one, other in itertools.pairwise(biases)]
    assert rests == [step in (3, 4, 5, 9, 10, 11, 15, 16) for step in range(1, 17)]


def test_a_budget_divides_the_score_and_is_not_used_below_the_sparsity_of_magnitudes():
    params = make_params()
    budget = {"a/kernel": 1.0, "b/kernel": 3.0}
    schedule = optax.piecewise_constant_schedule(0.2, {1: 2.0})
    hybrid = prune_entries(schedule, budget=budget, restore=0.1, select=1, magnitude_until=0.2)
    history = run(hybrid, 3)
    landed = optax.apply_updates(params, make_gradients(0))
    plain = sparsity.magnitude_mask(landed, 0.2)
    for path, mask in history[1][1].masks.items():
        np.testing.assert_array_equal(mask, plain[path[0]]["kernel"])
    removed = [int((~masks_of(state)).sum()) for _, state in history]
    goals = [round(0.2 * SIZE), round(0.4 * SIZE)]
    assert removed == [0, goals[0], goals[1] + 51, goals[1]]
    # With the budget the second kernel loses more.
    shares = [1 - np.mean(mask) for mask in history[2][1].masks.values()]
    assert shares[1] > 1.3 * shares[0]


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("restore", [0.0, 0.15])
def test_rounds_inside_a_pattern(pattern, restore):
    n, m = pattern
    schedule = optax.linear_schedule(0.0, 0.6, 12)  # the pattern ends it at a half
    optimizer = prune_entries(
        schedule, every=4, pattern=pattern, restore=restore, select=2 if restore else 0
    )
    of_group = lambda index: min(int(np.round(np.float32(schedule(index)) * m)), m - n)
    more = max(round(restore * m), 1) if restore else 0
    expected = reference(
        14,
        lambda step: step % 4 == 0,
        lambda index: of_group(index) * (SIZE // m),
        lambda index: (of_group(index) + more) * (SIZE // m),
        2,
        lambda index: 1.0,
        m,
    )
    history = run(optimizer, 14)
    assert_follows(history, expected)
    for path, mask in history[-1][1].masks.items():
        kept = np.asarray(mask).reshape(-1, m, SHAPES[path[0]][1]).sum(1)
        assert (kept == n).all()


def test_a_pattern_alone_is_the_mask_of_the_largest():
    _, state = run(prune_entries(pattern=(2, 4)), 1)[1]
    landed = optax.apply_updates(make_params(), make_gradients(0))
    mask = rmtjax.patterns.nm_mask(landed, (2, 4))
    for path, found in state.masks.items():
        np.testing.assert_array_equal(found, mask[path[0]]["kernel"])


def test_the_state_keeps_its_form_and_nothing_is_compiled_again():
    schedule, traces = optax.linear_schedule(0.1, 0.6, 10), []
    optimizer = optax.chain(
        optax.adam(0.01), prune_entries(schedule, every=4, restore=0.05, select=2)
    )

    def step(carry, index):
        traces.append(1)
        params, state = carry
        gradients = jax.tree.map(lambda leaf: leaf * jnp.cos(index + leaf), params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    start, compiled = (make_params(), optimizer.init(make_params())), jax.jit(step)
    carry = start
    for index in range(12):
        carry, _ = compiled(carry, index)
    assert len(traces) == 1
    scanned, _ = jax.lax.scan(step, start, jnp.arange(12))
    # Two programs, which the compiler may have rounded in other places.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), carry[0], scanned[0])


def test_injected_numbers_change_nothing():
    static = ("where", "axes", "budget", "pattern")
    options = {"sparsity": 0.4, "every": 3, "restore": 0.1, "select": 2}
    injected = optax.inject_hyperparams(prune_entries, static)(**options)
    one, other = (run(optimizer, 6)[6] for optimizer in (injected, prune_entries(**options)))
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    jax.tree.map(np.testing.assert_array_equal, one[1].inner_state, other[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"restore": 0.1}, "`restore` and `select` must both be above 0 or both 0, got 0.1 and 0"),
        ({"select": 3}, "`restore` and `select` must both be above 0"),
        ({"restore": 1.0, "select": 3}, r"`restore` must be in \[0, 1\), got 1.0"),
        ({"magnitude_until": -0.1}, r"`magnitude_until` must be in \[0, 1\], got -0.1"),
        ({"pattern": (2, 2)}, "`pattern` must be two integers"),
        ({"pattern": (2, 4), "sparsity": 0.6}, r"`sparsity` must be at most 0.5 with the pattern"),
        ({"pattern": (2, 4), "budget": {}}, "`budget` must be None with `pattern`"),
        ({"pattern": (2, 5)}, "`pattern` must divide the inputs .* 'a/kernel' .* 16 inputs"),
        ({"budget": {"a/kernel": 1.0, "b/kernel": 0.0}}, "`budget` must be positive, got 0.0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, message):
    optimizer = lambda: UNCHECKED(**{"sparsity": 0.5, **arguments})
    with pytest.raises(ValueError, match=message):
        optimizer().update(make_params(), optimizer().init(make_params()), make_params())
