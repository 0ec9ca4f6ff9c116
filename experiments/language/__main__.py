"""The command line: `python -m experiments.language --help`."""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

import rmtjax
from experiments import measure, output
from experiments.language import cuts, figure, model, tables, text, trainer
from experiments.minilm.__main__ import RESULTS, rounded, save

SHARES = (0.75, 0.9, 0.5, 0.25)  # the one that counts most first


@dataclass(frozen=True)
class Config:
    """Trains a small causal language model, makes it smaller in several ways, and tunes it again.

    A run goes on where the last one stopped: what is in the file is not computed again.
    """

    sizes: model.Sizes = dataclasses.field(default_factory=model.Sizes)
    """Of the model."""
    steps: int = 600
    """Of its training; a fine-tuning has a tenth."""
    tokens: int = 32_768
    """Characters of the moments, from the text that is trained on."""
    tested: int = 512
    """Windows of the files that are held out."""
    seed: int = 0
    shares: tuple[float, ...] = SHARES
    """Of the parameters of the kernels in the blocks."""
    model: Path = Path("runs/language.safetensors")
    """Where the trained model is kept."""
    out: Path = RESULTS
    """Folder for language.json and language.png."""
    most: int = 999
    """Stop after so many results."""
    show_only: bool = False
    """Print the table of the file that is there, and compute nothing."""


def train(config: Config, source: text.Text, tell: Callable[[str], None]) -> Any:
    """The trained parameters: from the file of the last run, or new ones, which it then keeps."""
    start = trainer.start(config.sizes, config.seed)
    if config.model.is_file():
        return rmtjax.checkpoint.restore(config.model, like=start)
    run = config.sizes, start, source.train, config.steps, config.seed
    params = trainer.train(*run, peak=trainer.PEAK, tell=tell)
    config.model.parent.mkdir(parents=True, exist_ok=True)
    rmtjax.checkpoint.save(config.model, params)
    return params


def collect(config: Config, params: Any, source: text.Text) -> cuts.Known:
    """The moments of the kernels, with gradients, on windows of the text that is trained on."""
    count, length = config.tokens // config.sizes.length, config.sizes.length
    windows = text.draw(source.train, count, length, config.seed + 1)[:, :-1]
    batches = [windows[place : place + trainer.BATCH] for place in range(0, count, trainer.BATCH)]
    variables, key = {"params": params}, jax.random.key(config.seed)
    options: dict[str, Any] = {"where": model.in_block, "key": key}
    moments = rmtjax.linen.moments(model.Model(config.sizes), variables, batches, **options)
    return cuts.Known(params, moments)


def tune(config: Config, params: Any, source: text.Text) -> Any:
    """The parameters after a tenth of the training, on other windows."""
    run = config.sizes, params, source.train, max(config.steps // 10, 1), config.seed + 2
    return trainer.train(*run, peak=trainer.AGAIN)


def units(config: Config) -> Iterator[tuple[str, float, str]]:
    """The method, the share and what follows the cut, for each result of the study."""
    yield from (("dense", 1.0, after) for after in ("", "tuned"))
    for share in config.shares:
        yield from ((name, share, "") for name in cuts.METHODS)
        yield from ((name, share, "repaired") for name in cuts.REPAIRED)
        yield from ((name, share, "tuned") for name in cuts.TUNED)


def run(config: Config, path: Path, head: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Computes the results that the file lacks, and writes each as soon as it is known."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    same = old.get("configuration") == head["configuration"]
    # The seconds are those of the cuts; the training of the model comes on top of them.
    records = {**head, "seconds": 0.0, "runs": old.get("runs", []) if same else []}
    done = {(one["method"], one["share"], one["after"]) for one in records["runs"]}
    left = [unit for unit in units(config) if unit not in done][: config.most]
    if not left:
        return records
    source = text.read_sources()
    with console.status("training") as status:
        params = train(config, source, lambda words: status.update(f"training, {words}"))
    windows = text.spread(source.test, config.tested, config.sizes.length)
    perplexity = trainer.perplexity_on(config.sizes, windows)
    with console.status("moments"):
        known = collect(config, params, source)
    for name, share, after in left:
        begin = time.perf_counter()
        with console.status(f"{name}, {share:.0%} {after}"):
            tree = params if name == "dense" else cuts.METHODS[name](known, share)
            tree = cuts.repair(known, tree) if after == "repaired" else tree
            tree = tune(config, tree, source) if after == "tuned" else tree
            found = {"kept": cuts.kept(known, tree), "perplexity": perplexity(tree)}
        seconds = round(time.perf_counter() - begin, 1)
        one = {"method": name, "share": share, "after": after, **rounded(found)}
        records["runs"].append(one | {"seconds": seconds})
        records["seconds"] = round(sum(one["seconds"] for one in records["runs"]), 1)
        save(path, records)
    return records


def without_slices(arguments: list[str]) -> list[str]:
    """Returns arguments without `--most N`: slices end where one command would have ended."""
    if "--most" not in arguments:
        return arguments
    place = arguments.index("--most")
    return arguments[:place] + arguments[place + 2 :]


def main(arguments: list[str] | None = None) -> int:
    """Reads the options and does what they ask for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=140)
    command = "python -m experiments.language"
    try:
        config = tyro.cli(Config, args=arguments, prog=command)
        path = config.out / "language.json"
        if config.show_only:
            records = json.loads(path.read_text())
        else:
            fields = dataclasses.asdict(config)
            told = ("sizes", "steps", "tokens", "tested", "seed")
            head = {
                "command": shlex.join([*command.split(), *without_slices(arguments)]),
                "configuration": {name: fields[name] for name in told},
                "environment": measure.environment(),
            }
            records = run(config, path, head, console)
            with output.replacing(path.with_suffix(".png")) as temporary:
                figure.draw(records).savefig(temporary, dpi=100, format="png")
        for table in tables.tables(records):
            console.print(table)
            console.print()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
