"""JAX's modes: what a user has switched on changes no result and breaks nothing."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.slow import slow_except

import rmtjax
from rmtjax import ranks
from rmtjax._axes import native

KERNEL = (np.random.default_rng(0).normal(size=(60, 50)) + 0.5).astype(np.float32)
PARAMS = {"a": {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(50)}}
THIN = rmtjax.factorize(PARAMS, rmtjax.plan(PARAMS, rule=ranks.fixed(4), multiple=1))
REPLICAS = [PARAMS, jax.tree.map(lambda leaf: 2 * leaf, PARAMS)]
TRANSFORMS = {
    "prune_spectrum": lambda: rmtjax.prune_spectrum(2, rule=ranks.fixed(4)),
    "prune_entries": lambda: rmtjax.prune_entries(0.5, every=2),
    "agree": lambda: rmtjax.agree(2),
    "others": lambda: rmtjax.drop_and_grow(
        optax.chain(
            rmtjax.admm(jnp.sign, every=2),
            rmtjax.lowrank.shrink_tail(2, strength=0.1, rule=ranks.fixed(4)),
            rmtjax.average_params(1),
            rmtjax.monitor(2, shuffles=1),
        ),
        every=2,
        density=0.5,
    ),
}


def train(make):
    """Parameters after some steps, eager and compiled."""
    transform, params = make(), PARAMS
    state, compiled = transform.init(params), jax.jit(transform.update)
    for step in range(4):
        updates = params  # all entries grow to the double
        update = compiled if step % 2 else transform.update
        updates, state = update(updates, state, params)
        params = optax.apply_updates(params, updates)
    return params


def files(folder):
    path, out = folder / "a.safetensors", folder / "b.safetensors"
    rmtjax.checkpoint.save(path, PARAMS, rmtjax.plan(PARAMS))
    rmtjax.checkpoint.compress_file(path, out, multiple=1)
    return rmtjax.merge(rmtjax.checkpoint.restore(out))


def plans(rule):
    plan = rmtjax.plan(PARAMS, rule=rule, multiple=1)
    cut = rmtjax.truncate(PARAMS, plan), rmtjax.merge(rmtjax.factorize(PARAMS, plan))
    return [*(row.rank for row in plan.values()), *cut]


VERBS = {
    "bema": lambda _: plans(ranks.bema()),
    "gavish_donoho": lambda _: plans(ranks.gavish_donoho()),
    "energy": lambda _: plans(ranks.energy(0.5)),
    "shrink": lambda _: rmtjax.truncate(
        PARAMS, rmtjax.plan(PARAMS, shrink=rmtjax.shrinkage.frobenius)
    ),
    "again": lambda _: rmtjax.merge(
        rmtjax.factorize(THIN, rmtjax.plan(THIN, rule=ranks.fixed(2), multiple=1))
    ),
    "spectrum": lambda _: rmtjax.fit_bema(rmtjax.spectrum(KERNEL)),
    "matrix": lambda _: rmtjax.truncate_matrix(KERNEL, 3),
    "penalty": lambda _: rmtjax.penalty(PARAMS, l1=0.1, l2=0.1),
    "mask": lambda _: rmtjax.sparsity.magnitude_mask(PARAMS, 0.5),
    "threshold": lambda _: rmtjax.sparsity.threshold_mask(PARAMS, rmtjax.plan(PARAMS)),
    "replicas": lambda _: rmtjax.merge_replicas(PARAMS, REPLICAS),
    "files": files,
    **{name: lambda _, make=make: train(make) for name, make in TRANSFORMS.items()},
}
MODES = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "NaN": lambda: jax.debug_nans(True),
}
# Most of these compile all programs anew.
SLOW_MODES = {
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "infinity": lambda: jax.debug_infs(True),
    "x64": lambda: jax.enable_x64(True),
    "leaks": jax.checking_leaks,
    "no jit": jax.disable_jit,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What each verb returns without a mode."""
    return {name: verb(tmp_path_factory.mktemp(name)) for name, verb in VERBS.items()}


