"""The command `rmtjax`: looks at a checkpoint, or makes a smaller one, a kernel at a time."""

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rmtjax._text import printable
from rmtjax._types import Where
from rmtjax.checkpoint import (
    analyze_file,
    check_target,
    compress_file,
    find_leaves,
    is_kernel_tensor,
    open_tensors,
    read_manifest,
    replacing,
    Tensors,
)
from rmtjax.cli._arguments import (
    check_outputs,
    is_special,
    is_stdout,
    make_parser,
    matcher,
    parse_rule,
    pattern_hint,
    reports,
    UsageError,
)
from rmtjax.noise import shrinkage
from rmtjax.planning import plan
from rmtjax.report import Report

# The columns of the table: what a kernel would lose is to be seen before it is cut.
FOUND = ("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "removed")
COSTS = ("parameters", "multiply_adds", "milliseconds")


def _select(tensors: Tensors, include: list[str], exclude: list[str]) -> Where:
    """Chooses kernels by patterns, each of which must match: a slip would change others."""
    matchers = {pattern: matcher(pattern) for pattern in (*include, *exclude)}
    names = list(find_leaves(tensors, read_manifest(tensors)))
    for pattern, matches in matchers.items():
        if not any(map(matches, names)):
            some = ", ".join(map(repr, names[:5])) or "none"
            cause = f"{pattern!r} matches no tensor, of {len(names)} such as {some}."
            raise ValueError(cause + pattern_hint(pattern))

    def where(name: str, leaf: Any) -> bool:
        if any(matchers[pattern](name) for pattern in exclude):
            return False
        chosen = not include or any(matchers[pattern](name) for pattern in include)
        return name in include or (chosen and is_kernel_tensor(name, leaf))

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
        line = lambda done, total, path: f"\r\x1b[K[{done + 1}/{total}] {printable(path)[:60]}"
        show = lambda text: print(text, end="", file=sys.stderr, flush=True)
        try:
            yield lambda *step: show(line(*step))
        finally:
            show("\r\x1b[K")
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("kernels")
        yield lambda done, total, path: bar.update(task, completed=done, total=total)


def _write_text(path: str, text: str) -> None:
    """Writes into a pipe or a device; a file it replaces, whole or not at all."""
    if is_stdout(path):
        print(text, end="", flush=True)
        return
    with open(path, "wb") if is_special(path) else replacing(Path(path)) as file:
        file.write(text.encode())


def _show(report: Report, args: argparse.Namespace) -> None:
    """Writes the files asked for, then the table, where stdout is free for it."""
    title = f"rmtjax {args.command} {printable(args.file)}"
    text = {
        "json": lambda: report.to_json() + "\n",
        "csv": report.to_csv,
        "html": lambda: report.to_page(title),
    }
    for form, path in reports(args).items():
        _write_text(path, text[form]())
    if not args.quiet:
        timed = report.totals.milliseconds is not None
        print(report.table(*FOUND, *(COSTS if timed else ()), "reason"), flush=True)


def _size(path: str) -> str:
    """The size of all tensors of a checkpoint."""
    with open_tensors(path) as tensors:
        sizes = [math.prod(a.shape) * a.dtype.itemsize for a in tensors.entries.values()]
    return f"{sum(sizes) / 1e6:,.1f} MB"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What both commands tell the library; what it would refuse at any file is wrong usage."""
    options: dict[str, Any] = {"rule": parse_rule(args.rule, args.level, args.trim)}
    options |= {"min_size": args.min_size, "batch": args.batch, "multiple": args.multiple}
    options |= {"exact_below": args.exact_below}
    if args.command == "compress":
        options |= {"keep": args.keep, "min_rank": args.min_rank}
        options["shrink"] = getattr(shrinkage, args.shrink) if args.shrink else None
    try:
        plan({}, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return options


def _work(args: argparse.Namespace) -> None:
    """Runs the command."""
    options = _options(args)
    check_outputs(args)
    with open_tensors(args.file) as tensors:
        for form, target in reports(args).items():
            if not is_stdout(target):
                check_target(tensors, target, f"--{form}")
        options |= {"where": _select(tensors, args.include, args.exclude), "dtype": args.dtype}
    with _progress(args.quiet) as progress:
        options["progress"] = progress
        if args.command == "analyze":
            report = analyze_file(args.file, **options)
        else:
            report = compress_file(args.file, args.out, mode=args.mode, **options)
    args.quiet |= any(map(is_stdout, reports(args).values()))  # no table in the report
    _show(report, args)
    if args.command == "compress" and not args.quiet:
        before, after = (f"{printable(path)}, {_size(path)}" for path in (args.file, args.out))
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


class _EndedError(BaseException):
    """A signal that asks for an end; no error of the work, which nothing but `_run` may catch."""


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the work, so that what is half-written is removed.

    A signal that is ignored, as under nohup, or that a caller handles, is left as it is.
    """

    def end(number: int, frame: Any):
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise _EndedError(signal.Signals(number))

    numbers = []
    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [number for number in known if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _run(args: argparse.Namespace) -> int:
    """Runs a command; what fails becomes a message and an exit code."""
    try:
        with _ending(), _computing(args.device, args.dtype):
            _work(args)
    except BrokenPipeError:
        # Nobody reads any more, and the interpreter is to find nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("rmtjax: interrupted", file=sys.stderr)
        return 130
    except _EndedError as error:
        (number,) = error.args
        print(f"rmtjax: ended by {number.name}", file=sys.stderr)
        return 128 + number
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"rmtjax: {printable(str(error) or type(error).__name__)}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: The arguments; by default those of the process.

    Returns:
      The exit code: 0 done, 1 the file or the work failed, 129 hung up, 130 interrupted, 141
      broken pipe, 143 terminated. SIGHUP and SIGTERM are caught in the main thread only, and
      where nothing else handles them.

    Raises:
      SystemExit: With code 2 and a message for wrong usage; with 0 for `--help` and `--version`.

    Examples:
      >>> from rmtjax.cli import main
      >>> main(["analyze", "no_such_file.safetensors"])
      1
    """
    args = make_parser().parse_args(argv)
    try:
        return _run(args)
    except UsageError as error:
        return args.refuse(str(error))  # leaves, with the usage of the command
