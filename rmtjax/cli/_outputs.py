"""Checks where reports and files of a command go, and writes texts there.

No input is overwritten, no output is named twice, and a pipe or a device is not replaced.
"""

import argparse
import os
from pathlib import Path

from rmtjax.checkpoint import replacing
from rmtjax.cli._arguments import UsageError


def is_stdout(path: str) -> bool:
    """Returns True if a path is stdout: "-", or a name such as /dev/stdout."""
    # The inode shows it for any name, also that of a file which stdout is redirected to.
    try:
        return path == "-" or os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def is_special(path: str) -> bool:
    """Returns True for a pipe or a device, which is written into and not replaced."""
    return os.path.exists(path) and not os.path.isfile(path)


def write_text(path: str, text: str) -> None:
    """Writes a text to stdout, into a pipe or a device, or as a file, which is replaced."""
    if is_stdout(path):
        print(text, end="", flush=True)
        return
    with open(path, "wb") if is_special(path) else replacing(Path(path)) as file:
        file.write(text.encode())


def check_outputs(args: argparse.Namespace) -> None:
    """Raises an error, before the work, for an output that cannot or must not be written."""
    out, files = getattr(args, "out", None), [path for _, path in args.reports]
    if args.command == "diff" and out and args.multiple != 1:
        raise UsageError("--multiple is not for --lora: the ranks of an adapter are exact.")
    if getattr(args, "fan_in_fan_out", None) is not None and not out:
        raise UsageError("--fan-in-fan-out tells how to write an adapter: give --lora as well.")
    if args.command == "select" and any(map(is_stdout, files)):
        raise UsageError("stdout is for the list of `select`: give the report the path of a file.")
    if out and os.path.lexists(out) and not args.force:
        raise FileExistsError(f"{out!r} is there already: give --force to replace it.")
    taken = set()
    for path in filter(None, (out, *files)):
        # Links are followed, because two names may lead to one file.
        target = "-" if is_stdout(path) else os.path.realpath(path)
        if target in taken:
            raise UsageError(f"{path!r} is named twice: give it another name.")
        taken.add(target)
        folder = os.path.dirname(os.path.realpath(path))
        if path != "-" and not is_special(path) and not os.path.isdir(folder):
            raise NotADirectoryError(f"{path!r} cannot be written: {folder!r} is not a folder.")
        if args.command == "diff" and path == out:
            if os.path.exists(path) and not os.path.isdir(path):
                raise NotADirectoryError(f"{path!r} is a file: give the path of a folder.")
        elif os.path.isdir(path):
            raise IsADirectoryError(f"{path!r} is a folder: give the path of a file.")
