"""Costs of kernels as they are and as thinner factors: numbers, multiply-adds, measured time."""

import math
import operator
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from rmtjax._axes import FactoredKernel, kernel_shape, KernelLeaf, MatrixView
from rmtjax._names import is_table
from rmtjax.planning._kernels import last_leaves, obstacle

MARGIN = 0.05  # a layer that gains less is not worth its loss of rank
ROUNDS, FEWEST_ROUNDS = 11, 3
BURST, BUDGET = 2e-3, 0.5  # seconds of a burst of calls, and of all rounds together
MOST_RANKS = 16  # of factors, timed for a budget of milliseconds
# More entries in the inputs or outputs of a timed product would take gigabytes of memory.
MOST = 2**26


class Cost(NamedTuple):
    """The cost of a kernel, or of its factors, as they are and `_after` a plan.

    Attributes:
      parameters: Numbers in the kernel.
      multiply_adds: For the rows of `batch`, or for one row if `plan` was given none. An embedding
        is a lookup, which multiplies nothing; of its factors, only the right one multiplies.
      milliseconds: Median time of one call with these rows; None where it was not measured.
      parameters_after: As `parameters`; equal where the shape stays.
      multiply_adds_after: As `multiply_adds`.
      milliseconds_after: As `milliseconds`.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> cost = rmtjax.plan(params, rule=rmtjax.ranks.fixed(8))["kernel"].cost
      >>> cost.parameters, cost.parameters_after
      (4800, 1120)
    """

    parameters: int
    multiply_adds: int
    milliseconds: float | None
    parameters_after: int
    multiply_adds_after: int
    milliseconds_after: float | None


def add_costs(costs: Iterable[Cost]) -> Cost:
    """Returns the sum of costs; of milliseconds, that of those measured, None without any."""
    add = lambda a, b: b if a is None else a if b is None else a + b
    nothing = Cost(0, 0, None, 0, 0, None)
    return reduce(lambda total, cost: Cost(*map(add, total, cost)), costs, nothing)


class Product(NamedTuple):
    """A product that is timed. Kernels with the same one are timed once."""

    rows: int  # of the inputs
    sides: tuple[int, int]  # inputs and outputs of the kernel, of a stack those of one member
    dtype: np.dtype  # of inputs and kernel
    lookup: bool  # whether the inputs are indices of rows, as those of an embedding
    ranks: tuple[int | None, ...]  # the alternatives: ranks of factors, None for the dense kernel


Times = Float[np.ndarray, "rounds alternatives"]  # milliseconds
Clock = Callable[[Product], Times]


class Timed(NamedTuple):
    """Holds the times of a product, as it is and with factors of some ranks."""

    product: Product
    times: Times


def remember(clock: Clock, timed: Iterable[Timed]) -> Clock:
    """Returns a clock that looks up what was timed, so that one product has one time."""
    known = {one.product._replace(ranks=()): one for one in timed}

    def look(product: Product) -> Times:
        one = known.get(product._replace(ranks=()))
        if one is None or not {*product.ranks} <= {*one.product.ranks}:
            return clock(product)
        return one.times[:, [one.product.ranks.index(rank) for rank in product.ranks]]

    return look


def rows_by_path(batch: int | Mapping[str, int] | None, paths: Collection[str]) -> dict[str, int]:
    """Returns the rows of each kernel that is to be timed; raises ValueError for other paths."""
    if batch is None:
        return {}
    if not isinstance(batch, Mapping):
        return dict.fromkeys(paths, operator.index(batch))
    unknown = min(batch.keys() - set(paths), default=None)
    if unknown is not None:
        raise ValueError(
            f"`batch` has {unknown!r}, which is none of the kernels chosen. Name them by their "
            f"paths{', such as ' + repr(min(paths)) if paths else '; there are none'}."
        )
    return {path: operator.index(rows) for path, rows in batch.items()}


def compute(lookup: bool, inputs, kernel, *right):
    """Multiplies as layers do, from the left: with one kernel, or with two factors."""
    hidden = jnp.take(kernel, inputs, axis=0) if lookup else inputs @ kernel
    return hidden @ right[0] if right else hidden


def operands(product: Product, rank: int | None) -> tuple[np.ndarray, ...]:
    """Returns inputs and kernel, or its factors: of ones, since values do not change the time."""
    m, n = product.sides
    shapes = [(m, n)] if rank is None else [(m, rank), (rank, n)]
    ones = [np.ones(shape, product.dtype) for shape in shapes]
    if product.lookup:
        # Spread over the table: rows that are in the cache already would cost nothing.
        indices = np.random.default_rng(0).integers(m, size=product.rows, dtype=np.int32)
        return (indices, *ones)
    return (np.ones((product.rows, m), product.dtype), *ones)


def time_burst(call: Callable[[], Any], calls: int) -> float:
    """Returns the seconds of one call in a burst: the device does not wait between calls."""
    begin = time.perf_counter()
    for _ in range(calls - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - begin) / calls


