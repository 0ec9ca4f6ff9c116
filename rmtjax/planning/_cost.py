"""What kernels cost, as they are and as thinner factors: numbers, multiply-adds, measured time."""

import contextlib
import math
import operator
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rmtjax._axes import is_factors, kernel_shape, KernelAxes, matrix_shape
from rmtjax.planning._kernels import unmatrixable

MARGIN = 0.05  # layers that gain less are not worth their loss of rank
ROUNDS, FEWEST_ROUNDS = 11, 3
BURST, BUDGET = 2e-3, 0.5  # seconds of a burst of calls, and of all rounds together
MOST = 2**26  # numbers that go into a timed product or come out: memory


class Cost(NamedTuple):
    """What a kernel costs now, and `_after` what a plan makes of it.

    The two are equal where the shape stays. A kernel that is factorized already costs now what
    its factors do.

    Attributes:
      parameters: Numbers in the kernel.
      multiply_adds: For the rows of `batch`; for one row, where `plan` was given none. Each
        parameter is used once for each row. An embedding is a lookup, which multiplies
        nothing, and of factors the right one for each row.
      milliseconds: Median time of one call with these rows; None where it was not measured.
      parameters_after: As `parameters`.
      multiply_adds_after: As `multiply_adds`.
      milliseconds_after: As `milliseconds`.
    """

    parameters: int
    multiply_adds: int
    milliseconds: float | None
    parameters_after: int
    multiply_adds_after: int
    milliseconds_after: float | None


def add_costs(costs: Iterable[Cost]) -> Cost:
    """The sum of costs; of milliseconds that of those measured, None without any."""
    add = lambda a, b: b if a is None else a if b is None else a + b
    nothing = Cost(0, 0, None, 0, 0, None)
    return reduce(lambda total, cost: Cost(*map(add, total, cost)), costs, nothing)


class Product(NamedTuple):
    """What is timed. Kernels that have it in common are timed once.

    Attributes:
      rows: Rows of the inputs.
      sides: Inputs and outputs of the kernel, of a stack those of one member.
      dtype: Of inputs and kernel.
      lookup: Whether the inputs are indices of its rows, as those of an embedding.
      ranks: The alternatives: ranks of factors, or None for the dense kernel.
    """

    rows: int
    sides: tuple[int, int]
    dtype: np.dtype
    lookup: bool
    ranks: tuple[int | None, ...]


# Milliseconds of each alternative, round by round.
Clock = Callable[[Product], Float[np.ndarray, "rounds alternatives"]]
_SHARED: ContextVar[Clock | None] = ContextVar("clock", default=None)


def check_batch(batch: int | Mapping[str, int] | None, paths: Collection[str]) -> dict[str, int]:
    """The rows of each kernel by its path; without those that are not to be timed."""
    if batch is None:
        return {}
    by_path = isinstance(batch, Mapping)
    for path, rows in batch.items() if by_path else [("", batch)]:
        if by_path and path not in paths:
            raise ValueError(
                f"`batch` has {path!r}, which is none of the kernels chosen. Name them by their "
                f"paths{', such as ' + repr(min(paths)) if paths else '; there are none'}."
            )
        if isinstance(rows, bool) or not hasattr(rows, "__index__") or rows < 1:
            place = f"[{path!r}]" if by_path else ""
            raise ValueError(
                f"`batch{place}` must be an integer of at least 1, got {rows!r}: the rows that a "
                "kernel multiplies in one call."
            )
    rows = batch if isinstance(batch, Mapping) else dict.fromkeys(paths, batch)
    return {path: operator.index(count) for path, count in rows.items()}


def compute(lookup: bool, inputs, kernel, *right):
    """A product as layers compute it, from the left: with one kernel, or with two factors."""
    hidden = jnp.take(kernel, inputs, axis=0) if lookup else inputs @ kernel
    return hidden @ right[0] if right else hidden


def operands(product: Product, rank: int | None) -> tuple[np.ndarray, ...]:
    """Inputs and kernel, or its factors. What the numbers are makes a product no slower."""
    m, n = product.sides
    shapes = [(m, n)] if rank is None else [(m, rank), (rank, n)]
    ones = [np.ones(shape, product.dtype) for shape in shapes]
    if product.lookup:  # all over the table: rows that are in the cache already would be free
        indices = np.random.default_rng(0).integers(m, size=product.rows, dtype=np.int32)
        return (indices, *ones)
    return (np.ones((product.rows, m), product.dtype), *ones)


def _burst(call: Callable[[], Any], calls: int) -> float:
    """Seconds of one call, in a burst of several: a device is not kept waiting between them."""
    begin = time.perf_counter()
    for _ in range(calls - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - begin) / calls


