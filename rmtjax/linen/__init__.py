"""Factorized trees under unmodified `flax.linen` modules.

In come a module and its variables, with `Factors` in place of some kernels. Out come its outputs:
a layer with a factored kernel runs as two thin layers of Flax. This holds for `Dense`,
`DenseGeneral` and attention, `Einsum`, `Conv` and `ConvTranspose` (their window first, then a 1x1
product), `Embed`, and the recurrent cells made of these. It also holds inside `nn.scan`, `nn.vmap`
and `nn.remat`. `rmtjax.register_layer` adds layers of the user. Under `jit` the layers are split
while tracing, so a compiled call does not pay for it. Kernels in other parts, as `rmtjax.lowrank`
makes them, run as two factors too, or product by product. `moments` sums over the inputs of
kernels.
"""

from rmtjax.linen._apply import apply as apply, factorized as factorized
from rmtjax.linen._kernel_axes import kernel_axes as kernel_axes, KernelTable as KernelTable
from rmtjax.linen._moments import moments as moments

__all__ = ["KernelTable", "apply", "factorized", "kernel_axes", "moments"]
