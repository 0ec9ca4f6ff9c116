"""The command `rmtjax`: looks at a checkpoint, or makes a smaller one, a kernel at a time."""

import argparse
import contextlib
import html
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rmtjax import _names, shrinkage
from rmtjax._arguments import make_parser, matcher, parse_rule, UsageError
from rmtjax._files import open_tensors
from rmtjax._names import find_leaves, read_manifest
from rmtjax._plan import Plan, plan
from rmtjax._stream import analyze_file, compress_file
from rmtjax._typing import Where
from rmtjax.report import Report

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2em 0.8em; text-align: left; border-bottom: 1px solid #8884; }}
thead th {{ position: sticky; top: 0; background: Canvas; }}
tfoot td {{ font-weight: 600; }}
</style>
</head>
<body>
<h1>{title}</h1>
{table}
<p>{legend}</p>
</body>
</html>
"""
_LEGEND = (
    "A spike is an eigenvalue of the kernel's matrix, s\u00b2/n, above the threshold, which noise "
    "alone would pass with the probability --level; the distance is how far the bulk is from the "
    "law of Marchenko and Pastur."
)


def _select(path: str, include: list[str], exclude: list[str]) -> Where:
    """Chooses kernels by patterns, each of which must match: a slip would change others."""
    matchers = {pattern: matcher(pattern) for pattern in (*include, *exclude)}
    with open_tensors(path) as tensors:
        names = list(find_leaves(tensors, read_manifest(tensors)))
    for pattern, matches in matchers.items():
        if not any(map(matches, names)):
            some = ", ".join(map(repr, names[:5])) or "none"
            raise ValueError(f"{pattern!r} matches no tensor, of {len(names)} such as {some}.")

    def where(name: str, leaf: Any) -> bool:
        if any(matchers[pattern](name) for pattern in exclude):
            return False
        chosen = not include or any(matchers[pattern](name) for pattern in include)
        return name in include or (chosen and _names.is_kernel(name, leaf))

    return where


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A line that tells how far the work is, on a terminal only, and gone in the end."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        line = lambda done, total, path: f"\r\x1b[K[{done + 1}/{total}] {_printable(path)[:60]}"
        show = lambda text: print(text, end="", file=sys.stderr, flush=True)
        try:
            yield lambda *step: show(line(*step))
        finally:
            show("\r\x1b[K")
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("kernels")
        yield lambda done, total, path: bar.update(task, completed=done, total=total)


def _printable(name: str) -> str:
    """A name that cannot steer the terminal."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _write_text(path: str, text: str) -> None:
    """Writes a file in the place of what is there, whole or not at all."""
    folder, name = os.path.split(os.path.abspath(path))
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as beside:
        draft = Path(beside, name)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)


def _page(report: Report, title: str) -> str:
    fields = {"title": html.escape(title), "legend": html.escape(_LEGEND)}
    return _PAGE.format(table=report.to_html(), **fields)


def _show(report: Report, args: argparse.Namespace) -> None:
    """Writes the files asked for, then the table."""
    if args.json:
        _write_text(args.json, report.to_json() + "\n")
    if args.csv:
        _write_text(args.csv, report.to_csv())
    if args.html:
        _write_text(args.html, _page(report, f"rmtjax {args.command} {_printable(args.file)}"))
    if not args.quiet:
        rows = {_printable(path): row for path, row in report.plan.items()}
        print(Report(Plan(rows)).table(), flush=True)


def _size(path: str) -> str:
    """The size of all tensors of a checkpoint."""
    with open_tensors(path) as tensors:
        sizes = [math.prod(a.shape) * a.dtype.itemsize for a in tensors.entries.values()]
    return f"{sum(sizes) / 1e6:,.1f} MB"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What both commands tell the library; what it would refuse at any file is wrong usage."""
    options: dict[str, Any] = {"rule": parse_rule(args.rule, args.level, args.trim)}
    options |= {"min_size": args.min_size, "batch": args.batch}
    if args.command == "compress":
        options |= {"keep": args.keep, "min_rank": args.min_rank, "multiple": args.multiple}
        options["shrink"] = getattr(shrinkage, args.shrink) if args.shrink else None
    try:
        plan({}, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return options


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before the work, to write where something is that must stay, or where no one can."""
    out = getattr(args, "out", None)
    if out and os.path.lexists(out) and not args.force:
        raise FileExistsError(f"{out!r} is there already: give --force to replace it.")
    source = Path(args.file).resolve()
    taken = [source, *([Path(out).resolve()] if out else [])]
    for path in filter(None, (args.json, args.csv, args.html)):
        target = Path(path).resolve()
        if target in taken or source in target.parents:
            raise UsageError(f"{path!r} is named twice, or lies in FILE: give it another name.")
        taken.append(target)
    for path in filter(None, (out, args.json, args.csv, args.html)):
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"{path!r} cannot be written: {folder!r} is no folder.")


def _work(args: argparse.Namespace) -> None:
    """Runs the command."""
    options = _options(args)
    _check_outputs(args)
    options |= {"where": _select(args.file, args.include, args.exclude), "dtype": args.dtype}
    with _progress(args.quiet) as progress:
        options["progress"] = progress
        if args.command == "analyze":
            report = analyze_file(args.file, **options)
        else:
            report = compress_file(args.file, args.out, mode=args.mode, **options)
    _show(report, args)
    if args.command == "compress" and not args.quiet:
        before, after = (f"{_printable(path)}, {_size(path)}" for path in (args.file, args.out))
        print(f"\n{before} -> {after}", flush=True)


@contextlib.contextmanager
def _computing(device: str | None, dtype: str | None) -> Iterator[None]:
    """On a device, and with 64 bits where they are asked for."""
    before = jax.dtypes.canonicalize_dtype("float64") == "float64"
    try:
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        try:
            chosen = jax.devices(device)[0] if device else None
        except RuntimeError as error:
            raise UsageError(f"--device {device}: {error}") from error
        with jax.default_device(chosen):
            yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _run(args: argparse.Namespace) -> int:
    """Runs a command; what fails becomes a message and an exit code."""
    try:
        with _computing(args.device, args.dtype):
            _work(args)
    except BrokenPipeError:
        # Nobody reads any more, and the interpreter is to find nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("rmtjax: interrupted", file=sys.stderr)
        return 130
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"rmtjax: {_printable(str(error) or type(error).__name__)}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: The arguments; by default those of the process.

    Returns:
      The exit code: 0 done, 1 the file or the work failed, 130 interrupted, 141 broken pipe.

    Raises:
      SystemExit: With code 2 and a message for wrong usage; with 0 for `--help` and `--version`.

    Examples:
      >>> from rmtjax.cli import main
      >>> main(["analyze", "no_such_file.safetensors"])
      1
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except UsageError as error:
        parser.error(str(error))
