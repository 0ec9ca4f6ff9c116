"""What the tensors of a file are, kernels or factors of one, as far as their names tell."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rmtjax._axes import factored_axes, Factors, kernel_shape, KernelAxes
from rmtjax._types import Axes, Where
from rmtjax.checkpoint._manifest import KEY, Manifest, parse
from rmtjax.checkpoint._tensors import Tensors
from rmtjax.planning import guess_axes, is_kernel, to_predicate

# Linear, convolution and embedding; fused attention; recurrent layers and cells.
_TORCH = re.compile(r"weight|(in|q|k|v)_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?")

# What optax keeps of each parameter has that one's name: below `opt_state`, or, of a state that
# was saved alone, below `0/mu`.
_MOMENT = re.compile(r"(.*/)?opt_state/.*|(.*/)?\d+/(mu|nu|trace)/.+/[^/]+")
# Torch's convolutions over one axis are as long as their window, which is short.
_WINDOW = 16


def _flax_path(name: str) -> str:
    """The name with the separator of paths; some writers join them with a dot."""
    return name.replace(".", "/")


def _is_torch(name: str) -> bool:
    return bool(_TORCH.fullmatch(_flax_path(name).rpartition("/")[2]))


def is_moment(name: str) -> bool:
    """Whether it is that of a moment of an optimizer, which has the name of what it is of."""
    return bool(_MOMENT.fullmatch(_flax_path(name)))


def is_kernel_tensor(name: str, leaf: Any) -> bool:
    """Chooses Flax's `kernel` and `embedding`, and Torch's weights of two axes or more.

    A Torch weight with one axis is the scale of a normalization. The moments of an optimizer,
    named as the kernels that they are of, are none.
    """
    if is_moment(name):
        return False
    if is_kernel(_flax_path(name), leaf):
        return True
    return _is_torch(name) and len(kernel_shape(leaf)) >= 2


def tensor_axes(name: str, leaf: Any) -> KernelAxes | None:
    """The axes of a kernel, from its name and shape.

    - Flax: as `rmtjax.plan` guesses them. Stacked kernels (`nn.scan`) look like nothing known.
    - Torch: the first axis against all others, as stored, so that factors keep their order:
      (outputs, inputs), (outputs, inputs, *window). Fused kernels are one matrix: those of
      q, k and v (3 E, E), of the gates of a recurrent layer (4 H, inputs), GPT-2's `c_attn`.

    Returns:
      None where the leaf is no matrix: a depthwise or grouped convolution, which Torch stores as
      (outputs, 1, *window), or a stack: three axes, of which the last is too long for a window
      (over 16) and the name tells no convolution.
    """
    shape = kernel_shape(leaf)
    if not _is_torch(name):
        return guess_axes(_flax_path(name), leaf)
    parent = ("", *_flax_path(name).split("/"))[-2].lower()
    if len(shape) > 2 and shape[1] == 1:
        return None
    if len(shape) == 3 and shape[2] > _WINDOW and "conv" not in parent:
        return None
    return KernelAxes((0,), tuple(range(1, len(shape))))


def choose(leaves: Mapping[str, Any], where: Where | None, axes: Axes | None) -> dict[str, Any]:
    """The leaves that are kernels."""
    by_path = axes if isinstance(axes, Mapping) else {}
    default = lambda path, leaf: path in by_path or is_kernel_tensor(path, leaf)
    wanted = to_predicate(where, dict(leaves)) or default
    chosen = {path: leaf for path, leaf in leaves.items() if wanted(path, leaf)}
    if not chosen:
        some = ", ".join(map(repr, list(leaves)[:5])) or "none"
        raise ValueError(
            f"no tensor is chosen as a kernel, of {len(leaves)} with names such as {some}. "
            "Choose others: matrices, by `where`, or in a shell by --include and --exclude."
        )
    return chosen


def halves(path: str) -> tuple[str, str]:
    """The names of the factors of a kernel."""
    return f"{path}/left", f"{path}/right"


def read_manifest(tensors: Tensors) -> Manifest | None:
    """What the file says of itself, if this package wrote it."""
    text = tensors.metadata.get(KEY)
    return None if text is None else parse(text)


def check_factors(path: str, factors: Factors) -> None:
    """Refuses halves that are not those of one kernel."""
    left, right = factors
    fits = (
        min(len(left.shape), len(right.shape)) >= 2
        and left.shape[-1] > 0
        and (factored_axes(factors).batch or left.shape[-1] == right.shape[0])
    )
    if not fits or left.dtype != right.dtype or not jnp.issubdtype(left.dtype, jnp.floating):
        told = " and ".join(f"{half.dtype} of shape {half.shape}" for half in factors)
        raise ValueError(
            f"the halves of {path!r} are {told}, and must have one rank and one floating dtype."
        )


def find_leaves(tensors: Tensors, told: Manifest | None) -> dict[str, Any]:
    """Path, shape and dtype of each leaf of a file, in its order; factors are one leaf.

    Raises:
      ValueError: The file says that it has the factors of a kernel, and lacks one, or they are
        no factors.
    """
    specs: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(entry.shape, entry.dtype)
        for name, entry in tensors.entries.items()
    }
    if told is None:
        return specs
    paths = told.factors
    if paths is None:
        paths = [path for path in told.plan or () if specs.keys() >= {*halves(path)}]
    double = min(specs.keys() & paths, default=None)
    if double is not None:
        raise ValueError(f"{str(tensors.path)!r} has {double!r} dense and as factors: remove one.")
    owners = {name: path for path in paths for name in halves(path)}
    missing = min(owners.keys() - specs.keys(), default=None)
    if missing is not None:
        raise ValueError(
            f"{str(tensors.path)!r} lacks {missing!r}, which its own plan names: it is damaged, or "
            "its tensors were renamed. Write it again from its source."
        )
    leaves = {}
    for name, spec in specs.items():
        path = owners.get(name)
        leaf = spec if path is None else Factors(*(specs[half] for half in halves(path)))
        leaves[name if path is None else path] = leaf
    for path in paths:
        check_factors(path, leaves[path])
    return leaves
