"""The command line: `python -m experiments.neighbours --help`."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from experiments import measure
from experiments.neighbours import claims, runs, tables, tracks
from experiments.neighbours.arms import Arm, on_track, TRIALS
from experiments.study.results import read, Results

FOLDER = Path(__file__).parents[1] / "results" / "neighbours"
COMMAND = "python -m experiments.neighbours"


@dataclass(frozen=True)
class Config:
    """Trains this library's ways and its neighbours at equal size, and shows what came of it.

    A run is written as soon as it is done, and is not done again.
    """

    track: Literal["a", "b", "c", "d", "e"] | None = None
    """The track to run; none runs nothing."""
    arms: tuple[str, ...] = ()
    """Arms to run; all by default."""
    seeds: int = 5
    """Seeds 0, 1, ... of each arm and level."""
    trials: int = len(TRIALS)
    """Trials of each arm, at one level and with one seed more."""
    short: bool = False
    """Small networks, few samples and steps: what it prints means nothing."""
    folder: Path = field(default=FOLDER)
    """Results, a file for each track, read and written."""
    show_only: bool = False
    """Print the tables of the files."""
    claims: bool = False
    """Print what the ten systems claim beside what this repository gives."""
    figure: bool = False
    """Draw accuracy against stored parameters and products, into the folder."""


def chosen_arms(config: Config, letter: str) -> list[Arm]:
    """Returns the arms to run; raises ValueError for a name that the track has not."""
    known = {arm.name: arm for arm in on_track(letter)}
    unknown = [name for name in config.arms if name not in known]
    if unknown:
        raise ValueError(
            f"`--arms` has {unknown[0]!r}, which is not on track {letter}. It has "
            f"{', '.join(map(repr, known))}."
        )
    return [known[name] for name in config.arms] or [*known.values()]


def path_of(config: Config, letter: str) -> Path:
    """Returns the file of a track."""
    return config.folder / f"track_{letter}{'_short' if config.short else ''}.json"


def open_results(config: Config, letter: str) -> Results:
    """Returns what is there, or nothing yet."""
    facts = {"tuning_seed": runs.TUNING_SEED, "tuned_at": tracks.TRACKS[letter].tuned_at}
    empty = Results(facts, COMMAND, [], [])
    return read(path_of(config, letter)) or empty


def run_all(config: Config, letter: str, console: Console) -> None:
    """Makes the runs that are missing, and writes the file after each."""
    results, environment = open_results(config, letter), measure.environment()
    results = results._replace(command=f"{COMMAND} --track {letter}")
    plan = (letter, chosen_arms(config, letter), [*range(config.seeds)])
    while (
        run := next(runs.plan_runs(*plan, config.trials, config.short, results.find), None)
    ) is not None:
        begin = time.perf_counter()
        found = runs.perform(run)
        seconds = time.perf_counter() - begin
        results = results.add(run, found, seconds, environment)
        results.save(path_of(config, letter))
        shown = f"test {found['test']:.2f}" if "test" in found else f"trial {run.trial}"
        console.print(
            f"{run.arm}, {100 * run.level:g} %, seed {run.seed}: {shown}, "
            f"validation {found['validation']:.2f}, {seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )


def show(config: Config, console: Console) -> None:
    """Prints the tables of all tracks that have results, or of the one that is asked for."""
    for letter in [config.track] if config.track else tracks.TRACKS:
        for table in tables.track_tables(open_results(config, letter).runs, letter):
            console.print(table)
            console.print()


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing, and shows it."""
    config = tyro.cli(Config, args=arguments, prog=COMMAND)
    console = Console(width=138)
    try:
        if config.track and not config.show_only:
            run_all(config, config.track, console)
    except KeyboardInterrupt:
        console.print("Stopped. What was finished is in the file; the same command goes on.")
        return 130
    except ValueError as error:
        console.print(str(error), highlight=False, soft_wrap=True)
        return 2
    if config.track or config.show_only:
        show(config, console)
    if config.claims:
        console.print(claims.table(config.folder))
    if config.figure:
        found = {t: open_results(config, t).runs for t in tracks.TRACKS}
        letters = [letter for letter, records in found.items() if records]
        records = [record for one in found.values() for record in one]
        tables.draw(records, letters, config.folder / "neighbours.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