def time_products(product: Product, burst: Callable = time_burst, most: int = MOST) -> Times:
    """Returns milliseconds of one compiled call of each alternative, on the default device.

    A round holds bursts of `BURST` seconds, or one call if that takes longer, and `BUDGET` limits
    the rounds. Rows beyond `most` entries are not run: each would take as long.
    """
    rows = min(product.rows, max(1, most // max(product.sides)))
    bound = product._replace(rows=rows)
    multiply = jax.jit(partial(compute, bound.lookup))
    calls = []
    for rank in bound.ranks:
        call = partial(multiply, *jax.device_put(operands(bound, rank)))
        jax.block_until_ready(call())  # compiled
        calls.append(call)
    warm = [burst(call, 1) for call in calls]
    sizes = [int(np.clip(BURST / seconds, 1, 100)) for seconds in warm]
    rounds = int(np.clip(BUDGET / np.dot(sizes, warm), FEWEST_ROUNDS, ROUNDS))
    seconds = np.empty((rounds, len(calls)))
    for i in range(rounds):
        # The alternatives change places each round, so that other work on the machine meets both.
        for k in range(len(calls))[:: 1 if i % 2 else -1]:
            seconds[i, k] = burst(calls[k], sizes[k])
    return 1e3 * seconds * (product.rows / rows)


def is_faster(milliseconds: Float[np.ndarray, "rounds 2"]) -> bool:
    """Returns True if the second alternative wins by 5 % at least, in three rounds of four."""
    # Ratios within a round: both alternatives met the same neighbours on the machine.
    before, after = milliseconds.T
    return bool(np.quantile(after / before, 0.75) <= 1 - MARGIN)


def hindrance(view: MatrixView, rank: int) -> str | None:
    """Returns why factors of this rank should not replace a kernel, or None."""
    axes, shape = view.axes, view.shape
    if axes.order != tuple(range(len(shape))):
        return "factors have their axes in another order"
    if len(axes.batch) > 1:
        return f"stacked on axes {axes.batch}"
    several = not axes.batch and min(len(axes.inputs), len(axes.outputs)) > 1
    if several and shape[0] == rank == shape[axes.outputs[0]]:
        return "factors would look like those of a stack"  # see `factored_axes`
    saving = view.is_factored or rank * (view.rows + view.columns) < view.rows * view.columns
    return None if saving else "no saving from factors"


def count(kernel: KernelLeaf, rows: int, rank: int | None) -> tuple[int, int]:
    """Returns parameters and multiply-adds with factors of a rank, or dense.

    A lookup in a table of embeddings multiplies nothing.
    """
    if isinstance(kernel.leaf, FactoredKernel):
        held = sum(math.prod(part.shape) for part in jax.tree.leaves(kernel.leaf))
        return held, rows * kernel.leaf.multiply_adds
    left, right = math.prod(kernel.shape), 0
    if rank is not None and isinstance(kernel, MatrixView):
        left, right = (kernel.stack * rank * side for side in (kernel.rows, kernel.columns))
    return left + right, rows * (right if is_table(kernel.path, kernel.shape) else left + right)


def is_timed(kernel: KernelLeaf) -> TypeGuard[MatrixView]:
    """Returns True for a kernel whose products can be timed."""
    return isinstance(kernel, MatrixView) and not (kernel.in_parts or obstacle(kernel, min_size=1))


def time_ranks(kernel: MatrixView, rows: int, ranks: Sequence[int], clock: Clock) -> Timed:
    """Returns the times of a kernel as it is, and with factors of at most `MOST_RANKS` ranks."""
    places = np.linspace(0, len(ranks) - 1, min(len(ranks), MOST_RANKS)).round().astype(int)
    chosen = (kernel.rank, *(ranks[place] for place in places))
    lookup = is_table(kernel.path, kernel.shape)
    product = Product(rows, (kernel.rows, kernel.columns), kernel.dtype, lookup, chosen)
    return Timed(product, clock(product))


def nanoseconds(timed: Timed, stack: int) -> dict[int | None, int]:
    """Returns median times by rank: of the kernel as it is, and of factors that are faster."""
    (whole, *ranks), times = timed.product.ranks, timed.times
    medians = np.median(times, axis=0) * stack * 1e6
    won = {r: medians[k] for k, r in enumerate(ranks, 1) if is_faster(times[:, [0, k]])}
    # More rank is more time: what a noisy clock says otherwise saves nothing.
    found, last = {whole: int(medians[0])}, 0
    for rank, median in won.items():
        found[rank] = last = max(int(median), last + 1)
    return found


def weigh(
    kernel: KernelLeaf, rank: int | None, rows: int | None, clock: Clock
) -> tuple[Cost, str | None]:
    """Returns the cost of a kernel, and why it should not get factors of a rank, or None.

    The matrices of a stack take turns, as under `nn.scan`. `rank` is that of `kernel` where its
    shape stays. Without `rows`, the time is not measured.
    """
    lookup = is_table(kernel.path, kernel.shape)
    before, after = (count(kernel, rows or 1, r) for r in (kernel.rank, rank))
    if rows is None or not is_timed(kernel):
        return Cost(*before, None, *after, None), None
    ranks = (rank,) if rank == kernel.rank else (kernel.rank, rank)
    times = clock(Product(rows, (kernel.rows, kernel.columns), kernel.dtype, lookup, ranks))
    medians = (kernel.stack * np.median(times, axis=0)).tolist()
    old, new = medians[0], medians[-1]  # one and the same where the rank stays
    if len(ranks) == 1 or is_faster(times):
        return Cost(*before, old, *after, new), None
    cause = f"no clear gain in time, {new:.3g} ms against {old:.3g}"
    return Cost(*before, old, *before, old), cause


class Others(NamedTuple):
    """Counts what a plan has no row for, such as biases and scales.

    Attributes:
      tensors: The number of leaves.
      parameters: The numbers in them.
    """

    tensors: int = 0
    parameters: int = 0


NO_OTHERS = Others()


def count_others(params: PyTree, rows: Mapping[str, Any]) -> Others:
    """Counts the leaves of a tree, or of a dictionary by path, that have no row."""
    leaves = [leaf for path, leaf in last_leaves(params).items() if path not in rows]
    return Others(len(leaves), sum(math.prod(kernel_shape(leaf)) for leaf in leaves))
