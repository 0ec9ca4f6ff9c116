"""The README's Python runs and prints what stands under it."""

from pathlib import Path

import pytest
from helpers.examples import find_examples, printed_by

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = find_examples(README)


def test_every_example_has_its_output():
    assert len(EXAMPLES) == README.count("```python") == 8


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_print_what_stands_under_them(code, printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert printed_by(code, "README.md", {}) == printed


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_are_short(code, printed):
    del printed
    assert len(code.strip().splitlines()) <= 15
