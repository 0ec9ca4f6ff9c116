"""Every tree that optax takes: our transforms find its kernels, and pass everything else on."""

from collections import namedtuple
from dataclasses import dataclass

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.linen_checks import Fixed
from helpers.transform_checks import assert_same_bits, ATOL, planted, truncated

from rmtjax import (
    admm,
    agree,
    average_params,
    drop_and_grow,
    factorize_matrix,
    lowrank,
    monitor,
    penalty,
    prune_entries,
    prune_spectrum,
    sparsity,
)

KERNEL, BIAS = planted(), jnp.ones(96)
TRANSFORMS = {
    # Without a fit, which compiles for long.
    "spectrum": lambda **options: prune_spectrum(1, rule=Fixed(3), **options),
    "entries": lambda **options: prune_entries(every=1, sparsity=0.5, **options),
    "admm": lambda **options: admm(lambda kernel: jnp.round(kernel), rho=0.5, **options),
    "exchange": lambda **options: drop_and_grow(
        optax.identity(), every=1, density=0.5, drop=0.0, **options
    ),
}
EACH = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


Pair = namedtuple("Pair", ["weight", "bias"])
# The tree, and the path of its kernel.
TREES = {
    "array": (KERNEL, ""),
    "list": ([BIAS, [KERNEL]], "1/0"),
    "tuple": ((KERNEL, BIAS), "0"),
    "NamedTuple": (Pair(KERNEL, BIAS), "weight"),
    "None": ({"gone": None, "w": KERNEL}, "w"),
    "scalars": ({"w": KERNEL, "scale": 1.0, "count": 3, "rate": np.float32(1)}, "w"),
    "FrozenDict": (flax.core.freeze({"a": {"kernel": KERNEL, "bias": BIAS}}), "a/kernel"),
    "outer": ({"params": {"a": {"kernel": KERNEL}}, "stats": {"mean": BIAS}}, "params/a/kernel"),
    "dataclass": ({"layer": Layer(KERNEL, BIAS)}, "layer/kernel"),
    "State": (nnx.State({"a": {"kernel": nnx.Param(KERNEL), "bias": nnx.Param(BIAS)}}), "a/kernel"),
    "same names": ({"a": {"b": BIAS}, "a/b": BIAS, "w": KERNEL}, "w"),
}


def paths_of(state):
    state = getattr(state, "sparse", state)
    fields = [name for name in ("ranks", "masks", "targets") if hasattr(state, name)]
    return list(getattr(state, fields[0]))


@EACH
@pytest.mark.parametrize(("params", "path"), TREES.values(), ids=TREES)
def test_a_kernel_is_pruned_in_any_tree_and_nothing_else_is_changed(make, params, path):
    optimizer = make(where=lambda name, leaf: name == path)
    gradients = jax.tree.map(lambda leaf: 0 * jnp.asarray(leaf), params)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert paths_of(state) == [path]
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    changed = [leaf for leaf in jax.tree.leaves(updates) if jnp.any(leaf != 0)]
    assert [leaf.shape for leaf in changed] == [KERNEL.shape]
    landed = KERNEL + changed[0]
    if hasattr(state, "ranks"):
        np.testing.assert_allclose(landed, truncated(KERNEL), atol=ATOL)
    elif hasattr(state, "targets"):
        np.testing.assert_allclose(changed[0], 0.5 * (KERNEL - jnp.round(KERNEL)), atol=1e-6)
    else:
        expected = sparsity.magnitude_mask({"kernel": KERNEL}, 0.5)["kernel"]
        expected = state.sparse.masks[path] if hasattr(state, "sparse") else expected
        assert_same_bits(landed, jnp.where(expected, KERNEL, 0))


PASSING = {
    "array": KERNEL,
    "scalar": jnp.float32(1),
    "number": 1.0,
    "list": [KERNEL, BIAS],
    "empty": {},
    "None": None,
    "vector": {"bias": BIAS},
    "integers": {"kernel": jnp.ones((64, 96), jnp.int32)},
    "8 bits": {"kernel": jnp.ones((64, 96), "float8_e4m3fn")},
    "factors": {"kernel": factorize_matrix(KERNEL, 60)},
}


IDLE = pytest.mark.filterwarnings("ignore:.*will never change a kernel")


