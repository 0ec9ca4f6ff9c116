"""Runs the command `rmtjax`, which analyzes, compresses and compares checkpoints."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from rmtjax import adapters, checkpoint
from rmtjax._progress import Progress
from rmtjax._text import printable
from rmtjax._types import Where
from rmtjax.cli._arguments import (
    make_parser,
    parse_columns,
    parse_pattern,
    parse_rule,
    UsageError,
)
from rmtjax.cli._data import collect_moments, compare
from rmtjax.cli._outputs import check_outputs, is_stdout, write_text
from rmtjax.moments import Moments
from rmtjax.noise import shrinkage
from rmtjax.planning import check_matches, PlanOptions
from rmtjax.report import compare_reports, Extra, most_signal, Report

# `removed` shows what a kernel would lose, before it is cut.
FITTED = ("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "removed")
# A budget finds no noise: it needs no fit.
SIZED = ("path", "shape", "rank", "removed")
OUTPUTS = ("removed_outputs",)
COSTS = ("parameters", "multiply_adds", "milliseconds")
EXTRA = ("randomized", "aspect", "seed")  # of `analyze` alone


def _select(tensors: checkpoint.Tensors, include: list[str], exclude: list[str]) -> Where | None:
    """Returns the choice of kernels by patterns; raises ValueError if one matches nothing."""
    matchers = {pattern: parse_pattern(pattern) for pattern in (*include, *exclude)}
    leaves = checkpoint.find_leaves(tensors, checkpoint.read_manifest(tensors))
    for pattern in matchers:
        check_matches(pattern, leaves)

    def where(name: str, leaf: Any) -> bool:
        if any(matchers[pattern](name) for pattern in exclude):
            return False
        # A complete name chooses any tensor; a pattern chooses among the kernels.
        chosen = not include or any(matchers[pattern](name) for pattern in include)
        return name in include or (chosen and checkpoint.is_kernel_tensor(name, leaf))

    # Without patterns, tensors that may be kernels under another name are told.
    return where if matchers else None


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Yields what shows the progress on a terminal, and clears it in the end."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield True
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("kernels")
        yield lambda done, total, path: bar.update(task, completed=done, total=total)


def _show(report: Report, args: argparse.Namespace, table: bool) -> None:
    """Writes the reports, and prints the table."""
    columns = parse_columns(args.columns)
    page = lambda: report.to_page(f"rmtjax {args.command} {printable(args.file)}", *columns)
    data = {"json": lambda: report.to_json(*columns) + "\n", "csv": lambda: report.to_csv(*columns)}
    make = {**data, "html": page}
    for form, path in args.reports:
        write_text(path, make[form]())
    if table and not args.quiet:
        timed = report.totals.milliseconds is not None
        by_output = any(row.removed_outputs is not None for row in report.rows)
        shown = columns or (
            *(FITTED if getattr(args, "budget", None) is None else SIZED),
            *(OUTPUTS if by_output else ()),
            *(COSTS if timed else ()),
            *(("change",) if getattr(args, "against", None) is not None else ()),
            *(("traps",) if getattr(args, "randomized", 0) else ()),
            *(("pooled",) if getattr(args, "aspect", None) is not None else ()),
            "reason",
        )
        # A terminal has its width. Columns that were asked for are all printed.
        narrow = not columns and (sys.stdout.isatty() or "COLUMNS" in os.environ)
        width = shutil.get_terminal_size().columns if narrow else None
        # What a difference has found is no plan to cut the model: its own words follow.
        summary = "" if args.command == "diff" else f"\n\n{report.summary}"
        print(f"{report.table(*shown, width=width)}{summary}", flush=True)


def _size(path: str) -> str:
    """Returns the size of all tensors of a checkpoint."""
    with checkpoint.open_tensors(path) as tensors:
        size = sum(entry.num_bytes for entry in tensors.entries.values())
    return f"{size / 1e6:,.1f} MB"


def _load_moments(path: str) -> Moments:
    """Loads moments; an error says which file is wanted."""
    try:
        return checkpoint.load_moments(path)
    except ValueError as error:
        raise ValueError(f"--moments must be a file of `rmtjax moments`: {error}") from error


def _plan_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of the plan. A value that no file could have is wrong usage."""
    names = {field.name for field in dataclasses.fields(PlanOptions)}
    options = {name: value for name, value in vars(args).items() if name in names}
    options["rule"] = parse_rule(args.rule, args.level, args.trim, args.equalize)
    if options.get("shrink"):
        options["shrink"] = getattr(shrinkage, args.shrink)
    if options.get("moments"):
        options["moments"] = _load_moments(options["moments"])
    try:
        PlanOptions(**options)
        Extra(**_extra(args))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return options


