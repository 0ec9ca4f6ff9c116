"""The layers that `docs/layers.md` tells of, one small model each, in linen and in nnx."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import nnx

from helpers.layer_models import (
    Attend,
    COLUMNS,
    Experts,
    NnxAttend,
    NnxExperts,
    NnxRegistered,
    NnxRemat,
    NnxScan,
    NnxTwice,
    NnxUnregistered,
    NnxVmap,
    Registered,
    rngs,
    ROWS,
    Step,
    Twice,
    Unregistered,
)
from helpers.linen_checks import draw

ALONE = ("left alone",) * 5
MERGED = ("yes", "yes", "merged", "merged", "yes")
IN_PLACE = ("yes", "yes", "in place", "yes", "yes")


class Case(NamedTuple):
    """A layer in a model.

    Attributes:
      make: Makes the module of linen, or the model of nnx.
      inputs: What it is called with.
      cells: What the page says of analyze, truncate, factorize, train on and save.
      gates: The option of `rmtjax.nnx`.
      wrt: What of a model of nnx is trained.
    """

    make: Callable[[], Any]
    inputs: tuple
    cells: tuple[str, ...] = ("yes",) * 5
    gates: Any = "fused"
    wrt: Any = nnx.Param


X, SQUARE, EACH = (draw(5, ROWS),), (draw(5, COLUMNS),), (draw(4, 5, ROWS),)
IMAGES, PIXELS, WIDE = (draw(2, 6, 5, 5),), (draw(2, 3, 3, ROWS),), (draw(2, 7, 8),)
HEADS, SEQUENCE = (draw(5, 4, 5),), (draw(2, 3, ROWS),)
WINDOW, SPREAD = (2, 2), {"strides": (2, 1), "padding": ((1, 0), (0, 2)), "kernel_dilation": (1, 2)}
MASK = np.tril(np.ones((1, 8, COLUMNS), np.float32))


def linen_conv(window=WINDOW, **options):
    return lambda: nn.Conv(COLUMNS, window, **options)


def nnx_conv(inputs=5, window=WINDOW, **options):
    return lambda: nnx.Conv(inputs, COLUMNS, window, **options, rngs=rngs())


def linen_run(cell):
    return lambda: nn.RNN(cell(COLUMNS))


def nnx_run(cell):
    return lambda: nnx.RNN(cell(ROWS, COLUMNS, rngs=rngs()))


LIFT = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


LINEN = {
    "Dense": Case(lambda: nn.Dense(COLUMNS), X),
    "DenseGeneral": Case(lambda: nn.DenseGeneral((2, 8), axis=(-2, -1)), HEADS),
    "Einsum": Case(lambda: nn.Einsum((4, 5, 2, 8), "bhi,hiko->bko"), HEADS),
    "Einsum, inputs behind outputs": Case(
        lambda: nn.Einsum((COLUMNS, ROWS), "bi,oi->bo"), X, IN_PLACE
    ),
    "Conv": Case(linen_conv(), IMAGES),
    "Conv, strides, padding, dilation": Case(linen_conv(**SPREAD), IMAGES),
    "Conv, 1x1": Case(linen_conv((1, 1)), PIXELS),
    "Conv, grouped": Case(linen_conv(3, feature_group_count=2), WIDE, ALONE),
    "Conv, depthwise": Case(linen_conv(3, feature_group_count=8), WIDE, ALONE),
    "Conv, masked": Case(linen_conv(1, mask=MASK), WIDE, ALONE),
    "ConvTranspose": Case(lambda: nn.ConvTranspose(COLUMNS, WINDOW, (2, 1)), IMAGES),
    "ConvTranspose, transposed kernel": Case(
        lambda: nn.ConvTranspose(COLUMNS, 3, transpose_kernel=True), WIDE, ALONE
    ),
    "Embed": Case(Attend, SQUARE),
    "MultiHeadDotProductAttention": Case(
        lambda: nn.MultiHeadDotProductAttention(4, qkv_features=COLUMNS), SEQUENCE
    ),
    "LSTMCell": Case(linen_run(nn.LSTMCell), SEQUENCE),
    "OptimizedLSTMCell": Case(linen_run(nn.OptimizedLSTMCell), SEQUENCE),
    "GRUCell": Case(linen_run(nn.GRUCell), SEQUENCE),
    "scan": Case(lambda: nn.scan(Step, **LIFT, length=4)(), (*SQUARE, None)),
    "vmap": Case(lambda: nn.vmap(nn.Dense, **LIFT)(COLUMNS), EACH),
    "experts": Case(Experts, X),
    "remat": Case(lambda: nn.remat(nn.Dense)(COLUMNS), X),
    "shared": Case(Twice, SQUARE),
    "own layer, registered": Case(Registered, X),
    "own layer, not registered": Case(Unregistered, X, MERGED),
}
NNX = {
    "Linear": Case(lambda: nnx.Linear(ROWS, COLUMNS, rngs=rngs()), X),
    "LinearGeneral": Case(
        lambda: nnx.LinearGeneral((4, 5), (2, 8), axis=(-2, -1), rngs=rngs()), HEADS
    ),
    "Einsum": Case(lambda: nnx.Einsum("bhi,hiko->bko", (4, 5, 2, 8), (2, 8), rngs=rngs()), HEADS),
    "Einsum, inputs behind outputs": Case(
        lambda: nnx.Einsum("bi,oi->bo", (COLUMNS, ROWS), (COLUMNS,), rngs=rngs()), X, IN_PLACE
    ),
    "Conv": Case(nnx_conv(), IMAGES),
    "Conv, strides, padding, dilation": Case(nnx_conv(**SPREAD), IMAGES),
    "Conv, 1x1": Case(nnx_conv(ROWS, (1, 1)), PIXELS),
    "Conv, grouped": Case(nnx_conv(8, 3, feature_group_count=2), WIDE, ALONE),
    "Conv, depthwise": Case(nnx_conv(8, 3, feature_group_count=8), WIDE, ALONE),
    "Conv, masked": Case(nnx_conv(8, 1, mask=MASK), WIDE, ALONE),
    "ConvTranspose": Case(
        lambda: nnx.ConvTranspose(5, COLUMNS, WINDOW, (2, 1), rngs=rngs()), IMAGES
    ),
    "ConvTranspose, transposed kernel": Case(
        lambda: nnx.ConvTranspose(8, COLUMNS, 3, transpose_kernel=True, rngs=rngs()), WIDE, ALONE
    ),
    "Embed": Case(NnxAttend, SQUARE),
    "MultiHeadAttention": Case(
        lambda: nnx.MultiHeadAttention(4, ROWS, COLUMNS, decode=False, rngs=rngs()), SEQUENCE
    ),
    "LSTMCell": Case(nnx_run(nnx.LSTMCell), SEQUENCE),
    "OptimizedLSTMCell": Case(nnx_run(nnx.OptimizedLSTMCell), SEQUENCE),
    "OptimizedLSTMCell, each gate": Case(nnx_run(nnx.OptimizedLSTMCell), SEQUENCE, gates="each"),
    "GRUCell": Case(nnx_run(nnx.GRUCell), SEQUENCE),
    "GRUCell, each gate": Case(nnx_run(nnx.GRUCell), SEQUENCE, gates="each"),
    "scan": Case(NnxScan, SQUARE),
    "vmap": Case(NnxVmap, EACH),
    "experts": Case(NnxExperts, X),
    "remat": Case(NnxRemat, X),
    "shared": Case(NnxTwice, SQUARE),
    "LoRALinear": Case(
        lambda: nnx.LoRALinear(ROWS, COLUMNS, lora_rank=2, rngs=rngs()), X, wrt=nnx.LoRAParam
    ),
    "LoRA": Case(
        lambda: nnx.LoRA(ROWS, 2, COLUMNS, base_module=NNX["Linear"].make(), rngs=rngs()),
        X,
        wrt=nnx.LoRAParam,
    ),
    "own layer, registered": Case(NnxRegistered, X),
    "own layer, not registered": Case(NnxUnregistered, X, IN_PLACE),
}
CASES = {f"linen-{name}": case for name, case in LINEN.items()} | {
    f"nnx-{name}": case for name, case in NNX.items()
}
