"""Parses and checks the arguments of the command line."""

import argparse
import difflib
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from rmtjax._names import matcher
from rmtjax._version import __version__
from rmtjax.noise import ranks
from rmtjax.planning import beyond
from rmtjax.report import expand_columns

_EPILOG = """\
examples:
  rmtjax analyze model.safetensors --html report.html
  rmtjax analyze model.safetensors --columns summary,hill --csv report.csv
  rmtjax analyze checkpoint/ --rule gavish_donoho --include '*encoder*'
  rmtjax compress model.safetensors --out small.safetensors --budget 0.75
  rmtjax moments --model model.py:build --data tokens.npy --out m.safetensors
  rmtjax compress model.safetensors --out small.safetensors --budget 0.75 --moments m.safetensors
  rmtjax compress model.safetensors --out low.safetensors --mode truncate --exclude '*embed*'
  rmtjax compare model.safetensors small.safetensors --model model.py:build --data tokens.npy
  rmtjax select model.safetensors --top 25% --form axolotl
  rmtjax diff base.safetensors tuned.safetensors --lora adapter

exit codes:
  0    done
  1    the file, or the work, failed; the message is on stderr
  2    wrong usage
  129  hung up (SIGHUP)
  130  interrupted (SIGINT)
  141  the reader of the output went away
  143  terminated (SIGTERM)
A command that ends early leaves no half-written file.
"""
_WARNING = (
    "Without --budget, `compress` cuts to the spikes, which ruins most pretrained models.\n\n"
)
_INCLUDE = (
    "only kernels of this name: a glob as '*attention*', or a regular expression after 're:', "
    "can be repeated"
)
_MODEL = (
    "function that takes nothing and returns (module, variables) of linen or a model of nnx: "
    "FILE.py:FUNCTION or MODULE:FUNCTION"
)
_DATA = (
    "file of samples, first axis by first axis: .npy for one argument of the model, .npz with an "
    "array for each argument, in the order of the file"
)
# The type of the number after the colon, and the rule.
_RULES = {
    "bema": (None, ranks.bema),
    "gavish_donoho": (None, ranks.gavish_donoho),
    "energy": (float, ranks.energy),
    "fixed": (int, ranks.fixed),
    "size": (float, ranks.size),
}


class UsageError(Exception):
    """A fault of the arguments that `argparse` does not find."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage of a command is longer than its screen."""

    def error(self, message: str) -> NoReturn:
        """Prints an error and where the usage is, and ends the program with code 2."""
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}. See {self.prog} --help.\n")


