"""The command line: `python -m experiments.study PART --help`."""

import sys
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import subcommand

from experiments.study import (
    artefact,
    clean,
    cnn,
    driver,
    elsewhere,
    memorisation,
    pilot,
    truncation,
)

PARTS = {
    "truncation": truncation,
    "memorisation": memorisation,
    "elsewhere": elsewhere,
    "pilot": pilot,
    "clean": clean,
    "artefact": artefact,
    "cnn": cnn,
}
Command = (
    Annotated[truncation.Config, subcommand("truncation")]
    | Annotated[memorisation.Config, subcommand("memorisation")]
    | Annotated[elsewhere.Config, subcommand("elsewhere")]
    | Annotated[pilot.Config, subcommand("pilot")]
    | Annotated[clean.Config, subcommand("clean")]
    | Annotated[artefact.Config, subcommand("artefact")]
    | Annotated[cnn.Config, subcommand("cnn")]
)


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing of a part, and shows it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=210)  # of the widest table
    try:
        config = tyro.cli(Command, args=arguments, prog="python -m experiments.study")
        name = next(name for name, part in PARTS.items() if type(config) is part.Config)
        driver.study(name, PARTS[name], config, arguments, console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped. What was finished is in the file; the same command goes on.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
