"""`agree` against float64, in every place where optax puts a transform, and on wrong labels."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import replica_cases
from helpers.nnx_checks import update as update_nnx
from helpers.transform_checks import assert_close, assert_same_bits, describe, run_from

import rmtjax
from rmtjax import agree, AgreeState

PATHS = ("a/kernel", "b/kernel")
# Singular vectors of neighbours mix by rounding, but the sum over both does not: a few hundred eps.
TOLERANCE = 1e-4
UNCHECKED = inspect.unwrap(agree)


def draw(*shape, seed=0, scale=1.0):
    values = scale * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def make_params():
    return {
        "a": {"kernel": draw(24, 16), "bias": jnp.ones(16)},
        "b": {"kernel": draw(9, 16, seed=1)},
    }


def gradients_at(seed):
    return jax.tree.map(lambda leaf: draw(*leaf.shape, seed=10 + seed), make_params())


def agreed(first, second):
    """The reference, in float64: what two changes agree on, of both together."""
    return 2 * replica_cases.agreed(np.stack([first, second]))[0]


def run(optimizer, steps, wrap=lambda step: step):
    """Parameters and states after each step, from those of this file on."""
    return run_from(make_params(), gradients_at, optimizer, steps, wrap)


def kernels(params):
    return {path: params[path[0]]["kernel"] for path in PATHS}


def expected_merge(history, start, middle, landed, rest=0.0):
    """The reference, from parameters before a step that merges: `landed` without the merge."""
    first, half = (kernels(history[step][0]) for step in (start, middle))
    results = {}
    for path, last in landed.items():
        sum_ = agreed(half[path] - first[path], last - half[path])
        results[path] = first[path] + sum_ + rest * (last - first[path] - sum_)
    return results


def land(history, rate=-0.1):
    """Where plain SGD would land from the second last parameters."""
    params = history[-2][0]
    gradients = gradients_at(len(history) - 2)
    return kernels(jax.tree.map(lambda p, g: p + rate * g, params, gradients))


def compare(params, expected):
    for path, value in kernels(params).items():
        np.testing.assert_allclose(value, expected[path], atol=TOLERANCE)


@pytest.mark.parametrize("wrap", [lambda step: step, jax.jit], ids=["eager", "compiled"])
@pytest.mark.parametrize("rest", [0.0, 0.25])
def test_the_end_of_a_period_lands_on_what_its_halves_agree_on(wrap, rest):
    optimizer = optax.chain(optax.sgd(0.1), agree(5, start=5, rest=rest))
    history = run(optimizer, 10, wrap)
    plain = run(optax.sgd(0.1), 4)
    # An odd period has its middle after two of five steps.
    assert_close(history[4][0], plain[4][0])
    for end in (5, 10):
        upto = history[: end + 1]
        compare(history[end][0], expected_merge(upto, end - 5, end - 3, land(upto), rest))
    np.testing.assert_allclose(
        history[5][0]["a"]["bias"], run(optax.sgd(0.1), 5)[5][0]["a"]["bias"]
    )


def merges_at(history):
    """The steps whose landing differs from that of plain SGD."""
    ends = range(1, len(history))
    differs = lambda end: (
        not np.allclose(
            kernels(history[end][0])["a/kernel"], land(history[: end + 1])["a/kernel"], atol=1e-5
        )
    )
    return [end for end in ends if differs(end)]


@pytest.mark.parametrize(
    ("start", "steps"), [(0, [8, 12]), (4, [4, 8, 12]), (7, [7, 11]), (10, [10])]
)
def test_start_is_the_first_step_that_merges(start, steps):
    optimizer = optax.chain(optax.sgd(0.1), agree(4, start=start))
    history = run(optimizer, 13, jax.jit)
    assert merges_at(history) == steps
    for end in steps:
        upto = history[: end + 1]
        compare(history[end][0], expected_merge(upto, end - 4, end - 2, land(upto)))


def test_halves_that_agree_keep_their_change_and_halves_that_oppose_keep_none():
    params = {"a": {"kernel": draw(12, 20)}}
    up, optimizer = {"a": {"kernel": draw(12, 20, seed=3)}}, agree(2, start=2)
    for sign, kept in ((1.0, 1.0), (-1.0, 0.0)):
        state, moved = optimizer.init(params), params
        for factor in (1.0, sign):
            updates, state = optimizer.update(optax.tree.scale(factor, up), state, moved)
            moved = optax.apply_updates(moved, updates)
        change = moved["a"]["kernel"] - params["a"]["kernel"]
        np.testing.assert_allclose(change, 2 * kept * up["a"]["kernel"], atol=TOLERANCE)
        found = rmtjax.metrics(state)
        assert found.keys() == {"kept/a/kernel", "effective_rank/a/kernel"}
        if sign > 0:
            np.testing.assert_allclose(found["kept/a/kernel"], 1, rtol=1e-4)


def test_metrics_are_those_of_the_change():
    optimizer = optax.chain(optax.sgd(0.1), agree(4, start=4))
    history = run(optimizer, 4)
    before = rmtjax.metrics(history[3][1])
    assert before == {name: name.startswith("kept") for name in before}
    found = rmtjax.metrics(history[4][1])
    assert len(found) == 4
    for path, last in land(history).items():
        first = kernels(history[0][0])[path]
        change = np.asarray(kernels(history[4][0])[path] - first, np.float64)
        share = np.sum(change**2) / np.sum(np.square(last - first))
        np.testing.assert_allclose(found[f"kept/{path}"], share, rtol=1e-4)
        middle = kernels(history[2][0])[path]
        _, rank = replica_cases.agreed(np.stack([middle - first, last - middle]))
        np.testing.assert_allclose(found[f"effective_rank/{path}"], rank, rtol=1e-3)


def test_metrics_of_both_transforms_are_read_together():
    params = {"a": {"kernel": draw(60, 60)}}
    optimizer = optax.chain(agree(2), rmtjax.prune_spectrum(2))
    found = rmtjax.metrics(optimizer.init(params))
    assert {name.partition("/")[0] for name in found} >= {"rank", "kept", "effective_rank"}
    twice = optimizer.init(params)[0]
    with pytest.raises(ValueError, match="two states for 'a/kernel'"):
        rmtjax.metrics({"generator": twice, "critic": twice})
    with pytest.raises(
        ValueError, match=r"no state of `rmtjax.prune_spectrum` or `rmtjax.lowrank.shrink_tail`\."
    ):
        rmtjax.noise_levels(twice)


def test_each_matrix_of_a_stack_is_merged_alone():
    stack = {"layers": {"kernel": draw(3, 12, 20)}}
    axes = lambda path, leaf: rmtjax.KernelAxes((1,), (2,), batch=(0,))
    optimizer, params = agree(2, start=2, axes=axes), stack
    state, moves = optimizer.init(stack), [draw(3, 12, 20, seed=seed) for seed in (1, 2)]
    for move in moves:
        updates, state = optimizer.update({"layers": {"kernel": move}}, state, params)
        params = optax.apply_updates(params, updates)
    change = params["layers"]["kernel"] - stack["layers"]["kernel"]
    for index in range(3):
        expected = agreed(moves[0][index], moves[1][index])
        np.testing.assert_allclose(change[index], expected, atol=TOLERANCE)


def test_a_convolution_is_merged_over_its_patches():
    params = {"Conv_0": {"kernel": draw(3, 3, 4, 10), "bias": jnp.zeros(10)}}
    moves = [jax.tree.map(lambda p: draw(*p.shape, seed=seed), params) for seed in (1, 2)]  # noqa: B023
    optimizer, moved = agree(2, start=2), params
    state = optimizer.init(params)
    for move in moves:
        updates, state = optimizer.update(move, state, moved)
        moved = optax.apply_updates(moved, updates)
    change = moved["Conv_0"]["kernel"] - params["Conv_0"]["kernel"]
    flat = [move["Conv_0"]["kernel"].reshape(36, 10) for move in moves]
    np.testing.assert_allclose(change.reshape(36, 10), agreed(*flat), atol=TOLERANCE)
    np.testing.assert_allclose(
        moved["Conv_0"]["bias"], moves[0]["Conv_0"]["bias"] + moves[1]["Conv_0"]["bias"], atol=1e-6
    )


def test_a_kernel_that_is_not_finite_passes_and_spoils_no_other():
    optimizer, params = agree(2, start=2), make_params()
    state = optimizer.init(params)
    bad = gradients_at(0)
    bad["b"]["kernel"] = bad["b"]["kernel"].at[0, 0].set(jnp.nan)
    updates, state = optimizer.update(bad, state, params)
    moved = optax.apply_updates(params, updates)
    updates, state = optimizer.update(gradients_at(1), state, moved)
    assert_same_bits(updates["b"], gradients_at(1)["b"])
    expected = agreed(gradients_at(0)["a"]["kernel"], gradients_at(1)["a"]["kernel"])
    change = moved["a"]["kernel"] + updates["a"]["kernel"] - params["a"]["kernel"]
    np.testing.assert_allclose(change, expected, atol=TOLERANCE)
    assert rmtjax.metrics(state)["kept/b/kernel"] == 1


def test_masked_and_partition_merge_their_share():
    plain = run(optax.chain(optax.sgd(0.1), agree(2, start=2)), 2)[2]
    mask = {"a": True, "b": False}
    for optimizer in (
        optax.chain(optax.sgd(0.1), optax.masked(agree(2, start=2), mask)),
        optax.partition(
            {True: optax.chain(optax.sgd(0.1), agree(2, start=2)), False: optax.sgd(0.1)}, mask
        ),
    ):
        params, state = run(optimizer, 2)[2]
        assert_close(params["a"], plain[0]["a"])
        assert_close(params["b"], run(optax.sgd(0.1), 2)[2][0]["b"])
        assert {name.partition("/")[2] for name in rmtjax.metrics(state)} == {"a/kernel"}


@pytest.mark.slow
def test_multi_steps_and_skipped_steps_are_not_steps():
    many = optax.MultiSteps(optax.chain(optax.sgd(0.1), agree(2, start=2)), 2)
    history = run(many, 4)
    first, moves = kernels(history[0][0]), []
    for seed in (0, 2):
        mean = jax.tree.map(
            lambda g, h: -0.05 * (g + h), gradients_at(seed), gradients_at(seed + 1)
        )
        moves.append(kernels(mean))
    for path, kernel in kernels(history[4][0]).items():
        change = agreed(moves[0][path], moves[1][path])
        np.testing.assert_allclose(kernel - first[path], change, atol=TOLERANCE)
    finite, params = optax.apply_if_finite(agree(2), 5), make_params()
    state = finite.init(params)
    _, state = finite.update(optax.tree.scale(jnp.nan, gradients_at(0)), state, params)
    assert int(state.inner_state.step) == 0


def test_inject_hyperparams_changes_nothing_and_can_be_changed():
    static = ("where", "axes")
    injected = optax.inject_hyperparams(agree, static_args=static)(4, start=4, rest=0.1)
    plain, wrapped = run(agree(4, start=4, rest=0.1), 4), run(injected, 4)
    assert_close((wrapped[4][0], wrapped[4][1].inner_state), plain[4])
    assert describe(wrapped[1][1]) == describe(wrapped[4][1])
    scheduled = optax.linear_schedule(1.0, 0.0, 6)  # 0.5 before the fourth step
    expected = run(agree(4, start=4, rest=0.5), 4)[4][0]
    for optimizer in (
        agree(4, start=4, rest=scheduled),
        optax.inject_hyperparams(agree, static_args=static)(4, start=4, rest=scheduled),
    ):
        assert_close(run(optimizer, 4)[4][0], expected)


@pytest.mark.slow
def test_scan_is_the_loop_and_nothing_is_compiled_again():
    optimizer, traces = optax.chain(optax.adam(1e-2), agree(4, start=4)), []

    def step(carry, gradients):
        traces.append(1)
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    history = run(optimizer, 8)
    start = (make_params(), optimizer.init(make_params()))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(gradients_at, range(8)))
    end, _ = jax.jit(functools.partial(jax.lax.scan, step))(start, stacked)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=TOLERANCE), end[0], history[8][0]
    )
    compiled, traced = jax.jit(step), len(traces)
    carry = start
    for seed in range(5):
        carry, _ = compiled(carry, gradients_at(seed))
        assert describe(carry[1]) == describe(start[1])
    assert len(traces) == traced + 1


@pytest.mark.slow
def test_vmap_over_an_ensemble():
    optimizer = agree(2, start=2)
    members = [jax.tree.map(lambda leaf: factor * leaf, make_params()) for factor in (1.0, 2.0)]  # noqa: B023
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    params = stack(members)
    state = jax.vmap(optimizer.init)(params)
    for seeds in ((0, 1), (2, 3)):
        moves = stack([gradients_at(seed) for seed in seeds])
        updates, state = jax.vmap(optimizer.update)(moves, state, params)
        params = optax.apply_updates(params, updates)
    for index, seeds in enumerate(((0, 2), (1, 3))):
        first, second = (gradients_at(seed)["a"]["kernel"] for seed in seeds)
        change = params["a"]["kernel"][index] - members[index]["a"]["kernel"]
        np.testing.assert_allclose(change, agreed(first, second), atol=TOLERANCE)


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
    wide = "float64" in (dtype, update_dtype)
    with jax.enable_x64(wide):
        params = {"kernel": draw(12, 20).astype(dtype)}
        moves = [{"kernel": draw(12, 20, seed=s).astype(update_dtype)} for s in (1, 2)]
        optimizer, moved = agree(2, start=2), params
        with jax.numpy_dtype_promotion("strict"):
            state = optimizer.init(params)
        for move in moves:
            with jax.numpy_dtype_promotion("strict"):
                updates, later = optimizer.update(move, state, moved)
            assert updates["kernel"].dtype == update_dtype
            assert describe(later) == describe(state)
            moved, state = optax.apply_updates(moved, updates), later
        change = np.asarray(moved["kernel"] - params["kernel"], np.float64)
        expected = agreed(moves[0]["kernel"], moves[1]["kernel"])
        # Numbers up to 4 are rounded four times.
        bits = max(float(jnp.finfo(dtype).eps), float(jnp.finfo(update_dtype).eps))
        np.testing.assert_allclose(change, expected, atol=max(TOLERANCE, 16 * bits))


def test_state_is_donated_saved_shaped_and_mapped():
    optimizer = optax.chain(optax.adam(1e-2), agree(4, start=4))
    donate = functools.partial(jax.jit, donate_argnums=(0, 1))
    plain, donated = run(optimizer, 5, jax.jit), run(optimizer, 5, donate)
    assert_same_bits(donated[5], plain[5])
    state = optimizer.init(make_params())
    assert isinstance(state[1], AgreeState)
    assert_same_bits(jax.jit(optimizer.init)(make_params()), state)
    shapes = jax.eval_shape(optimizer.init, make_params())
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    params, state = plain[3]
    saved = jax.tree.map(np.asarray, state)
    update = optimizer.update
    expected = update(gradients_at(3), state, params)
    assert_same_bits(update(gradients_at(3), saved, params), expected)


def test_train_state_and_the_optimizer_of_nnx_land_on_the_same():
    from flax import nnx

    make = lambda: optax.chain(optax.sgd(0.1), agree(2, start=2))
    model = nnx.Linear(24, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    params = {name: jnp.copy(getattr(model, name)[...]) for name in ("kernel", "bias")}
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=make())
    for seed in (0, 1):
        gradients = {"kernel": draw(24, 16, seed=seed), "bias": draw(16, seed=seed)}
        state = state.apply_gradients(grads=gradients)
        update_nnx(optimizer, model, nnx.State({k: nnx.Param(v) for k, v in gradients.items()}))
    np.testing.assert_allclose(model.kernel[...], state.params["kernel"], atol=1e-6)
    change = state.params["kernel"] - params["kernel"]
    expected = agreed(-0.1 * draw(24, 16), -0.1 * draw(24, 16, seed=1))
    np.testing.assert_allclose(change, expected, atol=TOLERANCE)
    found = rmtjax.metrics(optimizer.opt_state)
    assert found.keys() == {"kept/kernel", "effective_rank/kernel"}


def test_the_state_outlives_factors():
    params = {"a": {"kernel": draw(60, 80)}}
    optimizer = optax.chain(optax.trace(0.9), agree(2))
    state = optimizer.init(params)
    thin = rmtjax.factorize(params, rmtjax.plan(params, rule=rmtjax.ranks.fixed(8)))
    moved = rmtjax.transfer_opt_state(state, params, thin)
    assert_same_bits(moved[1], state[1])
    updates, _ = optimizer.update(thin, moved, thin)
    assert_same_bits(updates, thin)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every", 1),
        ("every", 2.5),
        ("every", True),
        ("start", -1),
        ("rest", -0.1),
        ("rest", 1.1),
        ("rest", float("nan")),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be .* got {value}"):
        UNCHECKED(**{"every": 2, name: value})


def test_start_must_leave_room_for_a_period():
    with pytest.raises(ValueError, match=r"`start` must be 0 or at least `every`, 10, got 5"):
        agree(10, start=5)


def test_a_period_in_which_a_kernel_rests_passes_unmerged():
    params, optimizer = {"a": {"kernel": draw(12, 20)}}, agree(4, start=4)
    state, merged = optimizer.init(params), []
    for step in range(16):
        rests = 5 <= step < 7
        updates = {"a": {"kernel": None if rests else draw(12, 20, seed=step)}}
        landed, state = optimizer.update(updates, state, params)
        if rests:
            continue
        merged.append(bool((landed["a"]["kernel"] != updates["a"]["kernel"]).any()))
        params = optax.apply_updates(params, landed)
    assert [step for step, done in enumerate(merged) if done] == [3, 9, 13]  # not 7, two less
