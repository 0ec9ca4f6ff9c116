"""Modes of tensor trains: how the sides of a matrix are divided among cores, and what it costs."""

import itertools
import math
from collections.abc import Sequence

from rmtjax._axes import MatrixView
from rmtjax.lowrank._train import Modes
from rmtjax.planning import check_count


def check_modes(modes: Sequence[tuple[int, int]], view: MatrixView) -> Modes:
    """Returns modes, after a core for the window of a convolution; raises ValueError if wrong."""
    pairs = tuple((int(n), int(m)) for n, m in modes)
    rows, columns = (math.prod(side) for side in zip(*pairs, strict=True)) if pairs else (0, 0)
    channels = view.shape[view.axes.inputs[-1]]
    window = view.rows // channels
    if rows == channels and window > 1:
        pairs, rows = ((window, 1), *pairs), view.rows
    few = len(pairs) < 2 or min(map(min, pairs)) < 1
    if few or (rows, columns) != (view.rows, view.columns):
        of_window = f", or to {channels} input channels" if window > 1 else ""
        raise ValueError(
            f"`modes` must be two pairs or more that multiply to {view.rows} rows{of_window} and "
            f"to {view.columns} columns, got {modes!r}."
        )
    return pairs


def balanced_modes(size: int, count: int) -> tuple[int, ...]:
    r"""Returns the division of a size into factors that are as equal as possible.

    Of all divisions into `count` factors it is the one of largest entropy
    $-\sum p_k \log p_k$, with $p_k = n_k / \sum n_k$. The factors ascend.

    Args:
      size: At least 1.
      count: Number of factors, at least 1.

    Raises:
      ValueError: A number is out of range.

    Examples:
      >>> import rmtjax
      >>> rmtjax.lowrank.balanced_modes(1024, 2), rmtjax.lowrank.balanced_modes(28, 2)
      ((32, 32), (4, 7))

    References:
      Onu, Miller and Precup (2020), https://arxiv.org/abs/2010.04196.
    """
    check_count("size", size)
    check_count("count", count)

    def divisions(rest: int, number: int, least: int):
        if number == 1:
            yield (rest,)
            return
        for factor in (f for f in range(least, rest + 1) if rest % f == 0 and f**number <= rest):
            yield from (
                (factor, *others) for others in divisions(rest // factor, number - 1, factor)
            )

    def entropy(factors):
        shares = [factor / sum(factors) for factor in factors]
        return -sum(share * math.log(share) for share in shares)

    return max(divisions(size, count, 1), key=entropy)


def operator_modes(rows: Sequence[int], columns: Sequence[int]) -> Modes:
    """Returns the modes of an operator (MPO): core k has `rows[k]` and `columns[k]`.

    Args:
      rows: Modes of the rows, the inputs of a layer.
      columns: Modes of the columns. The shorter of both ends in modes of 1.

    Examples:
      >>> import rmtjax
      >>> rmtjax.lowrank.operator_modes((4, 7), (32, 32))
      ((4, 32), (7, 32))
    """
    return tuple(itertools.zip_longest(rows, columns, fillvalue=1))


def state_modes(rows: Sequence[int], columns: Sequence[int]) -> Modes:
    """Returns the modes of a state (MPS): a core for each mode, those of the rows first.

    Args:
      rows: Modes of the rows, the inputs of a layer.
      columns: Modes of the columns.

    Examples:
      >>> import rmtjax
      >>> rmtjax.lowrank.state_modes((4, 7), (8,))
      ((4, 1), (7, 1), (1, 8))
    """
    return (*((n, 1) for n in rows), *((1, m) for m in columns))


def train_size(modes: Sequence[tuple[int, int]], bond: int, *, attainable: bool = True) -> int:
    r"""Returns the numbers in the cores of a train, $\sum_k r_{k-1} n_k m_k r_k$.

    Args:
      modes: As in `tensor_train`.
      bond: The bond, at least 1.
      attainable: Whether a bond is at most the sizes on either side of it, as `tensor_train` has
        it. Papers often count `bond` everywhere.

    Examples:
      >>> import rmtjax
      >>> modes = rmtjax.lowrank.state_modes((8, 8, 8), (8, 8, 8))
      >>> rmtjax.lowrank.train_size(modes, 16)
      6272
      >>> rmtjax.lowrank.train_size(modes, 16, attainable=False)
      8448
    """
    check_count("bond", bond)
    sizes = [n * m for n, m in modes]
    most = lambda k: min(math.prod(sizes[:k]), math.prod(sizes[k:])) if attainable else bond
    bonds = [1, *(min(bond, most(k)) for k in range(1, len(sizes))), 1]
    return sum(bonds[k] * size * bonds[k + 1] for k, size in enumerate(sizes))
