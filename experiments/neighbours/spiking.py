"""Arms of a spiking network (2211.10725): the kernels are those of the dense network."""

from experiments.neighbours import allocation, networks
from experiments.neighbours.sizes import Thin
from experiments.neighbours.trainer import fit, Phase, Setting, start, Training


def _network(setting: Setting) -> networks.Spiking:
    module = setting.track.module
    return networks.Spiking(width=module.width, dropout=setting.hyper["dropout"])


def whole(setting: Setting) -> Thin:
    """Trains the dense spiking network."""
    module = _network(setting)
    training = fit(setting, start(setting, module), Phase(1.0), module)
    return Thin(training, module, repeats=module.steps)


def _first(setting: Setting) -> Training:
    module = _network(setting)
    return fit(setting, start(setting, module), Phase(allocation.FIRST), module)


def pruned(setting: Setting) -> Thin:
    """Trains the spiking network; `rmtjax.plan` divides a budget; it trains on and runs thin."""
    module, training = _network(setting), allocation.first(setting, _first)
    leaks = sum(leaf.size for name, leaf in training.params.items() if name.startswith("leak"))
    ranked = allocation.kept(setting, _first, allocation.by_budget, taken=leaks)
    training = allocation.factorize(setting, training, ranked)
    training = fit(setting, training, Phase(allocation.REST), module)
    return Thin(training, module, repeats=module.steps)
