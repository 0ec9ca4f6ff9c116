"""What the cases of `layer_cases` are made of besides Flax's own layers, in linen and in nnx."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rmtjax
from helpers.linen_checks import draw

ROWS, COLUMNS = 20, 16  # one shape for almost all kernels, so that few decompositions compile
IDS = np.arange(4)


def rngs():
    return nnx.Rngs(0)


def normal(*shape):
    return jnp.asarray(0.3 * draw(*shape))


class Attend(nn.Module):
    """An embedding, both ways."""

    def setup(self):
        self.table = nn.Embed(ROWS, COLUMNS)

    def __call__(self, x):
        return self.table(IDS), self.table.attend(x)


class Step(nn.Module):
    """A step of `nn.scan`."""

    @nn.compact
    def __call__(self, carry, _):
        return nn.tanh(nn.Dense(COLUMNS)(carry)), None


class Experts(nn.Module):
    """A mixture of experts: a gate, and the experts as one einsum."""

    @nn.compact
    def __call__(self, x):
        gate = nn.softmax(nn.Dense(4, name="gate")(x))
        sent = jnp.einsum("be,bi->bei", gate, x)
        return nn.Einsum((4, ROWS, COLUMNS), "bei,eio->beo", name="experts")(sent).sum(1)


class Twice(nn.Module):
    """One layer in two places."""

    def setup(self):
        self.layer = nn.Dense(COLUMNS)

    def __call__(self, x):
        return self.layer(nn.tanh(self.layer(x)))


class Registered(nn.Module):
    """A layer of the user, registered."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(), (ROWS, COLUMNS))
        return nn.tanh(x @ weight) @ weight.T


class Unregistered(nn.Module):
    """A layer of the user, not registered."""

    @nn.compact
    def __call__(self, x):
        return nn.tanh(x @ self.param("kernel", nn.initializers.normal(), (ROWS, COLUMNS)))


class NnxAttend(nnx.Module):
    """An embedding, both ways."""

    def __init__(self):
        self.table = nnx.Embed(ROWS, COLUMNS, rngs=rngs())

    def __call__(self, x):
        return self.table(IDS), self.table.attend(x)


class NnxScan(nnx.Module):
    """Layers of one shape, one after another."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Linear(COLUMNS, COLUMNS, rngs=rngs))
        self.layers = nnx.split_rngs(splits=4)(make)(rngs())

    def __call__(self, x):
        step = lambda x, layer: jnp.tanh(layer(x))
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class NnxVmap(nnx.Module):
    """Layers of one shape, each for its own inputs."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Linear(ROWS, COLUMNS, rngs=rngs))
        self.layers = nnx.split_rngs(splits=4)(make)(rngs())

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x))(self.layers, x)


class NnxExperts(nnx.Module):
    """A mixture of experts: a gate, and the experts as one einsum."""

    def __init__(self):
        self.gate = nnx.Linear(ROWS, 4, rngs=rngs())
        self.experts = nnx.Einsum("bei,eio->beo", (4, ROWS, COLUMNS), (4, COLUMNS), rngs=rngs())

    def __call__(self, x):
        sent = jnp.einsum("be,bi->bei", nnx.softmax(self.gate(x)), x)
        return self.experts(sent).sum(1)


class NnxRemat(nnx.Module):
    """A layer that is computed again for its gradient."""

    def __init__(self):
        self.layer = nnx.Linear(ROWS, COLUMNS, rngs=rngs())

    @nnx.remat
    def __call__(self, x):
        return jnp.tanh(self.layer(x))


class NnxTwice(nnx.Module):
    """One layer in two places."""

    def __init__(self):
        self.layer = nnx.Linear(COLUMNS, COLUMNS, rngs=rngs())
        self.again = self.layer

    def __call__(self, x):
        return self.again(jnp.tanh(self.layer(x)))


class NnxRegistered(nnx.Module):
    """A layer of the user, registered."""

    def __init__(self):
        self.weight = nnx.Param(normal(ROWS, COLUMNS))

    def __call__(self, x):
        return jnp.tanh(x @ self.weight[...]) @ self.weight[...].T


class NnxUnregistered(nnx.Module):
    """A layer of the user, not registered."""

    def __init__(self):
        self.kernel = nnx.Param(normal(ROWS, COLUMNS))

    def __call__(self, x):
        return jnp.tanh(x @ self.kernel[...])


for layer in (Registered, NnxRegistered):
    rmtjax.register_layer(layer, {"weight": rmtjax.KernelAxes((0,), (1,))})