def _bound(product: Product) -> Product:
    """With as many rows as fit into memory easily; more would take as long, each."""
    return product._replace(rows=min(product.rows, max(1, MOST // max(product.sides))))


def time_products(product: Product) -> Float[np.ndarray, "rounds alternatives"]:
    """Milliseconds of one compiled call of each alternative, on the default device.

    They take turns, first one and then the other first, so that what else the machine does
    meets both. A round holds bursts of about two milliseconds, or one call where that takes longer;
    there are as many rounds as half a second has room for, at least 3 and at most 11.
    """
    bound = _bound(product)
    multiply = jax.jit(partial(compute, bound.lookup))
    calls = []
    for rank in bound.ranks:
        call = partial(multiply, *jax.device_put(operands(bound, rank)))
        jax.block_until_ready(call())  # compiled
        calls.append(call)
    warm = [_burst(call, 1) for call in calls]
    sizes = [int(np.clip(BURST / seconds, 1, 100)) for seconds in warm]
    rounds = int(np.clip(BUDGET / np.dot(sizes, warm), FEWEST_ROUNDS, ROUNDS))
    seconds = np.empty((rounds, len(calls)))
    for i in range(rounds):
        for k in range(len(calls))[:: 1 if i % 2 else -1]:
            seconds[i, k] = _burst(calls[k], sizes[k])
    return 1e3 * seconds * (product.rows / bound.rows)


def make_clock() -> Clock:
    """`time_products`, which remembers what it has timed: since `timing_once`, if within it."""
    return _SHARED.get() or cache(time_products)


@contextlib.contextmanager
def timing_once() -> Iterator[None]:
    """Within it, plans that are made one after another time what they have in common once."""
    token = _SHARED.set(cache(time_products))
    try:
        yield
    finally:
        _SHARED.reset(token)


def is_faster(milliseconds: Float[np.ndarray, "rounds 2"]) -> bool:
    """Whether the second alternative wins: by 5 % at least, in three rounds of four.

    Both of a round have had the same neighbours on the machine. A gain within the spread of
    the rounds, or too small to be felt, is no win.
    """
    before, after = milliseconds.T
    return bool(np.quantile(after / before, 0.75) <= 1 - MARGIN)


def hindrance(shape: tuple[int, ...], axes: KernelAxes, rank: int, thin: bool) -> str | None:
    """Why factors of this rank should not stand in the place of a kernel, or None."""
    if (*axes.batch, *axes.inputs, *axes.outputs) != tuple(range(len(shape))):
        return "factors have their axes in another order"
    if len(axes.batch) > 1:
        return f"stacked on axes {axes.batch}"
    several = not axes.batch and min(len(axes.inputs), len(axes.outputs)) > 1
    if several and shape[0] == rank == shape[axes.outputs[0]]:
        return "factors would look like those of a stack"  # see `factored_axes`
    _, rows, columns = matrix_shape(shape, axes)
    saving = thin or rank * (rows + columns) < rows * columns
    return None if saving else "no saving from factors"


class Load(NamedTuple):
    """A kernel at its work: all that its cost depends on, but the rank that it is to have.

    Attributes:
      size: Numbers in the dense kernel.
      sides: Matrices in the stack, their inputs and outputs; None for what is no matrix.
      rank: Of its factors; None where it is dense.
      dtype: Of the kernel.
      lookup: Whether it is an embedding, by its name.
      rows: Rows in one call.
      timed: Whether to time it.
    """

    size: int
    sides: tuple[int, int, int] | None
    rank: int | None
    dtype: np.dtype
    lookup: bool
    rows: int
    timed: bool


def load_of(path: str, leaf: Any, axes: KernelAxes | None, batch: Mapping[str, int]) -> Load:
    """The load of a leaf. Products of floating matrices are timed, for the rows of a batch."""
    shape, dtype = kernel_shape(leaf), jnp.result_type(*jax.tree.leaves(leaf))
    like = jax.ShapeDtypeStruct(shape, dtype)
    odd = axes is None or unmatrixable(like, axes, min_size=1)
    return Load(
        size=math.prod(shape),
        sides=matrix_shape(shape, axes) if axes is not None else None,
        rank=leaf.left.shape[-1] if is_factors(leaf) else None,
        dtype=dtype,
        lookup=path.rpartition("/")[2] == "embedding",
        rows=batch.get(path, 1),
        timed=path in batch and not odd,
    )


def _count(load: Load, rank: int | None) -> tuple[int, int]:
    """Parameters and multiply-adds with factors of a rank, or dense."""
    if rank is None or load.sides is None:
        return load.size, 0 if load.lookup else load.rows * load.size
    stack, m, n = load.sides
    numbers = stack * rank * (m + n)
    return numbers, load.rows * (stack * rank * n if load.lookup else numbers)


def weigh(load: Load, rank: int | None, clock: Clock) -> tuple[Cost, str | None]:
    """The cost of a kernel that gets factors of a rank, or why it should not, or None.

    The matrices of a stack take their turns, as under `nn.scan`: the cost of one is counted as
    often as there are matrices.

    Args:
      load: The kernel.
      rank: That of its factors after the plan; that of `load` where its shape stays.
      clock: `time_products`, with a memory.
    """
    now, then = _count(load, load.rank), _count(load, rank)
    if not load.timed or load.sides is None:
        return Cost(*now, None, *then, None), None
    stack, *sides = load.sides
    ranks = (load.rank,) if rank == load.rank else (load.rank, rank)
    times = clock(Product(load.rows, (sides[0], sides[1]), load.dtype, load.lookup, ranks))
    before, *rest = (stack * np.median(times, axis=0)).tolist()
    after = rest[0] if rest else before
    if not rest or is_faster(times):
        return Cost(*now, before, *then, after), None
    words = f"no clear gain in time, {after:.3g} ms against {before:.3g}"
    return Cost(*now, before, *now, before), words
