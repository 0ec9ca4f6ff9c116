"""What came of each arm: records of runs as outcomes, and outcomes in summary."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from experiments.study.statistics import Difference, paired_difference
from experiments.study.tasks import Task

PLAIN = "nothing"  # the arm that others are derived from, and compared with
EARLY_STOPPING = "early stopping"
RMT_AT_END = "RMT once, at the end"
stopped_at = lambda epoch: f"stopped at epoch {epoch}"


class Outcome(NamedTuple):
    """One arm, one seed, one task.

    Attributes:
      task: What was trained on.
      arm: Its name.
      seed: Its seed.
      test: Test accuracy in % of the network that the arm gives.
      parameters: Stored, kernels factorized where that is smaller.
      ranks: By path; empty where no kernel was cut.
      best: The highest of all epochs, chosen by the test set; None where no epochs passed.
      wrong: Share in % of the wrong labels that were learnt; None without any.
      given: Accuracy in % on the training images, by the labels given; None if not looked at.
    """

    task: Task
    arm: str
    seed: int
    test: float
    parameters: int
    ranks: dict[str, int]
    best: float | None = None
    wrong: float | None = None
    given: float | None = None


def _outcome(record: dict[str, Any], arm: str, seen: dict[str, Any], **changes: Any) -> Outcome:
    settings = record["settings"]
    fields = {
        "task": Task(**settings["task"]),
        "arm": arm,
        "seed": settings["seed"],
        "parameters": record["parameters"],
        **{name: seen[name] for name in ("test", "wrong", "given", "ranks")},
    }
    return Outcome(**fields | changes)


def outcomes(records: Iterable[dict[str, Any]]) -> list[Outcome]:
    """An outcome for each record, and those that need no run of their own.

    Early stopping, and what is stopped or cut at some epoch and not trained on, are made of
    the run that nothing was done to.
    """
    found = []
    for record in records:
        arm = record["settings"]["arm"]
        found.append(_outcome(record, arm, record["final"], best=record["best"]["test"]))
        if arm == PLAIN and record["stopped"]:
            found.append(_outcome(record, EARLY_STOPPING, record["stopped"]))
        for seen in record["once"] if arm == PLAIN else ():
            epoch, name = seen["epoch"], RMT_AT_END
            if epoch < record["settings"]["recipe"]["epochs"]:
                # The cut is not to be given the credit for the time at which it came.
                test = record["history"]["test"][epoch - 1]
                plain = {"test": test, "wrong": None, "given": None, "ranks": {}}
                found.append(_outcome(record, stopped_at(epoch), plain))
                name = f"{stopped_at(epoch)}, cut"
            found.append(_outcome(record, name, seen, parameters=seen["parameters"]))
    return found


class Summary(NamedTuple):
    """An arm over its seeds: means, and paired differences of the test accuracy.

    Attributes:
      arm: Its name.
      values: Test accuracies in %, by seed.
      best: Mean of the best epochs, in %.
      wrong: Mean share of wrong labels learnt, in %.
      given: Mean accuracy on the labels given, in %.
      parameters: Mean number of stored parameters.
      ranks: Mean rank by path.
      against: By the arm compared with.
    """

    arm: str
    values: dict[int, float]
    best: float | None
    wrong: float | None
    given: float | None
    parameters: float
    ranks: dict[str, float]
    against: dict[str, Difference | None]

    @property
    def test(self) -> float:
        """Mean test accuracy in %."""
        return float(np.mean([*self.values.values()]))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def tasks(found: Iterable[Outcome]) -> list[Task]:
    """The tasks, in the order in which they come."""
    return [*dict.fromkeys(outcome.task for outcome in found)]


def summarise(
    found: Iterable[Outcome], task: Task, references: tuple[str, ...] = (PLAIN,)
) -> dict[str, Summary]:
    """A summary for each arm of a task.

    Args:
      found: Outcomes, of other tasks too.
      task: The one to sum up.
      references: Arms that each one is compared with, seed by seed.

    Returns:
      The summaries by arm, in the order in which the arms come.
    """
    arms: dict[str, list[Outcome]] = {}
    for outcome in found:
        if outcome.task == task:
            arms.setdefault(outcome.arm, []).append(outcome)
    values = {arm: {one.seed: one.test for one in own} for arm, own in arms.items()}
    return {
        arm: Summary(
            arm,
            values[arm],
            best=_mean(one.best for one in own),
            wrong=_mean(one.wrong for one in own),
            given=_mean(one.given for one in own),
            parameters=float(np.mean([one.parameters for one in own])),
            ranks={p: float(np.mean([one.ranks[p] for one in own])) for p in own[0].ranks},
            against={
                reference: paired_difference(values[arm], values[reference])
                for reference in references
                if reference in values and reference != arm
            },
        )
        for arm, own in arms.items()
    }
