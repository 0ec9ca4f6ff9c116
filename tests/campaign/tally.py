"""Counts what a campaign has tried, and collects what went wrong."""

import contextlib
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import rmtjax

PACKAGE = str(Path(rmtjax.__file__).parent)
# What the package may raise for a bad input, if it raises it itself.
OURS = (ValueError, TypeError, OSError)


def is_ours(error):
    """Whether the package raised an error itself, and did not let one of another package pass."""
    frames = traceback.extract_tb(error.__traceback__)
    # JAX leaves its own frames out of tracebacks, so that the last one may only call it.
    raised = frames[-1].filename.startswith(PACKAGE) and (frames[-1].line or "").startswith("raise")
    # Under pytest, jaxtyping checks the types of arguments before a function of the package runs.
    checked = type(error).__name__ == "TypeCheckError"
    return checked or (isinstance(error, OURS) and raised)


@dataclass
class Tally:
    """The number of trials and of errors by kind, and a line for each fault."""

    tried: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    faults: list = field(default_factory=list)

    @contextlib.contextmanager
    def trial(self, kind, told, expected=(), must=False):
        """Counts a trial. Errors of the package and those expected are fine, others are faults.

        If it `must` succeed, any error is a fault.
        """
        self.tried[kind] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # A transform that finds no kernel says so, as it must.
                warnings.filterwarnings("ignore", ".*will never change a kernel")
                yield
        except expected:
            self.refused[kind] += 1
        except Exception as error:
            if is_ours(error) and not must:
                self.refused[kind] += 1
                return
            self.note(kind, error, told)

    def note(self, kind, error, told):
        """Adds a fault."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if PACKAGE in f.filename]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        self.faults.append(f"{kind}: {type(error).__name__}{where}: {error!s:.300} of {told}")

    def __str__(self):
        line = lambda kind: f"{kind}: {self.tried[kind]} tried, {self.refused[kind]} refused"
        total = f"{self.tried.total()} tried, {len(self.faults)} faults"
        return "\n".join([*map(line, self.tried), total, *self.faults])
