"""The arguments of the command line, and what they mean."""

import argparse
import fnmatch
import os
import re
import stat
from collections.abc import Callable
from typing import Any

from rmtjax._version import __version__
from rmtjax.noise import ranks

_EPILOG = """\
examples:
  rmtjax analyze model.safetensors --html report.html
  rmtjax analyze checkpoint/ --rule gavish_donoho --include '*encoder*'
  rmtjax compress model.safetensors --out thin.safetensors
  rmtjax compress model.safetensors --out low.safetensors --mode truncate --exclude '*embed*'

exit codes:
  0    done
  1    the file, or the work, failed; the message is on stderr
  2    wrong usage
  129  hung up (SIGHUP)
  130  interrupted (SIGINT)
  141  the reader of the output went away
  143  terminated (SIGTERM)
However a command ends, it leaves no half-written file.
"""
_RULES = {
    "bema": (None, ranks.bema),
    "gavish_donoho": (None, ranks.gavish_donoho),
    "energy": (float, ranks.energy),
    "fixed": (int, ranks.fixed),
}


FORMS = ("json", "csv", "html")


class UsageError(Exception):
    """What is wrong with the arguments, known only once they are seen together."""


def parse_rule(text: str, level: float | None, trim: float | None) -> ranks.RankRule:
    """A rank rule from its name, with a number after a colon where it has one."""
    name, colon, number = text.partition(":")
    kind, rule = _RULES.get(name.replace("-", "_"), (None, None))
    if rule is None or bool(colon) != bool(kind):
        raise UsageError(
            f"--rule must be bema, gavish_donoho, energy:SHARE or fixed:RANK, got {text!r}."
        )
    options = {"level": level, "trim": trim} if rule is ranks.bema else {}
    options = {name: value for name, value in options.items() if value is not None}
    if rule is not ranks.bema and (level, trim) != (None, None):
        raise UsageError(f"--level and --trim are options of the rule bema, not of {name}.")
    try:
        return rule(kind(number)) if kind else rule(**options)
    except ValueError as error:
        raise UsageError(f"--rule {text}: {error}") from error


def matcher(pattern: str) -> Callable[[str], Any]:
    """A test of names, from a glob, or from a regular expression after "re:"."""
    if not pattern.startswith("re:"):
        # A name in full may have brackets, which are no set of letters then.
        return lambda name: name == pattern or fnmatch.fnmatchcase(name, pattern)
    try:
        return re.compile(pattern[3:]).search
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}.") from error


def pattern_hint(pattern: str) -> str:
    """What a glob that matches nothing may have lacked."""
    if pattern.startswith("re:"):
        return ""
    return (
        " A glob must match the whole name, and '*' stands for anything: "
        f"'*{pattern.strip('*./')}*' finds it anywhere in a name."
    )


def is_stdout(path: str) -> bool:
    """Whether a report is to go where the table would, by the name "-" or another one."""
    try:
        return path == "-" or os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def is_special(path: str) -> bool:
    """Whether there is something that is written into, and not replaced: a pipe, a device."""
    return os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode)


def reports(args: argparse.Namespace) -> dict[str, str]:
    """Form to path of each report that is asked for."""
    return {form: getattr(args, form) for form in FORMS if getattr(args, form)}


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before the work, to write where something must stay, or where no one can."""
    out, files = getattr(args, "out", None), reports(args).values()
    if out and os.path.lexists(out) and not args.force:
        raise FileExistsError(f"{out!r} is there already: give --force to replace it.")
    taken = {os.path.realpath(out)} if out else set()
    for path in files:
        target = "-" if is_stdout(path) else os.path.realpath(path)
        if target in taken:
            raise UsageError(f"{path!r} is named twice: give it another name.")
        taken.add(target)
    for path in filter(None, (out, *files)):
        folder = os.path.dirname(os.path.realpath(path))
        if path != "-" and not is_special(path) and not os.path.isdir(folder):
            raise NotADirectoryError(f"{path!r} cannot be written: {folder!r} is no folder.")
        if os.path.isdir(path):
            raise IsADirectoryError(f"{path!r} is a folder: give the path of a file.")


def _add_common(command: argparse.ArgumentParser, multiple: int) -> None:
    add = command.add_argument
    add("file", metavar="FILE", help=".safetensors file, sharded folder or orbax checkpoint")
    add(
        "--rule",
        default="bema",
        help="bema (default), gavish_donoho, energy:SHARE such as energy:0.99, fixed:RANK",
    )
    add("--level", type=float, help="of bema: P(noise alone gives a spike), default 0.1")
    add("--trim", type=float, help="of bema: share left out at each end, default 0.25")
    add(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="kernels with such a name only; a glob of the whole name, as '*attention*', or a "
        "regular expression after 're:'; may be given again; a name in full makes a kernel of any "
        "tensor",
    )
    add("--exclude", action="append", default=[], metavar="PATTERN", help="no such kernels")
    add("--min-size", type=int, default=50, help="shortest short side that is fitted, default 50")
    add(
        "--exact-below",
        type=int,
        default=4096,
        help="spectra are estimated from this short side on, default 4096",
    )
    add(
        "--multiple",
        type=int,
        default=multiple,
        help="ranks are rounded up to it; default 1 in analyze, which tells them as they are, and "
        "8 in compress, so that few shapes are compiled",
    )
    add("--batch", type=int, help="rows to time each kernel with: keeps what factors do not win")
    add("--dtype", choices=("float32", "float64"), help="of the computation, at least")
    add("--device", help="cpu, gpu or tpu; by default what JAX chooses")
    for form in FORMS:
        add(
            f"--{form}",
            metavar="FILE",
            help=f"writes the report as {form.upper()}; to stdout with '-', and then no table",
        )
    add("--quiet", action="store_true", help="no table and no progress")


def _add_compress(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", required=True, metavar="OUT", help="file to write, NAME.safetensors")
    add("--force", action="store_true", help="replaces OUT if it is there")
    add(
        "--mode",
        choices=("factorize", "truncate"),
        default="factorize",
        help="factorize (default): thin factors NAME/left and NAME/right where smaller; "
        "truncate: lower rank, same names and shapes",
    )
    add("--keep", type=float, default=0.0, help="share of the noise directions that stay, 0 to 1")
    add("--shrink", choices=("frobenius", "operator", "nuclear"), help="shrinks what is kept")
    add("--min-rank", type=int, default=1, help="smallest rank, default 1")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="rmtjax",
        description="Finds the noise in the kernels of a checkpoint, and removes it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rmtjax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, multiple, add_own in (
        ("analyze", "a row for each kernel: its noise, its spikes, its rank", 1, None),
        ("compress", "writes a checkpoint whose kernels are cut to their spikes", 8, _add_compress),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(command, multiple)
        if add_own is not None:
            add_own(command)
        command.set_defaults(refuse=command.error)
    return parser
