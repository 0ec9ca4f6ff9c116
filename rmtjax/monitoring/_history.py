"""Keeps the looks of `monitor` as plain dictionaries, and as lines of a file."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from rmtjax.monitoring._state import MonitorState
from rmtjax.training import metrics


def _read(line: str, path: Path) -> dict[str, Any]:
    """Returns the record of a line; raises ValueError for half of one, as killed programs leave."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`path` {str(path)!r} has a line that is no record, {line[:40]!r}: take it out, or "
            "give another file."
        ) from error


def _write(number: Any) -> Any:
    """Returns a number as JSON knows it: None for NaN and infinity."""
    return None if isinstance(number, float) and not math.isfinite(number) else number


class History:
    """Keeps what `rmtjax.monitor` measures while a network trains.

    A record is a plain dictionary of numbers with a "step": what loggers such as Weights & Biases
    and TensorBoard take. Nothing is fetched from the device where nothing was measured but one
    number.

    Args:
      path: A file of JSON lines to which each record is added, and which is read first if it is
        there; None keeps the records in memory alone.

    Raises:
      ValueError: The file has a line that is no record.

    Attributes:
      records: The records, a dictionary for each look.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> optimizer = optax.chain(optax.sgd(0.1), rmtjax.monitor(every=2, columns=["spikes"]))
      >>> state, history = optimizer.init(params), rmtjax.History()
      >>> for step in range(4):
      ...     updates, state = optimizer.update(params, state, params)
      ...     _ = history.add(state)
      >>> [(record["step"], record["monitor/spikes/kernel"]) for record in history.records]
      [(1, 0), (3, 0)]
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self.records: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            lines = self.path.read_text().splitlines()
            self.records = [_read(line, self.path) for line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def add(self, opt_state: PyTree, **more: Any) -> dict[str, Any] | None:
        """Adds the last look of a state, and returns its record; None if it is there already.

        Args:
          opt_state: The state of the optimizer, on the host side of `jit`.
          **more: Other numbers of the record, such as `loss=loss`. One that is not finite is `null`
            in the file.

        Raises:
          ValueError: The state has no `MonitorState`, or several that measure at different steps.
        """
        is_state = lambda node: isinstance(node, MonitorState)
        states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
        steps = {int(jax.device_get(jax.numpy.asarray(state.measured))) for state in states}
        if len(steps) != 1:
            raise ValueError(
                "`opt_state` must have the state of `rmtjax.monitor`, or several with one `every`, "
                f"got {len(states)} that measured at {sorted(steps)}: give the state of the chain."
            )
        (step,) = steps
        if step == 0 or (self.records and self.records[-1]["step"] >= step):
            return None
        numbers = jax.device_get({**metrics(opt_state), **more})
        plain = {
            name: getattr(number, "item", lambda n=number: n)() for name, number in numbers.items()
        }
        record = {"step": step, **plain}
        if self.path is not None:
            line = json.dumps({name: _write(number) for name, number in record.items()})
            with self.path.open("a") as file:
                file.write(line + "\n")
        self.records.append(record)
        return record
