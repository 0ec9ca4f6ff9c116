"""Arms of a spiking network (2211.10725): the kernels are those of the dense network."""

from experiments.neighbours import low_rank, networks
from experiments.neighbours.sizes import Thin
from experiments.neighbours.trainer import fit, Phase, Setting, start
from rmtjax import ranks


def _network(setting: Setting) -> networks.Spiking:
    module = setting.track.module
    return networks.Spiking(width=module.width, dropout=setting.hyper["dropout"])


def whole(setting: Setting) -> Thin:
    """Trains the dense spiking network."""
    module = _network(setting)
    training = fit(setting, start(setting, module), Phase(1.0), module)
    return Thin(training, module, repeats=module.steps)


def pruned(setting: Setting) -> Thin:
    """Trains the spiking network, keeps values that are largest over the edge, and runs it thin."""
    module = _network(setting)
    training = fit(setting, start(setting, module), Phase(low_rank.FIRST), module)
    leaks = sum(leaf.size for name, leaf in training.params.items() if name.startswith("leak"))
    training = low_rank.cut(setting, training, ranks.bema(), taken=leaks)
    training = fit(setting, training, Phase(low_rank.REST), module)
    return Thin(training, module, repeats=module.steps)
