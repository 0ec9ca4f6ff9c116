"""The results of a part: a JSON file that grows run by run, and never mixes two studies."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from experiments import output
from experiments.study.options import Options
from rmtjax import ranks

INHERITED = {field.name for field in dataclasses.fields(Options)}


def plain(value: Any) -> Any:
    """A setting as JSON holds it: fields of a value by name, a rank rule as it is written."""
    if isinstance(value, ranks.RankRule):
        return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        kind = {"kind": type(value).__name__} if isinstance(value, nn.Module) else {}
        own = [name for name in names if not (kind and name in ("parent", "name"))]
        return kind | {name: plain(getattr(value, name)) for name in own}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def configuration(config: Options) -> dict[str, Any]:
    """The fields of a part's configuration that results depend on."""
    return {name: value for name, value in plain(config).items() if name not in INHERITED}


class Results(NamedTuple):
    """The runs that a part has made so far.

    Attributes:
      configuration: Of the last command.
      command: The last that added a run.
      environments: Those that runs were made in; a record holds the index of its own.
      runs: A record for each run: its settings, seconds, and what it found.
    """

    configuration: dict[str, Any]
    command: str
    environments: list[dict[str, Any]]
    runs: list[dict[str, Any]]

    def find(self, run: Any) -> dict[str, Any] | None:
        """The record of a run with these settings, if there is one."""
        settings = plain(run)
        return next((record for record in self.runs if record["settings"] == settings), None)

    def add(
        self, run: Any, found: dict[str, Any], seconds: float, environment: dict[str, Any]
    ) -> "Results":
        """The results with one more run."""
        environments = self.environments
        if environment not in environments:
            environments = [*environments, environment]
        record = {
            "settings": plain(run),
            "seconds": round(seconds, 1),
            "environment": environments.index(environment),
            **found,
        }
        return self._replace(environments=environments, runs=[*self.runs, record])

    def ordered(self, runs: Iterable[Any]) -> "Results":
        """The results in the order of some runs, which must hold all of them."""
        order = [plain(run) for run in runs]
        return self._replace(runs=sorted(self.runs, key=lambda r: order.index(r["settings"])))

    def discard(self, arms: tuple[str, ...]) -> "Results":
        """The results without the runs of some arms."""
        kept = [record for record in self.runs if record["settings"]["arm"] not in arms]
        return self._replace(runs=kept)

    def save(self, path: Path) -> None:
        """Writes the file, a line for each run, whole or not at all."""
        head = {
            "command": self.command,
            "configuration": self.configuration,
            "seconds": round(sum(record["seconds"] for record in self.runs), 1),
            "environments": self.environments,
        }
        # By hand, since `indent` would give each number of a history a line of its own.
        lines = [json.dumps(record, separators=(",", ":")) for record in self.runs]
        body = ",\n  ".join(lines)
        with output.replacing(path) as temporary:
            top = json.dumps(head, indent=1).removesuffix("\n}")
            temporary.write_text(f'{top},\n "runs": [\n  {body}\n ]\n}}\n')


def read(path: Path) -> Results | None:
    """Returns the results that an earlier command has written, or None.

    Raises:
      ValueError: The file is not one of these.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return Results(**{name: content[name] for name in Results._fields})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no results of the study: {error!r}. Move it away."
        ) from error


def check_same_study(results: Results, runs: Iterable[Any], config: Options, path: Path) -> None:
    """Raises ValueError if a file has runs that this configuration does not ask for.

    A configuration may ask for more (seeds, arms), never for other runs.

    Raises:
      ValueError: There is such a run; names what has changed, and what to do.
    """
    asked = [plain(run) for run in runs]
    strays = [r["settings"] for r in results.runs if r["settings"] not in asked]
    if not strays:
        return
    now = configuration(config)
    changed = [
        f"`{name}` {results.configuration.get(name)} there, {value} now"
        for name, value in now.items()
        if results.configuration.get(name) != value
    ]
    raise ValueError(
        f"{path} holds {len(strays)} runs that this configuration does not ask for, the first of "
        f"arm {strays[0]['arm']!r} ({'; '.join(changed) or 'the arm itself has changed'}). Move "
        f"the file away, give another folder as --out, or make these arms again: --discard "
        + " ".join(repr(arm) for arm in sorted({stray["arm"] for stray in strays}))
    )
