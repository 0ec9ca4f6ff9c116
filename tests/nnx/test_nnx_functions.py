"""Models of `flax.nnx` as trees and back: what changes, and what does not."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.linen_checks import Fixed
from helpers.nnx_checks import by_path, make_random, rank_plan
from helpers.nnx_models import make_thin, Net, net, X

import rmtjax
from rmtjax import nnx as rmt_nnx


def arrays(model, kind=nnx.Variable):
    """The arrays of a model by path, keys of random numbers as numbers."""
    raw = lambda leaf: (
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )
    leaves = by_path(nnx.to_pure_dict(nnx.state(model, kind)))
    return {path: raw(leaf) for path, leaf in leaves.items()}


def assert_same(one, other):
    one, other = arrays(one), arrays(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def test_the_tree_has_the_names_of_the_model_and_one_entry_for_what_is_shared():
    model = net()
    tree = rmt_nnx.params(model)
    assert tree.keys() == {"first" if "first" in tree else "again", "blocks", "norm"}
    assert tree["blocks"]["layers"][1]["bias"] is arrays(model)["blocks/layers/1/bias"]
    report = rmt_nnx.analyze(model, min_size=2)
    assert len(report.rows) == 3
    assert {row.path for row in report.rows} == rmt_nnx.kernel_axes(model).keys()


def test_the_given_model_stays_and_arrays_are_shared():
    model = net()
    before, graphdef = arrays(model), nnx.graphdef(model)
    path = "blocks/layers/0/kernel"
    plan = rmtjax.Plan({path: rank_plan(model, 4)[path]})
    others = [
        rmt_nnx.truncate(model, plan),
        rmt_nnx.factorize(model, plan),
        rmt_nnx.merge(model),
        rmt_nnx.replace(model, rmt_nnx.params(model)),
    ]
    after = arrays(model)
    assert nnx.graphdef(model) == graphdef
    assert before.keys() == after.keys()
    assert all(before[path] is after[path] for path in before if "key" not in path.split("/"))
    for other in others:
        assert arrays(other)["blocks/layers/1/kernel"] is before["blocks/layers/1/kernel"]
        assert other.first is other.again is not model.first


def test_what_is_shared_stays_shared_and_what_has_a_state_keeps_it():
    model = net()
    model(X)  # moves the statistics and the count of random numbers
    thin = make_thin(model)
    assert thin.first is thin.again
    assert type(thin.first).__name__ == "ThinLinear"
    assert isinstance(thin.blocks.layers[1], nnx.Linear)
    for kind in (nnx.BatchStat, nnx.RngState):
        one, other = arrays(model, kind), arrays(thin, kind)
        assert one
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[path], other[path]) for path in one)
    lower = rmt_nnx.truncate(model, rank_plan(model, 4))
    # The same units are dropped, as the count is the same. Some dozen roundings in float32.
    expected = lower(X)
    np.testing.assert_allclose(thin(X), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for kind in (nnx.BatchStat, nnx.RngState):
        one, other = arrays(lower, kind), arrays(thin, kind)
        assert all(np.allclose(one[path], other[path], atol=1e-5) for path in one)


def test_a_thin_model_splits_merges_clones_and_is_restored():
    thin = make_thin(net())
    thin.eval()
    expected = thin(X)
    graphdef, state = nnx.split(thin)
    for other in (nnx.merge(graphdef, state), nnx.clone(thin)):
        assert other.first is other.again
        np.testing.assert_array_equal(other(X), expected)
    other = make_thin(Net(nnx.Rngs(1)))
    other.eval()
    assert nnx.graphdef(other) == graphdef
    nnx.update(other, state)
    np.testing.assert_array_equal(other(X), expected)
    assert "ThinLinear" in repr(thin)
    # nnx.jit, which compiles the two models once: they differ in their arrays alone.
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(x)
        return model(x)

    np.testing.assert_allclose(run(thin, X), expected, atol=1e-5)
    np.testing.assert_allclose(run(other, X), expected, atol=1e-5)
    assert len(traces) == 1


def test_parameters_are_restored_into_a_model_that_was_never_filled():
    thin = make_thin(net())
    empty = nnx.eval_shape(net)
    restored = rmt_nnx.replace(empty, rmt_nnx.params(thin))
    assert nnx.graphdef(restored) == nnx.graphdef(thin)
    assert_same_params = arrays(thin, nnx.Param), arrays(restored, nnx.Param)
    assert all(
        np.array_equal(*(side[path] for side in assert_same_params))
        for path in assert_same_params[0]
    )


def test_merge_and_a_dense_tree_bring_the_layers_back():
    model = net()
    thin = make_thin(model)
    merged, restored = rmt_nnx.merge(thin), rmt_nnx.replace(thin, rmt_nnx.params(model))
    assert nnx.graphdef(merged) == nnx.graphdef(restored) == nnx.graphdef(model)
    assert_same(restored, model)
    for model in (merged, thin):
        model.eval()
    np.testing.assert_allclose(merged(X), thin(X), atol=1e-5)


def test_a_thin_model_is_cut_again_by_the_same_noise():
    keys = jax.random.split(jax.random.key(3), 3)
    signal = jax.random.normal(keys[0], (80, 3)) @ jax.random.normal(keys[1], (3, 60))
    model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
    tree = rmt_nnx.params(model)
    tree["kernel"] = signal + jax.random.normal(keys[2], (80, 60)) / 10
    model = rmt_nnx.replace(model, tree)
    plan = rmt_nnx.plan(model, multiple=8)
    thin = rmt_nnx.factorize(model, plan)
    again = rmt_nnx.plan(thin, fits={"kernel": plan["kernel"].fit}, multiple=1)
    assert again["kernel"].reason == "factorized again: 3 of 8 are signal, rank 3"
    thinner = rmt_nnx.factorize(thin, again)
    assert thinner.left_factor.kernel.shape == (80, 3)
    # Eckart and Young: the best of rank 3, by whatever way.
    expected = rmtjax.truncate_matrix(tree["kernel"], 3)
    np.testing.assert_allclose(rmt_nnx.merge(thinner).kernel[...], expected, atol=1e-4)


@pytest.mark.slow
def test_gates_apart_have_directions_of_their_own():
    cell = nnx.OptimizedLSTMCell(10, 12, rngs=nnx.Rngs(0))
    plans = [rank_plan(cell, 4, gates=gates) for gates in ("fused", "each")]
    assert [plan["dense_h/kernel"].shape for plan in plans] == [(12, 48), (4, 12, 12)]
    fused, each = (rmt_nnx.factorize(cell, plan) for plan in plans)
    assert fused.dense_h.left_factor.kernel.shape == (12, 4)
    assert each.dense_h.left_factor.kernel.shape == (12, 4, 4)
    assert each.dense_h.right_factor.kernel.shape == (4, 4, 12)
    kernel = rmt_nnx.truncate(cell, plans[1]).dense_h.kernel[...]
    for gate in (slice(12 * i, 12 * i + 12) for i in range(4)):
        expected = rmtjax.truncate_matrix(cell.dense_h.kernel[...][:, gate], 4)
        np.testing.assert_allclose(kernel[:, gate], expected, atol=1e-5)
    assert rmt_nnx.analyze(cell, gates="each").rows[0].shape == (4, 12, 12)
    again = rmt_nnx.plan(each, rule=Fixed(2), multiple=1, min_size=2)
    thinner = rmt_nnx.factorize(each, again)
    assert thinner.dense_h.right_factor.kernel.shape == (4, 2, 12)


def test_gates_apart_of_a_model_that_was_never_filled_are_fused_again():
    cell = nnx.eval_shape(lambda: nnx.GRUCell(10, 12, rngs=nnx.Rngs(0)))
    tree = rmt_nnx.params(cell, gates="each")
    assert tree["dense_i"]["kernel"].shape == (3, 10, 12)
    again = rmt_nnx.replace(cell, tree)
    assert rmt_nnx.params(again)["dense_i"]["kernel"] == rmt_nnx.params(cell)["dense_i"]["kernel"]


def test_a_stack_of_cells_has_fused_gates():
    # The stack is one more axis, as separate gates would be.
    cells = nnx.split_rngs(splits=4)(
        nnx.vmap(lambda rngs: nnx.OptimizedLSTMCell(10, 12, rngs=rngs))
    )
    stack = make_thin(make_random(lambda: cells(nnx.Rngs(0))))
    assert stack.dense_i.right_factor.kernel.shape == (4, 4, 48)


@pytest.mark.parametrize("name", ["plan", "analyze"])
def test_options_are_those_of_the_functions_for_trees(name):
    of_models, of_trees = (
        [(key, option.default) for key, option in inspect.signature(function).parameters.items()]
        for function in (getattr(rmt_nnx, name), getattr(rmtjax, name))
    )
    assert of_models[:2] == [("model", inspect.Parameter.empty), ("gates", "fused")]
    assert of_models[2:] == of_trees[1:]