class _Command(_Parser):
    """The parser of one command, which names the nearest of its options for an unknown one."""

    def parse_known_args(self, args=None, namespace=None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parses the words of the command; ends the program at a word that it does not know."""
        # Of two faults an unknown option is told first: it may be the required one, misspelled.
        for word in args or ():
            name = word.partition("=")[0]
            if name == "--":
                break
            if name.startswith("--") and not any(o.startswith(name) for o in self._options()):
                self.error(self._unknown(name))
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._options(), n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        return f"{self.prog} has no option {name}{hint}"


def parse_rule(
    text: str, level: float | None, trim: float | None, equalize: bool | str | None = None
) -> ranks.RankRule:
    """Returns a rank rule from its name, and its number after a colon: "energy:0.99"."""
    name, colon, number = text.partition(":")
    kind, rule = _RULES.get(name.replace("-", "_"), (None, None))
    if rule is None or bool(colon) != bool(kind):
        raise UsageError(
            "--rule must be bema, gavish_donoho, energy:SHARE, fixed:RANK or size:SHARE, got "
            f"{text!r}."
        )
    # Only what was given is passed on, so that the defaults stand in one place.
    given = {"level": level, "trim": trim, "equalize": equalize}
    options = {name: value for name, value in given.items() if value is not None}
    if rule is not ranks.bema and options:
        words = "--level, --trim and --equalize are options of the rule bema"
        raise UsageError(f"{words}, not of {name}.")
    try:
        return rule(kind(number)) if kind else rule(**options)
    except ValueError as error:
        raise UsageError(f"--rule {text}: {error}") from error


def parse_share(text: str) -> float:
    """Returns a share in (0, 1] from a text such as "25%" or "0.25"."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        # "200%" has its sign, so it is only too much.
        meant = f": {beyond(min(share, 1.5) if text.endswith('%') else share)}" if share > 1 else ""
        raise argparse.ArgumentTypeError(
            f"must be a share such as 25% or 0.25, got {text!r}{meant}"
        )
    return share


def parse_count(text: str) -> int:
    """Returns a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def parse_columns(text: str | None) -> tuple[str, ...]:
    """Returns the names of columns from a list with commas; none for no list."""
    try:
        return expand_columns(text.split(",")) if text is not None else ()
    except ValueError as error:
        raise UsageError(f"--columns {text}: {error}") from error


def parse_pattern(pattern: str) -> Callable[[str], bool]:
    """Returns a test of names from a glob, or from a regular expression after "re:"."""
    try:
        return matcher(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}.") from error


def _add_common(command: argparse.ArgumentParser, multiple: int, file: str = "FILE") -> None:
    add, pattern = command.add_argument, {"action": "append", "default": [], "metavar": "PATTERN"}
    add("file", metavar=file, help=".safetensors file, sharded folder or orbax checkpoint")
    rules = "bema (default), gavish_donoho, energy:SHARE, fixed:RANK or size:SHARE"
    add("--rule", default="bema", help=rules)
    add("--level", type=float, help="of bema: P(noise alone gives a spike), default 0.01")
    add("--trim", type=float, help="of bema: share left out at each end, default 0.25")
    equalize = (
        "of bema: judges and cuts kernels over the scales of their noise in rows and columns; "
        "'advise' only says which of the refused ones would fit"
    )
    modes = {"nargs": "?", "const": True, "choices": ("advise",), "metavar": "advise"}
    add("--equalize", **modes, help=equalize)
    add("--include", **pattern, help=f"{_INCLUDE}; a complete name makes a kernel of any tensor")
    add("--exclude", **pattern, help="not these kernels")
    add("--min-size", type=int, default=50, help="shortest short side that is fitted, default 50")
    add("--exact-below", type=int, default=4096, help="short sides from it on are estimated (4096)")
    add("--multiple", type=int, default=multiple, help="ranks are rounded up to it (%(default)s)")
    add("--device", help="cpu, gpu or tpu; by default what JAX chooses")
    columns = "of all forms: names or groups, with commas: summary,law,ranks,tails,cost"
    add("--columns", metavar="NAMES", help=columns)
    files = {"dest": "reports", "action": "append", "default": [], "metavar": "FILE"}
    for form in ("json", "csv", "html"):
        named = lambda path, form=form: (form, path)
        add(f"--{form}", **files, type=named, help="writes the report; '-' is stdout and no table")
    add("--quiet", action="store_true", help="no table and no progress; of select the list alone")


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    budget = "share of the parameters to reach, as 75%% or 0.75, in place of the rule's ranks"
    add("--budget", type=parse_share, help=budget)
    moments = "cuts by output: a file of `rmtjax moments` for the model of FILE"
    add("--moments", metavar="MOMENTS", help=moments)
    add("--batch", type=int, help="times each kernel with so many rows; slow factors are not used")
    add("--dtype", choices=("float32", "float64"), help="of the computation, at least")


def _add_diff(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--lora", dest="out", metavar="OUT", help="folder to write, an adapter for PEFT")
    add("--force", action="store_true", help="replaces what is in OUT")
    stored = "as in GPT-2, c_attn, q_attn, c_proj and c_fc are (inputs, outputs); else by shape"
    add("--fan-in-fan-out", action=argparse.BooleanOptionalAction, help=stored)


def _add_select(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--top", type=parse_share, default=0.25, help="share of each kind, as 25%% (default)")
    forms = "names (default), json, or axolotl: its `unfrozen_parameters`"
    add("--form", choices=("names", "json", "axolotl"), default="names", help=forms)


def _add_analyze(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    orders = "columns `traps`: spectra of so many random orders of the entries (5)"
    add("--randomized", type=int, nargs="?", const=5, default=0, metavar="DRAWS", help=orders)
    blocks = "columns `pooled`: exponents of blocks of one aspect ratio, in (0, 1] (1)"
    add("--aspect", type=float, nargs="?", const=1.0, metavar="RATIO", help=blocks)
    add("--seed", type=int, default=0, help="of the random orders (0)")
    add("--against", metavar="OLD", help="columns `change`: an earlier checkpoint of the model")


def _add_compress(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", required=True, metavar="OUT", help="file to write, NAME.safetensors")
    add("--force", action="store_true", help="replaces an existing OUT")
    modes = "factorize (default): NAME/left and NAME/right where smaller; truncate: same shapes"
    add("--mode", choices=("factorize", "truncate"), default="factorize", help=modes)
    add("--keep", type=float, default=0.0, help="share of the noise directions that stay, 0 to 1")
    add("--shrink", choices=("frobenius", "operator", "nuclear"), help="shrinks what is kept")
    add("--min-rank", type=int, default=1, help="smallest rank, default 1")


def _add_data(command: argparse.ArgumentParser, *, required: bool) -> None:
    add = command.add_argument
    add("--model", required=required, metavar="MODEL", help=_MODEL)
    add("--data", required=required, metavar="DATA", help=_DATA)
    size = "samples of one call of the model, default 32"
    add("--batch-size", type=parse_count, default=32, metavar="N", help=size)
    add("--device", help="cpu, gpu or tpu; by default what JAX chooses")
    add("--quiet", action="store_true", help="no table and no progress")
    command.set_defaults(dtype=None, reports=[], refuse=command.error)


def _add_moments(command: argparse.ArgumentParser) -> None:
    add, pattern = command.add_argument, {"action": "append", "default": [], "metavar": "PATTERN"}
    _add_data(command, required=True)
    add("--out", required=True, metavar="OUT", help="file to write, NAME.safetensors")
    add("--force", action="store_true", help="replaces an existing OUT")
    add("--include", **pattern, help=_INCLUDE)
    add("--exclude", **pattern, help="not these kernels")
    weigh = "weighs outputs by what they change of those of the model; for thousands of rows"
    add("--gradients", action="store_true", help=weigh)


def _add_compare(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_data(command, required=False)
    add("file", metavar="BEFORE", help=".safetensors file, sharded folder or orbax checkpoint")
    add("after", metavar="AFTER", help="another one of the same model, dense or thin")
    named = lambda path: ("json", path)
    words = "writes the rows; '-' is stdout and no table"
    add("--json", dest="reports", action="append", metavar="FILE", type=named, help=words)
    add("--all", action="store_true", help="the table also has the tensors that are equal")


def _epilog(command: str = "") -> str:
    """Returns the examples of a command, or of all, and the exit codes."""
    others = lambda line: line.startswith("  rmtjax ") and line.split()[1] != command
    text = "\n".join(line for line in _EPILOG.splitlines() if not (command and others(line)))
    return _WARNING + text if command in ("", "compress") else text


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    # The raw formatter keeps the lines of the epilog, which `argparse` would join.
    raw = argparse.RawDescriptionHelpFormatter
    layout = lambda name="": {"epilog": _epilog(name), "formatter_class": raw}
    text = "Finds the noise in the kernels of a checkpoint, and removes it."
    parser = _Parser(prog="rmtjax", description=text, **layout())
    parser.add_argument("--version", action="version", version=f"rmtjax {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Command
    )
    for name, text, multiple in (
        ("analyze", "a row for each kernel: its noise, its spikes, its rank", 1),
        ("compress", "writes a smaller checkpoint: of a size with --budget, or cut to spikes", 8),
        ("select", "names the kernels with most signal, to train these alone", 1),
        ("diff", "what a fine-tuning has changed, a row for each kernel, or as an adapter", 1),
    ):
        command = commands.add_parser(name, help=text, description=text, **layout(name))
        if name == "diff":
            command.add_argument("base", metavar="BASE", help="checkpoint before the fine-tuning")
            command.set_defaults(dtype=None)
            _add_diff(command)
        else:
            _add_model(command)
        _add_common(command, multiple, "TUNED" if name == "diff" else "FILE")
        own = {"analyze": _add_analyze, "compress": _add_compress, "select": _add_select}
        if name in own:
            own[name](command)
        # For faults that come up later: the help that is named is that of the command.
        command.set_defaults(refuse=command.error)
    for name, text, add in (
        (
            "moments",
            "collects what data feed to the kernels of a model, for --moments",
            _add_moments,
        ),
        ("compare", "how far tensors, and outputs on data, are from one another", _add_compare),
    ):
        add(commands.add_parser(name, help=text, description=text, **layout(name)))
    return parser