def _extra(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of columns that a spectrum does not have, which `analyze` alone has."""
    return {name: getattr(args, name) for name in EXTRA if args.command == "analyze"}


def _run(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Report, Callable[[], str]]:
    """Returns the report of a command, and what stands below its table."""
    if args.command == "diff":
        found = _diff(args, options)
        return found.report, lambda: _tell(found)
    options["dtype"] = args.dtype
    if args.command != "compress":
        report = checkpoint.analyze_file(args.file, **options, **_extra(args))
        if getattr(args, "against", None) is not None:
            report = compare_reports(checkpoint.analyze_file(args.against, **options), report)
        return report, lambda: _list(report, args) if args.command == "select" else ""
    report = checkpoint.compress_file(args.file, args.out, mode=args.mode, **options)
    sizes = lambda: (f"{printable(path)}, {_size(path)}" for path in (args.file, args.out))
    return report, lambda: "\n{} -> {}\n".format(*sizes())


def _list(report: Report, args: argparse.Namespace) -> str:
    """Returns the kernels with most signal in the form that another program reads."""
    names = most_signal(report, args.top)
    if not names:  # an empty list would mean all to some programs
        raise ValueError(f"no kernel of {args.file!r} has signal: `rmtjax analyze` tells why.")
    if args.form == "json":
        return json.dumps(names, indent=2) + "\n"
    if args.form == "names":
        return "".join(f"{printable(name)}\n" for name in names)
    # Patterns of names. A text of JSON is also one of YAML.
    patterns = (json.dumps(f"^{re.escape(name)}$") for name in names)
    return "unfrozen_parameters:" + "".join(f"\n- {pattern}" for pattern in patterns) + "\n"


def _diff(args: argparse.Namespace, options: dict[str, Any]) -> adapters.Difference:
    if args.out is None:
        return adapters.analyze_difference(args.base, args.file, **options)
    del options["multiple"]
    stored = {"fan_in_fan_out": args.fan_in_fan_out}
    return adapters.extract_lora(args.base, args.file, args.out, **options, **stored)


def _tell(found: adapters.Difference) -> str:
    """Returns what a difference has beside its rows, a line each."""
    cut = [row for row in found.report.rows if row.action != "keep"]
    directions, changed = sum(row.rank or 0 for row in cut), len(found.report)
    told = {
        "in the adapter": found.written,
        "unchanged": found.unchanged,
        "changed, and no kernel": found.others,
        "in one file only, or in other shapes": found.unmatched,
    }
    some = lambda names: ", ".join(map(printable, names[:3])) + (", ..." if names[3:] else "")
    lines = [f"directions that changed: {directions}, in {len(cut)} of {changed} changed kernels"]
    lines += [f"{words}: {len(names)} ({some(names)})" for words, names in told.items() if names]
    return "".join(f"\n{line}" for line in lines) + "\n"


def _work(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.command in ("moments", "compare"):
        check_outputs(args)
        with _progress(args.quiet) as progress:
            tell = {"moments": collect_moments, "compare": compare}[args.command](args, progress)
        if not args.quiet and not any(is_stdout(path) for _, path in args.reports):
            tell()
        return
    options = _plan_options(args)
    parse_columns(args.columns)  # before the work
    check_outputs(args)
    for source in filter(
        None, (getattr(args, "base", None), getattr(args, "against", None), args.file)
    ):
        with checkpoint.open_tensors(source) as tensors:
            for form, target in args.reports:
                if not is_stdout(target):
                    checkpoint.check_target(tensors, target, f"--{form}")
    with checkpoint.open_tensors(args.file) as tensors:
        options["where"] = _select(tensors, args.include, args.exclude)
    with _progress(args.quiet) as progress:
        report, words = _run(args, options | {"progress": progress})
    # A report on stdout must be all that is there, so that a program can read it.
    args.quiet |= any(is_stdout(path) for _, path in args.reports)
    _show(report, args, table=args.command != "select")
    if not args.quiet or args.command == "select":
        print(words(), end="", flush=True)


@contextlib.contextmanager
def _computing(device: str | None, dtype: str | None) -> Iterator[None]:
    """Selects the device, and switches 64 bits on for float64, within the context."""
    try:
        chosen = jax.devices(device)[0] if device else None
    except RuntimeError as error:
        raise UsageError(f"--device {device}: {error}") from error
    # `main` may be called in a program that goes on: its setting must come back.
    before = jax.dtypes.canonicalize_dtype("float64") == "float64"
    try:
        jax.config.update("jax_enable_x64", before or dtype == "float64")
        with jax.default_device(chosen):
            yield
    finally:
        jax.config.update("jax_enable_x64", before)


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into a KeyboardInterrupt, so that half-written files are removed."""

    def end(number: int, frame: Any):
        # A second signal must not interrupt the clean-up after the first.
        signal.signal(number, signal.SIG_IGN)
        # Not an `Exception`: the code that the signal interrupts must not catch it as its error.
        raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}", number)

    # In the main thread only, as Python requires. What nohup or the caller handles stays so.
    in_main_thread = threading.current_thread() is threading.main_thread()
    with contextlib.ExitStack() as stack:
        for number in signal.Signals if in_main_thread else ():
            if number.name in ("SIGTERM", "SIGHUP") and signal.getsignal(number) == signal.SIG_DFL:
                stack.callback(signal.signal, number, signal.SIG_DFL)
                signal.signal(number, end)
        yield


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: The arguments; by default those of the process.

    Returns:
      The exit code, of those that `--help` lists. SIGHUP and SIGTERM are caught in the main thread
      only, and if nothing else handles them.

    Raises:
      SystemExit: With code 2 and a message for wrong usage; with 0 for `--help` and `--version`.

    Examples:
      >>> from rmtjax.cli import main
      >>> main(["analyze", "no_such_file.safetensors"])
      1
    """
    args = make_parser().parse_args(argv)
    try:
        with _ending(), _computing(args.device, args.dtype):
            _work(args)
    except UsageError as error:
        args.refuse(str(error))  # exits with code 2
    except BrokenPipeError:
        # The interpreter flushes stdout when it ends, which would print the error once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        cause, number = interrupt.args or ("interrupted", signal.SIGINT)
        print(f"rmtjax: {cause}", file=sys.stderr)
        return 128 + number
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"rmtjax: {printable(str(error) or type(error).__name__)}", file=sys.stderr)
        return 1
    return 0
