"""Knows kernels by the names that Flax, Haiku, Torch and Equinox give them, and proves their axes.

A name alone does not show whether an axis is a stack of layers. Its neighbours do: the bias of a
layer has one axis, and one more in a stack. Without such a proof a kernel of three axes or more has
no axes, so that no stack is read as one matrix.
"""

import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rmtjax._axes import kernel_shape, KernelAxes

NAMES = ("kernel", "embedding")
# Haiku: linear, convolution and embedding; recurrent layers.
_HAIKU = re.compile(r"w(_[ih])?|embeddings")
# Torch and Equinox: linear, convolution and embedding; fused attention; recurrent layers and cells.
_TORCH = re.compile(r"weight|(in|q|k|v)_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
# Parts of the paths of adapters: LoRA and its relatives hold factors of a change, and no kernel.
_ADAPTER = re.compile(r"(.*_)?(lora|loha|lokr|hada|vera|dora|ia3|oft|boft)_.+", re.IGNORECASE)
# Quantized weights that other names than those of kernels hold, several entries in an integer.
_QUANTIZED = re.compile(r"qweight|(.*_)?(packed|blocks|quantized)")
# Layers whose weight multiplies entry by entry.
_NORM = re.compile(r"(.*[_\d])?((layer|batch|group|rms|instance)?norms?|ln|bn|gn)\d*([_\d].*)?")
# Layers of Torch that look rows up. An embedding of patches multiplies.
_TABLE = re.compile(r"(?!patch).*embed(ding)?s?(_tokens|_positions)?|wte|wpe")
# Vectors of layers, which have two axes only in a stack or beside several heads.
_VECTORS = ("bias", "scale", "b", "offset", "mean", "var")
# Flax's attention projects to (heads, head_dim) with the first three, and back with the last.
_PROJECTIONS = ("query", "key", "value", "out")
# The longest window of Torch's one-dimensional convolutions. A longer last axis means a stack.
_WINDOW = 16
# Names of layers that hold one factor of a kernel. The rooms that know them register them: this
# room does not import Flax.
_FACTOR_LAYERS: set[str] = set()

Parts = tuple[str, ...]


def register_factor_layers(*names: str) -> None:
    """Registers names of layers that hold one factor of a kernel each, and no kernel."""
    _FACTOR_LAYERS.update(names)


def in_factor_layer(path: str) -> bool:
    """Returns True for a leaf in a layer that holds one factor of a kernel."""
    return not _FACTOR_LAYERS.isdisjoint(path.split("/"))


def _parts(path: str) -> Parts:
    """Returns the names in a path. Torch and some other writers put dots between them."""
    return tuple(path.replace(".", "/").split("/"))


def _is_torch(parts: Parts) -> bool:
    return bool(_TORCH.fullmatch(parts[-1]))


def is_kernel(path: str, leaf: Any) -> bool:
    """Returns True for what layers multiply by, known by the name of the leaf.

    `kernel` and `embedding` of Flax; with two axes or more also `weight` of Torch and Equinox, and
    `w` and `embeddings` of Haiku. Factors of an adapter are not kernels.
    """
    parts = _parts(path)
    if in_factor_layer(path) or any(map(_ADAPTER.fullmatch, parts)):
        return False
    # A Torch weight with one axis is the scale of a normalization.
    other = _is_torch(parts) or _HAIKU.fullmatch(parts[-1])
    return parts[-1] in NAMES or bool(other and len(kernel_shape(leaf)) >= 2)


def is_table(path: str, shape: tuple[int, ...]) -> bool:
    """Returns True for a table of embeddings, whose rows are looked up and not multiplied."""
    parts = _parts(path)
    layer = ("", *parts)[-2]
    named = _is_torch(parts) and len(shape) == 2 and _TABLE.fullmatch(layer)
    return parts[-1] in ("embedding", "embeddings") or bool(named)


def is_convolution(path: str, shape: tuple[int, ...], axes: KernelAxes | None) -> bool:
    """Returns True for the kernel of a convolution, by its name or by its window.

    One of an attention has three axes as well, so that three axes alone prove nothing.
    """
    parts = _parts(path)
    if len(shape) - len(axes.batch if axes else ()) < 3:
        return False
    if "conv" in ("", *parts)[-2].lower():
        return True
    return axes is not None and (_is_torch(parts) or len(axes.inputs) > 2)


def is_untold(path: str, leaf: Any) -> bool:
    """Returns True for a leaf that may be a kernel under another name, with two axes or more.

    Floating leaves are, and integers under the names of quantized weights.
    """
    name = _parts(path)[-1]
    # Layers of Flax know the adapters that they have: `lora_a`.
    vector = name in _VECTORS or _ADAPTER.fullmatch(name)
    dtype = getattr(next(iter(jax.tree.leaves(leaf)), None), "dtype", None)
    if vector or in_factor_layer(path) or dtype is None or len(kernel_shape(leaf)) < 2:
        return False
    quantized = jnp.issubdtype(dtype, jnp.integer) and bool(_QUANTIZED.fullmatch(name))
    return bool(jnp.issubdtype(dtype, jnp.floating)) or quantized


class Neighbours:
    """Knows the shapes in a tree, which show what is a stack.

    Args:
      leaves: The leaves of the tree by path.
    """

    def __init__(self, leaves: Mapping[str, Any]):
        self.shapes = {_parts(path): kernel_shape(leaf) for path, leaf in leaves.items()}
        # What holds a vector of a layer with one axis is not stacked, nor is what is around it.
        vectors = (*_VECTORS[:4], "weight")
        single = (p for p, shape in self.shapes.items() if p[-1] in vectors and len(shape) == 1)
        self._single = {parts[:end] for parts in single for end in range(len(parts))}

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Returns the shape of a leaf; None for one that is not in the tree."""
        return self.shapes.get(_parts(path))

    def bias(self, parts: Parts) -> tuple[int, ...] | None:
        """Returns the shape of the bias in the layer of a kernel; None without one."""
        names = (self.shapes.get((*parts[:-1], name)) for name in ("bias", "b"))
        return next((shape for shape in names if shape is not None), None)

    def is_convolution(self, parts: Parts, shape: tuple[int, ...]) -> bool:
        """Returns True if a kernel (*window, in, out) is not a stack."""
        bias = self.bias(parts)
        if bias is not None:
            return bias == shape[-1:]
        # Without a bias: a square window, in a block that is not a stack.
        return len(shape) == 4 and shape[0] == shape[1] and parts[:-2] in self._single

    def is_attention(self, parts: Parts) -> bool:
        """Returns True if four projections share their heads, so that none of them is a stack."""
        places = [(*parts[:-2], name, parts[-1]) for name in _PROJECTIONS]
        shapes = [self.shapes.get(place, ()) for place in places]
        if any(len(shape) != 3 for shape in shapes):
            return False
        *biases, last = map(self.bias, places)
        (inputs, *heads), *_ = shapes
        shared = all(shape[1:] == (*heads,) for shape in shapes[:3]) and shapes[3][:2] == (*heads,)
        if not shared or any(bias not in (None, (*heads,)) for bias in biases):
            return False
        # A stack of square kernels has shapes that agree as well.
        clear = len({inputs, *heads}) == 3 or heads[0] * heads[1] == inputs
        return clear if last is None else len(last) == 1


_ALONE = Neighbours({})


def _torch_axes(parts: Parts, shape: tuple[int, ...], tree: Neighbours) -> KernelAxes | None:
    """Returns the axes of a weight of Torch or Equinox, which keeps the order as it is stored."""
    # Every weight of Torch has the same last name, so the name of its layer decides.
    parent = ("", *parts)[-2].lower()
    bias = tree.bias(parts)
    # Layers have a bias with one axis. One with more is that of a stack, or added entry by entry.
    elementwise = bool(_NORM.fullmatch(parent)) or (bias is not None and len(bias) != 1)
    depthwise = len(shape) > 2 and shape[1] == 1  # or grouped: (outputs, 1, *window)
    stacked = len(shape) > 2 and max(shape[2:]) > _WINDOW and "conv" not in parent
    if elementwise or depthwise or stacked:
        return None
    return KernelAxes((0,), tuple(range(1, len(shape))))


def guess_axes(path: str, leaf: Any, tree: Neighbours = _ALONE) -> KernelAxes | None:
    """Returns the axes of a kernel, if its name, its shape and its neighbours prove them, or None.

    - `Dense` (in, out), `Embed` (vocabulary, features), two axes: as they are.
    - `Conv` (*window, in, out), known by its name: all axes but the last are inputs. Its bias has
      one axis; or the window is square, and the bias or scale of another layer beside it has one.
    - `query`, `key` and `value` (in, heads, head_dim) beside `out` (heads, head_dim, out), which
      share their heads: all axes but the first, or all but the last, are on one side.
    - Torch and Equinox (outputs, inputs, *window): the first axis against the others. Fused kernels
      are one matrix: those of q, k and v (3 E, E), and of the gates of a recurrent layer.
    - Weights of normalizations, and other kernels with more axes than two: None.
    """
    parts, shape = _parts(path), kernel_shape(leaf)
    if len(shape) < 2:
        return None
    if _is_torch(parts):
        return _torch_axes(parts, shape, tree)
    last, parent = len(shape) - 1, ("", *parts)[-2]
    inputs_first = KernelAxes(tuple(range(last)), (last,))
    if last == 1:
        return inputs_first
    if last == 2 and parent in _PROJECTIONS and tree.is_attention(parts):
        return inputs_first if parent == "out" else KernelAxes((0,), (1, 2))
    known = "conv" in parent.lower() and tree.is_convolution(parts, shape)
    return inputs_first if known else None


def matcher(pattern: str | re.Pattern[str]) -> Callable[[str], bool]:
    """Returns a test of paths: a glob of the complete path, or a regular expression after "re:"."""
    if isinstance(pattern, str) and not pattern.startswith("re:"):
        # A complete name may have brackets, which a glob would take for a set of letters.
        return lambda path: path == pattern or fnmatch.fnmatchcase(path, pattern)
    expression = re.compile(pattern.removeprefix("re:") if isinstance(pattern, str) else pattern)
    return lambda path: expression.search(path) is not None


def check_takes_leaf(where: Callable[..., Any]) -> None:
    """Raises TypeError for a function that cannot be called with a path and a leaf."""
    try:
        signature = inspect.signature(where)
    except ValueError:  # of functions of C
        return
    try:
        signature.bind("path", None)
    except TypeError as error:
        raise TypeError(
            f"`where` must take the path and the leaf, got a function of {signature}: write "
            "`where=lambda path, leaf: ...`."
        ) from error
