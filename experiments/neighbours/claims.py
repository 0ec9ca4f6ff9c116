"""What ten systems claim, beside what this repository gives: counts from layers that are built."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import rmtjax
from experiments.neighbours import (
    arms,
    block_term,
    lenet,
    networks,
    sizes,
    sweep,
    tables,
    tensors,
)
from experiments.study.results import read
from rmtjax import lowrank, ranks

COMMAND = "python -m experiments.neighbours"


class Claim(NamedTuple):
    """A row: a system, what its paper claims, what this repository gives, and the command."""

    system: str
    paper: str
    claims: str
    ours: str
    command: str = f"{COMMAND} --claims"


def block_term_counts() -> tuple[int, int]:
    """Returns the numbers of the block-term layer of UCF11, and of the dense one.

    57,600 = 8 20 20 18 inputs and 4 gates of 256 = 4 4 4 4 units. The gates are in the first mode.
    """
    modes = ((8, 16), (20, 4), (20, 4), (18, 4))
    kernel = block_term.random_block_term(jax.random.key(0), modes, rank=4, blocks=2)
    return sizes.numbers(kernel), math.prod(kernel.shape)


def tensorized_counts(bond: int, joint: bool = True) -> tuple[int, int]:
    """Returns the weights of a tensorized LSTM of 256 units and 28 inputs, and of the dense one.

    Joint, it has one operator for the four gates of the inputs and one for those of the state. Per
    gate it has eight.
    """
    cell = (networks.JointLSTM if joint else nn.OptimizedLSTMCell)(256)
    x = jnp.zeros((1, 28))
    init = lambda: cell.init(
        jax.random.key(0), cell.initialize_carry(jax.random.key(0), x.shape), x
    )
    params = jax.eval_shape(init)["params"]
    paths = [path for path in sizes.leaves_by_path(params) if path.endswith("kernel")]
    thin = sizes.leaves_by_path(tensors.tensorized(jax.random.key(0), params, paths, bond))
    whole = sizes.leaves_by_path(params)
    count = lambda leaves: sum(sizes.numbers(leaves[path]) for path in paths)
    return count(thin), count(whole)


def low_bit_ratio(inputs: int = 1024, outputs: int = 4096) -> float:
    """Returns how many times smaller a binary kernel is, with a scale in float32 for each output.

    The kernel is that of the gates of an LSTM of 1,024 units; the paper does not say which it is.
    """
    kernel = jnp.ones((inputs, outputs))
    codes, scale = rmtjax.projections.quantize_bits(kernel, 1, scale_axis=1)
    packed = np.packbits(np.asarray(codes) > 0).nbytes
    return 4 * kernel.size / (packed + 4 * scale.size)


def train_counts() -> dict[str, int]:
    """Returns the numbers of a 512 x 512 kernel of rank or bond 16, in four forms."""
    kernel = jax.random.normal(jax.random.key(0), (512, 512))
    rows = (8, 8, 8)
    state, operator = lowrank.state_modes(rows, rows), lowrank.operator_modes(rows, rows)
    built = lambda modes: sizes.numbers(
        lowrank.tensor_train(kernel, modes, rule=ranks.fixed(16)).train
    )
    return {
        "SVD": sizes.numbers(rmtjax.factorize_matrix(kernel, 16)),
        "MPS as counted": lowrank.train_size(state, 16, attainable=False),
        "MPS": built(state),
        "MPO": built(operator),
    }


def lenet_weights() -> int:
    """Returns the weights of the LeNet5 of 2205.13571, biases not counted."""
    module = networks.LeNet5()
    x = jnp.zeros((1, 28, 28))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, False))["params"]
    leaves = sizes.leaves_by_path(params)
    return sum(sizes.numbers(leaf) for path, leaf in leaves.items() if path.endswith("kernel"))


def sweep_bonds() -> tuple[tuple[int, ...], float, tuple[int, ...], float]:
    """Returns bonds and errors of a sweep by the edge, and by eps = 0.01; 3 was planted."""
    case, found = sweep.planted(), []
    for count in (sweep.by_rule(ranks.bema()), sweep.by_eps(0.01)):
        cores = sweep.train(case, count)
        bonds = tuple(core.shape[-1] for core in cores[:-1])
        found += [bonds, sweep.error_of(cores, case)]
    return tuple(found)


def _accuracies(records: Any, letter: str, arm: str, level: float) -> str:
    """Returns an accuracy of the results, with its interval; "not run" without."""
    found = tables.tests(tables.final(records, letter, arm, level))
    if not found:
        return "not run"
    values = np.array([*found.values()])
    return f"{tables.output.interval(values, '.1f')} % ({len(values)} seeds)"


def _compare(records: Any, letter: str, level: float, *names: str) -> str:
    """Returns the accuracies of some arms at a level in words."""
    full = {arm.name for arm in arms.ALL if arm.is_full_size}
    told = [f"{n}: {_accuracies(records, letter, n, 1.0 if n in full else level)}" for n in names]
    return f"track {letter} at {100 * level:g} %: " + "; ".join(told)


def _rows(records: Any, digits: Any) -> list[Claim]:
    at = partial(_compare, records)
    bench = lambda letter: f"{COMMAND} --track {letter} --show-only"
    block, whole = block_term_counts()
    joint = [tensorized_counts(bond)[0] for bond in (2, 4, 8)]
    each = [tensorized_counts(bond, joint=False)[0] for bond in (2, 4, 8)]
    trains = train_counts()
    edge, error, eps, worse = sweep_bonds()
    listed = lambda counts: " / ".join(f"{count:,}" for count in counts)
    return [
        Claim(
            "RMT pruning", "2310.03165", "accuracy stays, or rises, as parameters go",
            at("a", 0.25, "RMT, guarded", "dense"), bench("a"),
        ),
        Claim(
            "SER", "2606.02608", "ViT-B/16 at 30 % of the entries: SER 77.9, edge budget 71.5, "
            "magnitude 67.4 %; dense 85.1",
            at("d", 0.3, "SER", "edge budget", "magnitude", "dense"), bench("d"),
        ),
        Claim(
            "variational tensor networks", "2211.14657", "each split decides the bond, by eps",
            f"planted bonds (3, 3): the edge gives {edge}, error {error:.3f}; eps = 0.01 gives "
            f"{eps}, error {worse:.3f}",
        ),
        Claim(
            "IPU, spiking", "2211.10725", "5 to 10 times the throughput of a GPU; needs an IPU",
            "the pruner on a spiking network: " + at("a", 0.25, "spiking, pruned", "spiking"),
            bench("a"),
        ),
        Claim(
            "low bits by ADMM", "2111.14836", "up to 31 times smaller",
            f"binary, a scale for each output: {low_bit_ratio():.2f} times",
        ),
        Claim(
            "LocalDrop", "2103.00719", "less overfitting than dropout",
            at("a", 0.1, "LocalDrop", "LocalDrop, rates", "truncated SVD", "dropout"), bench("a"),
        ),
        Claim(
            "Selfish RNN", "2101.09048", "random growth beats growth by gradient in RNNs",
            at("b", 0.1, "SET", "RigL"), bench("b"),
        ),
        Claim(
            "block terms", "2010.04963", "3,392 parameters, 17,388 times fewer",
            f"{block:,} of {whole:,}: {whole / block:,.2f} times",
        ),
        Claim(
            "tensorized LSTM", "2010.04196", "2,752 / 5,504 / 11,008 weights at ranks 2 / 4 / 8",
            f"joint {listed(joint)}; per gate {listed(each)}; dense {tensorized_counts(2)[1]:,}",
        ),
        Claim(
            "MPS against MPO", "2006.05442", "512 x 512, r = 16: MPS needs less than MPO",
            "; ".join(f"{name} {count:,}" for name, count in trains.items()),
        ),
        Claim(
            "SVD training", "2004.09031", "fewer operations at equal accuracy than rivals",
            at("a", 0.1, "SVD training", "truncated SVD", "low rank from scratch"), bench("a"),
        ),
        Claim(
            "dynamical low rank", "2205.13571", "LeNet5, MNIST: 98.1 %, 13,091 of 430,500 weights",
            f"the same LeNet5 has {lenet_weights():,}. "
            + "; ".join(f"{lenet.name_of(*c)}: {lenet.told(digits, c[0])}" for c in lenet.CASES)
            + ". " + at("a", 0.1, "dynamical low rank"), f"{lenet.COMMAND} --show-only",
        ),
    ]  # fmt: skip


def claims(folder: Path) -> list[Claim]:
    """Returns the rows, with accuracies from the results of a folder."""
    records: list[dict[str, Any]] = []
    for letter in "abcd":
        found = read(folder / f"track_{letter}.json")
        records += found.runs if found else []
    digits = read(folder / lenet.FILE.name)
    return _rows(records, digits.runs if digits else [])


def table(folder: Path) -> Table:
    """Returns the rows as a table."""
    shown = Table(box=None, pad_edge=False)
    columns: dict[str, Callable[[Claim], str]] = {
        "system": lambda row: f"{row.system} ({row.paper})",
        "its paper claims": lambda row: row.claims,
        "this repository gives": lambda row: row.ours,
        "command": lambda row: row.command,
    }
    for name in columns:
        shown.add_column(name, vertical="top", overflow="fold")
    for row in claims(folder):
        shown.add_row(*(cell(row) for cell in columns.values()))
    return shown
