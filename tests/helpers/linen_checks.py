"""Linen modules of several tests, random and factorized variables, and their comparison."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rmtjax
from rmtjax import BulkFit, linen, ranks

KEY, RANK = jax.random.key(0), 3
RNGS = {"params": KEY, "dropout": KEY}
# Float32 products summed in another order, relative to the largest entry of all.
EXACT = 1e-5
# The hidden values are rounded to bfloat16 once more, by 2^-9 each, and so are the factors.
COARSE = 2**-6


class Fixed(ranks.fixed):
    """Without a noise level, which is not needed here and compiles for long."""

    def fit(self, spectrum, rank=None):
        del rank
        return BulkFit(*[jnp.ones_like(spectrum.ratio)] * 4, num_spikes=jnp.asarray(0, jnp.int32))


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def tokens(*shape):
    return np.random.default_rng(0).integers(0, 40, shape).astype(np.int32)


class Block(nn.Module):
    """A step of `nn.scan`."""

    @nn.compact
    def __call__(self, carry, _):
        return nn.tanh(nn.Dense(24)(carry)), None


DENSE, INPUTS = nn.Dense(24), draw(5, 30)
# Of lifted modules: parameters, and a random key, for each step or copy.
EACH = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
# Of a call in training, with state and randomness.
TRAIN = {"train": True, "mutable": ["batch_stats", "intermediates"], "rngs": {"dropout": KEY}}


def make_variables(module, *args, **kwargs):
    """Random variables. Only their shapes come from the module, so nothing is compiled."""
    rng = np.random.default_rng(0)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("rngs", "mutable")}
    shapes = jax.eval_shape(lambda: module.init(RNGS, *args, **kwargs))
    # Vectors are positive: among them are the variances of BatchNorm.
    numbers = lambda shape: 0.3 * rng.normal(size=shape) if len(shape) > 1 else rng.random(shape)
    return jax.tree.map(lambda leaf: jnp.asarray(numbers(leaf.shape), leaf.dtype), shapes)


def make_thin(module, *args, axes=None, **kwargs):
    """Variables factorized, the same truncated by the same plan, and the plan."""
    variables = make_variables(module, *args, **kwargs)
    axes = linen.kernel_axes(module, variables, *args, **kwargs) if axes is None else axes
    params = variables["params"]
    plan = rmtjax.plan(params, rule=Fixed(RANK), axes=axes, min_size=1, multiple=1)
    thin = {**variables, "params": rmtjax.factorize(params, plan)}
    return thin, {**variables, "params": rmtjax.truncate(params, plan)}, plan


def assert_close(tree, other, tolerance=EXACT):
    """Equal in structure and dtype; in numbers relative to the largest of all."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))
    largest = max(float(jnp.max(jnp.abs(b))) for _, b in pairs)
    for a, b in pairs:
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


def grads(apply, variables, args, **kwargs):
    """Gradients of some loss with respect to parameters and inputs, and the outputs."""
    others = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params, args):
        outputs = apply({**others, "params": params}, *args, **kwargs)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs)), outputs

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
    (params, inputs), outputs = gradient(variables["params"], args)
    inputs = [leaf for leaf in jax.tree.leaves(inputs) if leaf.dtype != jax.dtypes.float0]
    return params, inputs, outputs


def check(module, *args, **kwargs):
    """Outputs and gradients of the factorized tree against those of the truncated one."""
    thin, dense, plan = make_thin(module, *args, **kwargs)
    assert {row.action for row in plan.values()} == {"factorize"}
    run = lambda *args, **kwargs: linen.apply(module, *args, **kwargs)
    params, inputs, outputs = grads(run, thin, args, **kwargs)
    wanted, wanted_inputs, wanted_outputs = grads(module.apply, dense, args, **kwargs)
    assert_close(outputs, wanted_outputs)
    if inputs:
        assert_close(inputs, wanted_inputs)
    # The chain rule, from the gradient of the kernel to those of its factors.
    _, pull = jax.vjp(rmtjax.merge, thin["params"])
    assert_close(params, *pull(wanted))
