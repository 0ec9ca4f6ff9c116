"""`prune_spectrum`: what lands, at which steps, and at which rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.linen_checks import Fixed
from helpers.transform_checks import (
    assert_same_bits,
    ATOL,
    perturbation,
    planted,
    prune_once,
    SHAPE,
    truncated,
)

import rmtjax
from rmtjax import KernelAxes, prune_spectrum, ranks


@pytest.mark.parametrize(
    ("wrap", "dtype", "update_dtype"),
    [
        (lambda f: f, "float32", "float32"),
        (jax.jit, "float32", "float32"),
        (lambda f: f, "bfloat16", "bfloat16"),
        (lambda f: f, "bfloat16", "float32"),
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


@pytest.mark.slow
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
    pruned, state = optimizer.update(updates, optimizer.init(params), params)
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
    optimizer = prune_spectrum(every, start=start, rule=Fixed(3))
    update = optimizer.update
    state, seen = optimizer.init(params), []
    for step in range(1, 11):
        updates, state = update({"kernel": jnp.zeros(SHAPE)}, state, params)
        assert int(state.step) == step
        if updates["kernel"].any():
            seen.append(step)
    assert seen == list(expected)


def test_keep_may_be_a_schedule_of_the_step():
    params = {"kernel": planted()}
    optimizer = prune_spectrum(1, keep=optax.linear_schedule(1.0, 0.0, 4), rule=Fixed(3))
    update, state, seen = optimizer.update, optimizer.init(params), []
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
    assert state.fits["kernel"].threshold > 0


def test_where_and_min_size_choose_the_kernels():
    params = {"a": {"kernel": planted(), "w": planted()}, "b": {"w": planted(shape=(40, 96))}}
    chosen = {"where": lambda path, leaf: path.endswith("/w") and leaf.ndim == 2}
    chosen |= {"rule": Fixed(3)}
    _, state = prune_once(params, **chosen)
    assert list(state.ranks) == ["a/w"]
    pruned, state = prune_once(params, min_size=40, **chosen)
    assert {path: int(rank) for path, rank in state.ranks.items()} == {"a/w": 3, "b/w": 3}
    assert_same_bits(pruned["a"]["kernel"], params["a"]["kernel"])


@pytest.mark.parametrize("batch", [0, pytest.param(2, marks=pytest.mark.slow)])
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
    # The other projections, and a bias of one axis, prove that it is not a stack.
    params = {n: {"kernel": jnp.ones((96, 4, 16))} for n in ("query", "key", "value")}
    params["out"] = {"kernel": jnp.ones((4, 16, 96)), "bias": jnp.ones(96)}
    params[path] = params.get(path, {}) | {"kernel": matrix.reshape(shape)}
    params[path]["bias"] = jnp.ones((4, 16) if path == "query" else 96)
    where = lambda name, _: name == f"{path}/kernel"
    params, state = prune_once(params, rule=Fixed(3), where=where)
    lower = params[path]["kernel"]
    assert lower.shape == shape
    np.testing.assert_allclose(lower.reshape(matrix_shape), truncated(matrix, 3), atol=ATOL)
    assert int(state.ranks[f"{path}/kernel"]) == 3
