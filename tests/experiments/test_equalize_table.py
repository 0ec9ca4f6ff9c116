"""The tables of equalized kernels, from the command."""

import pytest

from experiments import equalize

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

OPTIONS = (
    *("--draws", "3", "--noise", "10", "--shape", "60", "90", "--small", "60", "90"),
    *("--scales", "1", "--planted", "0", "3"),
)


def test_the_tables_have_a_row_for_each_case(capsys):
    assert equalize.main(list(OPTIONS)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {tuple(line[:3]): line[3:] for line in lines if line[:1] == ["rows"]}
    assert found["rows", "1", "0"][-1] == "1.00"  # all fits are accepted
    assert found["rows", "1", "0"][-3:-1] == ["0", "(0-0)"]
    assert found["rows", "1", "3"][-3] == "3"
    assert len([line for line in lines if line[:1] == ["rows"]]) == 8
