"""Marks for tests that need long: `pytest -m "not slow"` leaves them out."""

import pytest


def slow_except(fast, names):
    """The names as parameters of a test, marked slow but for those in `fast`."""
    assert set(fast) <= set(names)
    named = lambda name: name if isinstance(name, str) else "-".join(name)
    marks = lambda name: () if name in fast else pytest.mark.slow
    return [pytest.param(name, marks=marks(name), id=named(name)) for name in names]
