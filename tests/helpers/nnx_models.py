"""Models of nnx that several tests share: one for each layer, and a net."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from helpers.draws import normal
from helpers.nnx_checks import make_random, rank_plan
from rmtjax import nnx as rmt_nnx

RANK = 3


def rngs():
    return nnx.Rngs(0)


draw = functools.partial(normal, 1)


def linear(rows=20, columns=16, **options):
    return nnx.Linear(rows, columns, rngs=rngs(), **options)


class Attend(nnx.Module):
    """An embedding with its weights tied to the output."""

    def __init__(self):
        self.table = nnx.Embed(30, 16, rngs=rngs())

    def __call__(self, x):
        return self.table(jnp.arange(4)) @ x, self.table.attend(x.T)


class Steps(nnx.Module):
    """Two steps of a recurrent cell."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self, x):
        carry = jax.tree.map(jnp.zeros_like, self.cell.initialize_carry(x.shape, rngs()))
        for _ in range(2):
            carry, x_next = self.cell(carry, x)
        return carry, x_next


class Remat(nnx.Module):
    """A layer that is computed twice."""

    def __init__(self):
        self.inner = linear()

    @nnx.remat
    def __call__(self, x):
        return jnp.tanh(self.inner(x))


class Stack(nnx.Module):
    """Layers of one shape, run one after another by `nnx.scan`."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Linear(12, 12, rngs=rngs))
        self.layers = nnx.split_rngs(splits=4)(make)(rngs())

    def __call__(self, x):
        run = nnx.scan(
            lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return run(x, self.layers)


class Experts(nnx.Module):
    """Convolutions of one shape, each for its own inputs, as `nnx.vmap` makes them."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Conv(4, 12, 3, rngs=rngs))
        self.experts = nnx.split_rngs(splits=3)(make)(rngs())

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=0, out_axes=0)(self.experts, x)


LORA = {"lora_rank": 2, "b_initializer": nnx.initializers.normal()}
LAYERS = {
    "Linear": (linear, draw(5, 20)),
    "Linear, no bias": (lambda: linear(use_bias=False), draw(5, 20)),
    "LinearGeneral": (
        lambda: nnx.LinearGeneral((4, 5), (3, 6), axis=(1, -1), rngs=rngs()),
        draw(3, 4, 2, 5),
    ),
    "LinearGeneral, batch": (
        lambda: nnx.LinearGeneral(10, 12, batch_axis={0: 3}, rngs=rngs()),
        draw(3, 2, 10),
    ),
    "Einsum": (
        lambda: nnx.Einsum("nta,ahb->nthb", (20, 4, 5), (4, 5), rngs=rngs()),
        draw(3, 2, 20),
    ),
    "Einsum, batch": (
        lambda: nnx.Einsum("...ea,eab->...eb", (3, 10, 12), (3, 12), rngs=rngs()),
        draw(2, 3, 10),
    ),
    "Conv": (
        lambda: nnx.Conv(4, 16, (3, 3), 2, padding=1, kernel_dilation=(2, 1), rngs=rngs()),
        draw(2, 9, 8, 4),
    ),
    "Conv 1x1": (lambda: nnx.Conv(20, 16, (1, 1), rngs=rngs()), draw(2, 3, 3, 20)),
    "Conv, circular": (
        lambda: nnx.Conv(4, 16, 4, padding="CIRCULAR", rngs=rngs()),
        draw(2, 3, 9, 4),
    ),
    "ConvTranspose": (
        lambda: nnx.ConvTranspose(4, 16, (3, 3), 2, padding="VALID", rngs=rngs()),
        draw(2, 4, 3, 4),
    ),
    "ConvTranspose, circular": (
        lambda: nnx.ConvTranspose(4, 16, 5, 3, padding="CIRCULAR", rngs=rngs()),
        draw(2, 6, 4),
    ),
    "Embed": (Attend, draw(16, 2)),
    "MultiHeadAttention": (
        lambda: nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs()),
        draw(2, 5, 16),
    ),
    "LoRALinear": (lambda: nnx.LoRALinear(20, 16, **LORA, rngs=rngs()), draw(5, 20)),
    "LoRA": (
        lambda: nnx.LoRA(20, 2, 16, base_module=linear(), rngs=rngs()),
        draw(5, 20),
    ),
    "LSTMCell": (lambda: Steps(nnx.LSTMCell(10, 12, rngs=rngs())), draw(2, 10)),
    "OptimizedLSTMCell": (lambda: Steps(nnx.OptimizedLSTMCell(10, 12, rngs=rngs())), draw(2, 10)),
    "GRUCell": (lambda: Steps(nnx.GRUCell(10, 12, rngs=rngs())), draw(2, 10)),
    "SimpleCell": (lambda: Steps(nnx.SimpleCell(10, 12, rngs=rngs())), draw(2, 10)),
    "RNN": (lambda: nnx.RNN(nnx.GRUCell(10, 12, rngs=rngs())), draw(2, 3, 10)),
    "remat": (Remat, draw(5, 20)),
    "scan": (Stack, draw(5, 12)),
    "vmap": (Experts, draw(3, 2, 6, 4)),
}
EACH = ("OptimizedLSTMCell", "GRUCell", "RNN")
CASES = [(name, "fused") for name in LAYERS] + [(name, "each") for name in EACH]


@functools.cache
def models(name, gates):
    """A random layer, its plan, and the layer truncated and made thin."""
    model = make_random(LAYERS[name][0])
    plan = rank_plan(model, RANK, gates=gates)
    return model, plan, rmt_nnx.truncate(model, plan), rmt_nnx.factorize(model, plan)


X = draw(6, 20)


class Net(nnx.Module):
    """One layer twice, a list of layers, and layers with a state."""

    def __init__(self, rngs):
        self.first = nnx.Linear(20, 24, rngs=rngs)
        self.again = self.first
        self.blocks = nnx.Sequential(*(nnx.Linear(24, 20, rngs=rngs) for _ in range(2)))
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.blocks.layers[0](self.dropout(self.norm(self.first(x))))
        return self.blocks.layers[1](self.again(x))


def net():
    return Net(nnx.Rngs(0))


def make_thin(model):
    return rmt_nnx.factorize(model, rank_plan(model, 4))
