"""Densities of layers, and masks at random with these densities."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from rmtjax._axes import KernelLeaf, MatrixView
from rmtjax._types import Axes, Where
from rmtjax.planning import check_chosen, find_kernels
from rmtjax.sparse._masks import fill, find_floating, Groups, Masks, pick, without_smallest

Density = float | Mapping[str, float]
Group = Callable[[str], str]

DISTRIBUTIONS = ("erdos_renyi_kernel", "erdos_renyi", "uniform")
# The gates of Flax's recurrent cells: of the input (i) or of the hidden state (h).
_GATE = re.compile(r"(^|/)([ih])[ifgornz]_?/kernel$")


def cell_gates(path: str) -> str:
    """Returns a common name for the kernels of the gates of a recurrent cell.

    `drop_and_grow` and `random_mask` give all kernels with one name one number of entries
    together. So gates may exchange entries, as in a cell that has them in one matrix.

    Args:
      path: Of a kernel, such as "LSTMCell_0/hf/kernel".

    Returns:
      "LSTMCell_0/h*/kernel" for the gates of Flax's cells; other paths as they are.

    Examples:
      >>> import rmtjax
      >>> rmtjax.sparsity.cell_gates("cell/hf/kernel"), rmtjax.sparsity.cell_gates("out/kernel")
      ('cell/h*/kernel', 'out/kernel')
    """
    return _GATE.sub(r"\1\2*/kernel", path)


def to_groups(paths: Iterable[str], group: Group) -> Groups:
    """Returns the index of the group of each kernel."""
    index: dict[str, int] = {}
    return {path: index.setdefault(group(path), len(index)) for path in paths}


def check_density(density: Any) -> None:
    """Raises ValueError unless a density, or each of a dictionary, is in (0, 1]."""
    for value in density.values() if isinstance(density, Mapping) else (density,):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float | np.floating)
            or not 0 < value <= 1
        ):
            raise ValueError(
                f"`density` must be in (0, 1], got {value!r}: the share of entries that are not 0."
            )


def _sides(view: KernelLeaf, distribution: str) -> tuple[int, list[int], int]:
    """Returns the matrices of a stack, and what stands for inputs and for outputs in a formula."""
    if not isinstance(view, MatrixView):
        return 1, list(view.shape[:-1]), math.prod(view.shape[-1:])
    parent = view.path.split("/")[-2] if "/" in view.path else ""
    sides = [view.shape[axis] for axis in view.axes.inputs]
    if "conv" not in parent.lower():
        return view.stack, [math.prod(sides)], view.columns
    return view.stack, sides if distribution == "erdos_renyi_kernel" else sides[-1:], view.columns


def _raw(views: list[KernelLeaf], distribution: str) -> float:
    """Returns the density of a group up to a common factor: its sides over their product."""
    if distribution == "uniform":
        return 1.0
    _, inputs, _ = _sides(views[0], distribution)
    # Gates have the same inputs: beside one another they are one matrix.
    outputs = sum(_sides(view, distribution)[2] for view in views)
    return (sum(inputs) + outputs) / (math.prod(inputs) * outputs)


def _scale(raw: np.ndarray, sizes: np.ndarray, density: float) -> np.ndarray:
    """Returns min(1, factor * raw) with the factor that makes their mean over entries a density."""
    full = np.zeros(len(raw), bool)
    while not full.all():
        rest = density * sizes.sum() - sizes[full].sum()
        factor = rest / (raw * sizes)[~full].sum()
        over = ~full & (factor * raw > 1)
        if not over.any():
            return np.where(full, 1.0, factor * raw)
        full |= over
    return np.ones(len(raw))


def layer_densities(
    params: PyTree,
    density: float,
    *,
    distribution: str = "erdos_renyi_kernel",
    group: Group = cell_gates,
    where: Where | None = None,
    axes: Axes | None = None,
) -> dict[str, float]:
    r"""Returns the density of each layer, so that all layers together have the given one.

    - "erdos_renyi_kernel": proportional to $(c_{in} + c_{out} + w + h) / (c_{in} c_{out} w h)$ for
      a convolution with a window of w and h, and to $(m + n) / (m n)$ for a matrix.
    - "erdos_renyi": proportional to $(m + n) / (m n)$, of a convolution for its channels.
    - "uniform": the same for each layer.

    Large layers get lower densities, and those that would get more than 1 get 1.

    Args:
      params: A tree of arrays.
      density: Share of all entries of the chosen kernels, in (0, 1].
      distribution: One of the three above.
      group: Path to a name. Kernels with one name count as one matrix, side by side.
      where, axes: As in `rmtjax.plan`.

    Returns:
      Path to density.

    Raises:
      ValueError: `density` or `distribution` is not as described.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> params = {"a": {"kernel": jnp.ones((784, 300))}, "b": {"kernel": jnp.ones((300, 10))}}
      >>> found = rmtjax.sparsity.layer_densities(params, 0.1)
      >>> {path: round(density, 3) for path, density in found.items()}
      {'a/kernel': 0.089, 'b/kernel': 1.0}

    References:
      Mocanu et al. (2018), https://arxiv.org/abs/1707.04780. Evci, Gale, Menick, Castro and Elsen
      (2020), https://arxiv.org/abs/1911.11134, for the form with the window.
    """
    check_density(density)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"`distribution` must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}."
        )
    chosen = find_floating(params, where)
    views = {
        path: view for path, view in find_kernels(params, where, axes).items() if path in chosen
    }
    groups = to_groups(views, group)
    members = [[] for _ in set(groups.values())]
    for path, view in views.items():
        members[groups[path]].append(view)
    raw = np.array([_raw(group, distribution) for group in members])
    sizes = np.array([sum(math.prod(view.shape) for view in group) for group in members], float)
    found = _scale(raw, sizes, density)
    return {path: float(found[index]) for path, index in groups.items()}


def random_masks(
    kernels: dict[str, Array], densities: Mapping[str, float], groups: Groups, key: Array
) -> Masks:
    """Returns masks with an exact number of entries for each group, at random."""
    sizes, counts = np.zeros((2, len(set(groups.values()))))
    for path, kernel in kernels.items():
        sizes[groups[path]] += kernel.size
        counts[groups[path]] += densities[path] * kernel.size
    removed = sizes - np.maximum(np.round(counts), 1)
    keys = random_keys(kernels, key)
    return without_smallest(keys, groups, jnp.asarray(removed, jnp.int32)) if kernels else {}


def random_keys(kernels: Mapping[str, Array], key: Array) -> dict[str, Array]:
    """Returns random integers from 1 on for each entry."""
    keys = jax.random.split(key, max(len(kernels), 1))
    bits = lambda key, kernel: (jax.random.bits(key, kernel.shape, jnp.uint32) >> 1) + 1
    return {path: bits(key, kernels[path]) for path, key in zip(kernels, keys, strict=False)}


def find_densities(params: PyTree, density: Density, kernels, **options) -> dict[str, float]:
    """Returns the density of each kernel, given or by a distribution."""
    if isinstance(density, Mapping):
        return pick("density", density, kernels)
    return layer_densities(params, density, **options)


def random_mask(
    params: PyTree,
    density: Density,
    *,
    seed: int = 0,
    distribution: str = "erdos_renyi_kernel",
    group: Group = cell_gates,
    where: Where | None = None,
    axes: Axes | None = None,
) -> PyTree:
    """Keeps entries at random, as many of each layer as its density says.

    Args:
      params: A tree of arrays.
      density: Share of all entries that stays, in (0, 1], for `layer_densities`; or path to the
        density of each chosen kernel.
      seed: Of the random numbers.
      distribution, group, where, axes: As in `layer_densities`.

    Returns:
      A mask. Each group keeps round(density * size) entries exactly, and at least one.

    Raises:
      ValueError: An argument is not as described, or no leaf is chosen as a kernel.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.ones(10)}
      >>> mask = rmtjax.sparsity.random_mask(params, 0.25)
      >>> int(mask["kernel"].sum()), int(mask["bias"].sum())
      (50, 10)
    """
    check_density(density)
    check_chosen(find_kernels(params, where), params, where)
    kernels = find_floating(params, where)
    options: Any = {"distribution": distribution, "group": group, "where": where, "axes": axes}
    densities = find_densities(params, density, kernels, **options)
    masks = random_masks(kernels, densities, to_groups(kernels, group), jax.random.key(seed))
    return fill(params, masks)
