"""Arms of tensors: trains of a trained network, and layers that are tensors from the first step."""

import math

import flax.linen as nn
import jax

from experiments.neighbours import allocation, block_term, sizes, tracks
from experiments.neighbours.sizes import Thin
from experiments.neighbours.trainer import fit, Phase, pretrained, Setting, start, Training
from rmtjax import lowrank, ranks


def _numbers(setting: Setting) -> dict[str, int]:
    """Returns the numbers of each kernel: those that truncated SVD gives it."""
    ranked = allocation.kept(setting, allocation.dense, allocation.by_energy)
    return allocation.numbers_of(setting, ranked)


def _modes(setting: Setting, path: str, state: bool):
    """Returns the modes of a kernel: as a state two for each side, as an operator two pairs.

    Of a convolution the window is a mode of its own, which comes first.
    """
    rows, columns = sizes.shapes(setting.track)[path]
    leaves = sizes.leaves_by_path(tracks.dense(setting.track.module, setting.track).shapes)
    channels = leaves[path].shape[-2]
    rows = lowrank.balanced_modes(channels if not state else rows, 2)
    columns = lowrank.balanced_modes(columns, 2)
    return (lowrank.state_modes if state else lowrank.operator_modes)(rows, columns)


def _whole_modes(setting: Setting, path: str, modes):
    """Returns modes with the core of the window, as `to_trains` adds it."""
    window = sizes.shapes(setting.track)[path][0] // math.prod(n for n, _ in modes)
    return ((window, 1), *modes) if window > 1 else modes


def bond_of(modes, size: int) -> int:
    """Returns the largest bond whose train has at most so many numbers; 1 at least."""
    most = math.prod(n * m for n, m in modes)
    fits = (bond for bond in range(1, most) if lowrank.train_size(modes, bond + 1) > size)
    return next(fits, 1)


def _to_operators(setting: Setting, training: Training) -> Training:
    """Returns the network with kernels as operators, each with its share of the numbers."""
    params = training.params
    for path, size in _numbers(setting).items():
        modes = _modes(setting, path, state=False)
        bond = bond_of(_whole_modes(setting, path, modes), size)
        axes = tracks.dense(setting.track.module, setting.track).axes
        params = lowrank.to_trains(params, {path: modes}, rule=ranks.fixed(bond), axes=axes).params
    return training._replace(params=params)


def operator(setting: Setting) -> Thin:
    """Trains the dense network; kernels become operators (MPO), which train on."""
    training = _to_operators(setting, pretrained(setting, allocation.FIRST))
    return Thin(fit(setting, training, Phase(allocation.REST)))


def operator_from_scratch(setting: Setting) -> Thin:
    """Trains operators from the first step on, from the cut of the initial network."""
    return Thin(fit(setting, _to_operators(setting, start(setting)), Phase(1.0)))


def state(setting: Setting) -> Thin:
    """Trains the dense network; kernels become states (MPS), whose middle bond is the rank."""
    training = pretrained(setting, allocation.FIRST)
    params, axes = training.params, tracks.dense(setting.track.module, setting.track).axes
    for path, size in _numbers(setting).items():
        modes = _modes(setting, path, state=True)
        bond = bond_of(modes, size)
        params = lowrank.to_trains(params, {path: modes}, rule=ranks.fixed(bond), axes=axes).params
    return Thin(fit(setting, training._replace(params=params), Phase(allocation.REST)))


def block_terms(setting: Setting) -> Thin:
    """Trains sums of Tucker terms from the first step on."""
    training, numbers = start(setting), _numbers(setting)
    shapes, found = sizes.shapes(setting.track), {}
    leaves = sizes.leaves_by_path(training.params)
    for i, (path, (m, n)) in enumerate(shapes.items()):
        modes = tuple(zip(*(lowrank.balanced_modes(side, 2) for side in (m, n)), strict=True))
        rank, blocks = block_term.best_blocks(modes, numbers[path])
        key = jax.random.fold_in(jax.random.key(setting.seed), 100 + i)
        inputs = leaves[path].shape[:-1]
        found[path] = block_term.random_block_term(key, modes, rank, blocks, inputs)
    params = replaced(training.params, found)
    return Thin(fit(setting, training._replace(params=params), Phase(1.0)))


def replaced(params, found):
    """Returns a tree with other leaves at some paths."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda p, leaf: found.get(name(p), leaf), params)


def random_train(key: jax.Array, modes, bond: int) -> lowrank.TensorTrain:
    """Returns an operator with Glorot's variance 2 / (rows + columns), shared by its cores."""
    rows, columns = (math.prod(side) for side in zip(*modes, strict=True))
    bonds = [1, *[bond] * (len(modes) - 1), 1]
    variance = 2 / (rows + columns) / bond ** (len(modes) - 1)
    deviation = variance ** (0.5 / len(modes))
    draw = lambda k, *shape: deviation * jax.random.normal(jax.random.fold_in(key, k), shape)
    cores = tuple(draw(k, bonds[k], n, m, bonds[k + 1]) for k, (n, m) in enumerate(modes))
    return lowrank.TensorTrain(cores, (rows,), (columns,))


def operator_modes(rows: int, columns: int):
    """Returns the two pairs of modes that the authors of 2010.04196 take."""
    return lowrank.operator_modes(*(lowrank.balanced_modes(side, 2) for side in (rows, columns)))


def tensorized(key: jax.Array, params, paths, bond: int):
    """Returns a tree with random operators of two cores for some kernels."""
    leaves, found = sizes.leaves_by_path(params), {}
    for i, path in enumerate(paths):
        modes = operator_modes(*leaves[path].shape)
        found[path] = random_train(jax.random.fold_in(key, i), modes, bond)
    return replaced(params, found)


def _tensorized_cell(setting: Setting, module: nn.Module) -> Thin:
    """Trains a cell whose kernels are operators, with the largest bond that fits."""
    track = setting.track
    training = start(setting, module)
    leaves = sizes.leaves_by_path(training.params)
    paths = [path for path in leaves if path.startswith("cell/") and path.endswith("kernel")]
    limit, bond = sizes.budget(track, setting.level), 1
    cost = lambda bond: sum(
        lowrank.train_size(operator_modes(*leaves[p].shape), bond, attainable=False) for p in paths
    )
    while cost(bond + 1) <= limit:
        bond += 1
    key = jax.random.fold_in(jax.random.key(setting.seed), 100)
    params = tensorized(key, training.params, paths, bond)
    training = training._replace(params=params)
    return Thin(fit(setting, training, Phase(1.0), module), module)


def joint_gates(setting: Setting) -> Thin:
    """Trains an LSTM whose gates are one operator of the inputs and one of the state."""
    return _tensorized_cell(setting, setting.module)


def single_gates(setting: Setting) -> Thin:
    """Trains an LSTM with an operator for each gate."""
    module = setting.module.clone(cell=nn.OptimizedLSTMCell)
    return _tensorized_cell(setting, module)
