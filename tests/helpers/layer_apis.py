"""A case of `layer_cases` through the functions for trees and linen, or through those for nnx."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmtjax
from helpers.layer_cases import MASK
from helpers.linen_checks import EXACT, Fixed, make_variables, RANK
from helpers.nnx_checks import make_random
from rmtjax import linen, nnx as rmt_nnx
from rmtjax._axes import is_factors

CAPABILITIES = ("analyze", "truncate", "factorize", "train on", "save")
OPTIONS = {"rule": Fixed(RANK), "min_size": 1}
MOMENTUM = optax.sgd(1e-3, momentum=0.9)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors)
    return {jax.tree_util.keystr(key, simple=True, separator="/"): leaf for key, leaf in leaves}


def assert_close(tree, other):
    """Equal up to products of float32 in another order, relative to the largest entry of all."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    leaves, others = (jax.tree.map(np.asarray, jax.tree.leaves(one)) for one in (tree, other))
    largest = max(np.abs(leaf).max() for leaf in others)
    for one, wanted in zip(leaves, others, strict=True):
        np.testing.assert_allclose(one, wanted, rtol=0, atol=EXACT * largest)


def loss_of(outputs):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs)), outputs


class Layer:
    """What the tests of one case share: a model, its plan, and what becomes of it."""

    def __init__(self, case):
        self.inputs, self.case, self.found, self.words = case.inputs, case, {}, set()
        self.cells = dict(zip(CAPABILITIES, case.cells, strict=True))
        self.model = self.start()

    @functools.cached_property
    def plan(self):
        return self.analyze().plan

    @functools.cached_property
    def truncated(self):
        return self.truncate(self.model, self.plan)

    @functools.cached_property
    def thin(self):
        return self.factorize(self.model, self.plan)

    @functools.cached_property
    def full(self):
        """Factors of full rank, which are larger than the kernel: no plan has them."""
        rows = {
            path: dataclasses.replace(row, rank=row.spectrum.eigenvalues.shape[-1])
            for path, row in self.plan.items()
            if row.action == "factorize"
        }
        return self.factorize(self.model, rmtjax.Plan(rows))

    def gradients(self, which):
        """Of the `model`, `truncated`, `thin` or `full`: loss, outputs, gradients."""
        if which not in self.found:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.found[which] = self.gradient(getattr(self, which))
            self.words |= {str(warning.message) for warning in caught}
        return self.found[which]


class Linen(Layer):
    """Through `rmtjax` and `rmtjax.linen`."""

    def start(self):
        module, self.truncate, self.factorize = self.case.make(), rmtjax.truncate, rmtjax.factorize
        variables = make_variables(module, *self.inputs)
        self.axes = linen.kernel_axes(module, variables, *self.inputs)
        run = lambda apply: jax.jit(
            jax.value_and_grad(lambda p, x: loss_of(apply({"params": p}, *x)), (0, 1), has_aux=True)
        )
        self.run, self.run_thin = run(module.apply), run(functools.partial(linen.apply, module))
        return variables["params"]

    def analyze(self):
        return rmtjax.analyze(self.model, axes=self.axes, **OPTIONS)

    def tree(self, model):
        return model

    def gradient(self, params):
        thin = any(map(is_factors, by_path(params).values()))
        (loss, outputs), grads = (self.run_thin if thin else self.run)(params, self.inputs)
        return loss, outputs, *grads

    def step(self):
        """A step of an optimizer that has seen the truncated model, in the factors."""
        dense, grads = self.gradients("truncated")[2], self.gradients("thin")[2]
        _, state = MOMENTUM.update(dense, MOMENTUM.init(self.truncated))
        state = rmtjax.transfer_opt_state(state, self.truncated, self.thin)
        # What the factors would have gathered is their own gradient, by the chain rule.
        assert_close(optax.tree.get(state, "trace"), grads)
        updates, _ = MOMENTUM.update(grads, state)
        return optax.apply_updates(self.thin, updates)

    def refill(self, params):
        return params


class Nnx(Layer):
    """Through `rmtjax.nnx`."""

    def start(self):
        self.truncate, self.factorize = rmt_nnx.truncate, rmt_nnx.factorize
        model = make_random(self.case.make)
        for _, node in nnx.iter_graph(model):
            if getattr(node, "mask", None) is not None:  # older Flax has it in no state
                node.mask = MASK
        return model

    def analyze(self):
        return rmt_nnx.analyze(self.model, gates=self.case.gates, **OPTIONS)

    def tree(self, model):
        return rmt_nnx.params(model, gates=self.case.gates)

    def gradient(self, model):
        (loss, outputs), (grads, of_inputs) = run_nnx(model, self.inputs)
        self.raw = grads  # as the optimizer takes it
        held = nnx.clone(model)
        nnx.update(held, grads)
        return loss, outputs, self.tree(held), of_inputs

    def step(self):
        self.gradient(self.thin)
        model = nnx.clone(self.thin)
        optimizer = nnx.Optimizer(model, MOMENTUM, wrt=self.case.wrt)
        grads = nnx.filter_state(self.raw, self.case.wrt)
        if hasattr(optimizer, "model"):  # older Flax
            optimizer.update(grads)
        else:
            optimizer.update(model, grads)
        return model

    def refill(self, params):
        return rmt_nnx.replace(self.model, params)


@nnx.jit
def run_nnx(model, inputs):
    loss = lambda model, inputs: loss_of(model(*inputs))
    return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, inputs)