@IDLE
@EACH
@pytest.mark.parametrize("params", [v for v in PASSING.values() if v is not None])
def test_a_tree_without_kernels_passes(make, params):
    optimizer = make()
    updates, state = optimizer.update(params, optimizer.init(params), params)
    same = jax.tree.map(lambda new, old: new is old, updates, params)
    assert jax.tree.all(same)
    assert paths_of(state) == []
    assert int(getattr(state, "sparse", state).step) == 1


@IDLE
@EACH
@pytest.mark.parametrize("name", ["8 bits", "factors", "integers"])
def test_what_has_no_kernel_in_it_is_not_chosen_by_where(make, name):
    assert paths_of(make(where=lambda *_: True).init(PASSING[name])) == []


@IDLE
@EACH
def test_optax_flatten_hides_the_kernels_but_works(make):
    optimizer, params = optax.flatten(make()), {"a": {"kernel": KERNEL}}
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert_same_bits(updates, params)
    assert paths_of(state) == []


MASK = {"a": {"kernel": True, "bias": False}, "b": {"kernel": False}}
WHERES = {
    "function": lambda path, leaf: path.startswith("a/") and leaf.ndim == 2,
    "glob": "a/k*",
    "expression": "re:^a/k",
    "list": ["a/kernel"],
    "mask": MASK,
    "prefix": {"a": MASK["a"], "b": False},
}


@pytest.mark.parametrize("where", WHERES.values(), ids=WHERES)
def test_where_takes_a_function_an_expression_or_a_mask(where):
    params = {"a": {"kernel": KERNEL, "bias": BIAS}, "b": {"kernel": KERNEL}}
    for make in TRANSFORMS.values():
        assert paths_of(make(where=where).init(params)) == ["a/kernel"]
    mask = sparsity.magnitude_mask(params, 0.5, where=where)
    assert (float(mask["a"]["kernel"].mean()), bool(mask["b"]["kernel"].all())) == (0.5, True)
    np.testing.assert_allclose(penalty(params, l1=1.0, where=where), jnp.abs(KERNEL).sum())


@EACH
def test_a_mask_of_another_tree_is_an_error(make):
    with pytest.raises(ValueError, match="`where` must be a tree of booleans with the structure"):
        make(where={"c": True}).init({"a": {"kernel": KERNEL}})


ALL = TRANSFORMS | {
    "halves": lambda: agree(2),
    "tails": lambda: lowrank.shrink_tail(2, strength=0.1),
    "mean": lambda: average_params(),
    "looks": lambda: monitor(2),
    "mean of entries": lambda: average_params(reset_zeros=True),
}
EVERYWHERE = lambda value: lambda tree: jax.tree.map(lambda _: value, tree)
WRAPS = {
    "plain": lambda transform: transform,
    "MultiSteps": lambda transform: optax.MultiSteps(transform, 2),
    "masked": lambda transform: optax.masked(transform, EVERYWHERE(True)),
    "partition": lambda transform: optax.partition({"all": transform}, EVERYWHERE("all")),
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_map_params_sees_moments_and_leaves_the_rest(make, wrap):
    params = {"a": {"kernel": KERNEL, "bias": BIAS}}
    optimizer = wrap(optax.chain(optax.adam(1e-3), make()))
    state = optimizer.init(params)
    same = optax.tree_map_params(optimizer, lambda leaf: leaf, state)
    assert_same_bits(same, state)
    specs = jax.tree.map(lambda _: "spec", params)
    arguments = optimizer, lambda _, spec: spec, state, specs
    mapped = optax.tree_map_params(*arguments, transform_non_params=lambda _: None)
    assert optax.tree.get(mapped, "mu") == specs
    assert set(jax.tree.leaves(mapped)) == {"spec"}


@EACH
def test_a_kernel_that_is_new_to_the_state_is_an_error(make):
    params = {"a": {"kernel": KERNEL}}
    grown = params | {"c": {"kernel": KERNEL}}
    optimizer = make()
    with pytest.raises(ValueError, match=r"has the kernel 'c/kernel'.* `optimizer.init\(params\)`"):
        optimizer.update(grown, optimizer.init(params), grown)


def test_a_group_of_a_partition_may_have_none_that_a_pattern_matches():
    params = {"a": {"kernel": jnp.ones((60, 80))}, "b": {"kernel": jnp.ones((60, 80))}}
    prune = prune_spectrum(every=1, where="a/*")
    tx = optax.partition({"x": prune, "y": optax.sgd(0.1)}, {"a": "y", "b": "x"})
    with pytest.warns(UserWarning, match="`prune_spectrum` will never"):
        tx.init(params)
