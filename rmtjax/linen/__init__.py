"""Factorized trees under unmodified `flax.linen` modules.

Where the tree holds `Factors` in the place of a kernel, the layer that owns it runs as two
thinner layers of Flax's own: `Dense`, `DenseGeneral` and with it attention, `Einsum`,
`Conv`, `ConvTranspose` (their window first, then a 1x1 product), `Embed`, and the cells of
`nn.RNN` that are made of these, also inside `nn.scan`, `nn.vmap` and `nn.remat`. Layers of
one's own join by `rmtjax.register_layer`. Under `jit` all of this happens while tracing and
costs nothing.
"""

from rmtjax.linen._apply import (
    apply as apply,
    factorized as factorized,
    kernel_axes as kernel_axes,
    KernelTable as KernelTable,
)

__all__ = ["KernelTable", "apply", "factorized", "kernel_axes"]
