"""States and metrics are finite from `init` on: checks of NaN and infinity find nothing."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.nnx_checks import update
from helpers.transform_checks import planted

import rmtjax
from rmtjax import nnx as rmt_nnx

PARAMS = {name: {"kernel": planted(seed)} for seed, name in enumerate("abcdef")}


def loss(params):
    """Each kernel is drawn to the double of where it starts."""
    apart = lambda name: jnp.mean(jnp.square(params[name]["kernel"] - 2 * PARAMS[name]["kernel"]))
    return sum(map(apart, PARAMS), jnp.zeros(()))


def everything(max_rise):
    """All transforms in one chain, each with its kernel."""

    def at(name) -> Any:
        return {"where": f"{name}/*"}

    chain = optax.chain(
        rmtjax.admm(lambda kernel: jnp.sign(kernel), every=2, start=2, **at("a")),
        optax.sgd(0.1, 0.9),
        rmtjax.monitor(2, start=2, shuffles=1, **at("a")),
        rmtjax.agree(2, start=2, **at("b")),
        rmtjax.lowrank.shrink_tail(2, strength=0.1, **at("c")),
        rmtjax.prune_entries(0.5, every=2, **at("d")),
        rmtjax.prune_spectrum(2, max_rise=max_rise, **at("e")),
        rmtjax.average_params(1),
    )
    return rmtjax.drop_and_grow(chain, 2, density=0.5, **at("f"))


@contextlib.contextmanager
def checked():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@checked()
def test_a_state_is_finite_before_the_first_step():
    state = everything(0.5).init(PARAMS)
    assert_finite((state, rmtjax.metrics(state), rmtjax.noise_levels(state)))
    assert rmtjax.metrics(state)["threshold/e/kernel"] == 0


@pytest.mark.slow
@checked()
def test_every_state_and_what_is_read_from_it_is_finite(tmp_path):
    optimizer, params = everything(0.5), PARAMS
    read = lambda state: (rmtjax.metrics(state), rmtjax.noise_levels(state))

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params, value_fn=loss, value=value)
        return optax.apply_updates(params, updates), state, read(state)

    state = optimizer.init(params)
    found = jax.jit(read)(state)
    assert_finite((state, found))
    for _ in range(4):
        params, state, found = step(params, state)
        assert_finite((state, found))
    numbers, levels = found
    # Both halves move the same way, so that all is kept but for rounding.
    np.testing.assert_allclose(numbers["kept/b/kernel"], 1, rtol=1e-5)
    assert numbers["rank/e/kernel"] == numbers["cut/c/kernel"] == 3
    assert numbers["primal/a/kernel"] != 1
    assert numbers["moved/f/kernel"] > 0
    # What is known goes on in plans and files.
    plan = rmtjax.plan(params, fits=levels, multiple=1)
    assert plan["e/kernel"].rank == 3
    rmtjax.checkpoint.save(tmp_path / "a.safetensors", rmtjax.factorize(params, plan), plan)
    restored = rmtjax.checkpoint.restore(tmp_path / "a.safetensors")
    np.testing.assert_allclose(
        rmtjax.merge(restored)["e"]["kernel"], params["e"]["kernel"], atol=1e-5
    )


@pytest.mark.slow
@checked()
def test_a_cut_that_must_not_be_made_leaves_a_finite_state():
    params = {"e": PARAMS["e"]}
    entry = lambda params: params["e"]["kernel"][0, 0]
    broken = lambda moved: jnp.where(entry(moved) == entry(params), 1.0, jnp.inf)
    optimizer, zeros = rmtjax.prune_spectrum(1, max_removed=1.0), optax.tree.zeros_like(params)
    step = jax.jit(lambda state: optimizer.update(zeros, state, params, value_fn=broken)[1])
    state = optimizer.init(params)
    for _ in range(2):
        state = step(state)
        assert_finite((state, rmtjax.noise_levels(state)))
    assert rmtjax.noise_levels(state)["e/kernel"].threshold == -1
    plan = rmtjax.plan(params, fits=rmtjax.noise_levels(state))
    assert "pruning left it alone" in plan["e/kernel"].reason


class Net(nnx.Module):
    """The same kernels as layers."""

    def __init__(self):
        for name in PARAMS:
            layer = nnx.Linear(64, 96, use_bias=False, rngs=nnx.Rngs(0))
            layer.kernel[...] = PARAMS[name]["kernel"]
            setattr(self, name, layer)


@pytest.mark.slow
@checked()
def test_the_same_holds_for_nnx():
    model = Net()
    optimizer = nnx.Optimizer(model, everything(None), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(lambda model: loss(rmt_nnx.params(model)))(model)
        update(optimizer, model, gradient)
        return rmtjax.metrics(optimizer.opt_state), rmtjax.noise_levels(optimizer.opt_state)

    numbers, levels = step(model, optimizer)
    for _ in range(3):
        numbers, levels = step(model, optimizer)
        assert_finite((nnx.state(optimizer), numbers, levels))
    assert numbers["rank/e/kernel"] == numbers["cut/c/kernel"] == 3
    assert rmt_nnx.plan(model, fits=levels, multiple=1)["e/kernel"].rank == 3