def assert_same(mode, verb, wanted, folder):
    with mode():
        found = VERBS[verb](folder)
    # Products in another order, or in float64, round otherwise.
    close = lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=2e-3, atol=2e-4
    )
    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_no_result(mode, verb, expected, tmp_path):
    assert_same(MODES[mode], verb, expected[verb], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("mode", SLOW_MODES)
def test_a_slow_mode_changes_no_result(mode, verb, expected, tmp_path):
    assert_same(SLOW_MODES[mode], verb, expected[verb], tmp_path)


def test_modes_are_on_again_after_a_call():
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        stack.enter_context(jax.debug_nans(True))
        rmtjax.spectrum(KERNEL)
        assert jax.config.jax_numpy_dtype_promotion == "strict"
        assert jax.config.jax_debug_nans


SHAPES = jax.eval_shape(lambda: PARAMS)
PLAN = rmtjax.plan(PARAMS, rule=ranks.fixed(4), multiple=1)
BY_SHAPE = {
    "truncate": lambda tree: rmtjax.truncate(tree, PLAN),
    "factorize": lambda tree: rmtjax.factorize(tree, PLAN),
    "merge": rmtjax.merge,
    "replicate": lambda tree: rmtjax.replicate(tree, 3),
    **{name: lambda tree, make=make: make().init(tree) for name, make in TRANSFORMS.items()},
    "shrink_tail": rmtjax.lowrank.shrink_tail(2, strength=0.1).init,
}


@pytest.mark.parametrize("verb", BY_SHAPE.values(), ids=BY_SHAPE)
def test_shapes_give_the_shapes_of_the_result(verb):
    of = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert of(verb(SHAPES)) == of(verb(PARAMS))
    traced = jax.eval_shape(verb, PARAMS)
    assert of(traced) == of(verb(PARAMS))


NEEDS_VALUES = {
    "plan": rmtjax.plan,
    "analyze": rmtjax.analyze,
    "penalty": lambda tree: rmtjax.penalty(tree, l2=1.0),
    "mask": lambda tree: rmtjax.sparsity.magnitude_mask(tree, 0.5),
    "save": lambda tree: rmtjax.checkpoint.save("never.safetensors", tree),
    "spectrum": lambda tree: rmtjax.spectrum(tree["a"]["kernel"]),
    "factorize_matrix": lambda tree: rmtjax.factorize_matrix(tree["a"]["kernel"], 2),
}


@pytest.mark.parametrize("verb", NEEDS_VALUES.values(), ids=NEEDS_VALUES)
def test_shapes_without_values_are_named(verb):
    with pytest.raises(TypeError, match=r"ShapeDtypeStruct|must be annotated|type annotation"):
        verb(SHAPES)


@pytest.mark.parametrize("name", ["plan", "analyze", "save"])
def test_what_decides_on_shapes_says_that_it_needs_values(name):
    with pytest.raises(TypeError, match="outside `jit`"):
        jax.jit(lambda tree: (NEEDS_VALUES[name](tree), 0)[1])(PARAMS)


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble, ">f2"])
def test_other_byte_orders_and_long_doubles_are_read_as_numbers(dtype):
    tree = {"a": {"kernel": KERNEL.astype(dtype), "bias": np.zeros(50, dtype)}}
    plan, wanted = rmtjax.plan(tree, multiple=1), rmtjax.plan(PARAMS, multiple=1)
    assert str(plan) == str(wanted)
    cut = rmtjax.truncate(tree, plan)["a"]
    assert cut["bias"] is tree["a"]["bias"]
    expected = rmtjax.truncate(PARAMS, wanted)["a"]["kernel"]
    np.testing.assert_allclose(cut["kernel"], expected, atol=5e-3 if dtype == ">f2" else 1e-5)
    assert rmtjax.merge_replicas(tree, [tree, tree]).params["a"]["kernel"].shape == (60, 50)
    assert [*rmtjax.prune_spectrum(1).init(tree).ranks] == ["a/kernel"]


ORDER = np.arange(60)[::-1]


def pruned(params):
    """The updates that leave two of each four entries."""
    transform = rmtjax.prune_entries(pattern=(2, 4))
    tree = jax.tree.map(lambda leaf: jnp.asarray(native(leaf)), params)
    return transform.update(tree, transform.init(tree), tree)[0]["kernel"]


def truncated(kernel, rule):
    plan = rmtjax.plan({"kernel": kernel}, rule=rule, min_size=2)
    return rmtjax.truncate({"kernel": kernel}, plan)["kernel"]


OF_ONE_MATRIX = {
    "pooled_spectrum": rmtjax.pooled_spectrum,
    "equalize": lambda kernel: rmtjax.equalize(kernel)[1:3],
    "find_traps": lambda kernel: rmtjax.find_traps(kernel, jax.random.key(0), draws=1).spikes[0][0],
    "tail_sum": lambda kernel: rmtjax.lowrank.tail_sum(kernel, 2),
    "prox_tail": lambda kernel: rmtjax.lowrank.prox_tail(kernel, 2, 0.5),
    "project_rank": lambda kernel: rmtjax.projections.project_rank(kernel, ranks.fixed(2)),
    "project_bits": lambda kernel: rmtjax.projections.project_bits(kernel, 3),
    "operator_norm": rmtjax.certificate.operator_norm,
    "permute": lambda kernel: rmtjax.patterns.permute({"a": kernel}, ORDER, {"a": 0})["a"],
    "pattern": lambda kernel: pruned({"kernel": kernel}),
    "orthogonality": lambda kernel: rmtjax.lowrank.orthogonality(
        rmtjax.lowrank.to_spectral({"kernel": kernel})
    ),
    "equalized": lambda kernel: truncated(kernel, ranks.bema(equalize=True)),
    "replicate": lambda kernel: rmtjax.replicate({"kernel": kernel}, 2)["kernel"],
    "data_path": lambda kernel: rmtjax.certificate.data_path(kernel, kernel / 2, KERNEL[:, :10].T),
}


FAST = ("equalize", "prox_tail", "project_bits", "operator_norm")


@pytest.mark.parametrize("name", slow_except(FAST, OF_ONE_MATRIX))
def test_one_matrix_is_read_in_any_byte_order_on_any_mesh(name):
    small, verb = KERNEL[:, :10], OF_ONE_MATRIX[name]
    wanted = verb(small)
    jax.tree.map(np.testing.assert_array_equal, verb(small.astype(">f4")), wanted)
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=kinds, devices=jax.devices()[:1])
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5)
    jax.tree.map(close, verb(jax.device_put(small, divided)), wanted)


class Scaled(nn.Module):
    """A layer whose product is a module with a variable."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(60, dot_general_cls=nn.Fp8DotGeneralOp)(x)
        return nn.Dense(50)(x)


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated")
def test_a_product_with_variables_runs_merged_and_says_so():
    model, x = Scaled(), jnp.asarray(KERNEL[:4])
    variables = model.init(jax.random.key(0), x)
    plan = rmtjax.plan(variables["params"], rule=ranks.fixed(8))
    thin = rmtjax.factorize(variables["params"], plan)
    with pytest.warns(UserWarning, match="'Dense_0' runs with its factors multiplied out"):
        outputs = rmtjax.linen.apply(model, {**variables, "params": thin}, x)
    merged = model.apply({**variables, "params": rmtjax.merge(thin)}, x)
    np.testing.assert_allclose(outputs, merged, atol=1e-5)
