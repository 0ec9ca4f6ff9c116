"""The README's Python runs and prints what stands under it."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
EXAMPLES = EXAMPLE.findall((ROOT / "README.md").read_text())


def test_every_example_has_its_output():
    assert len(EXAMPLES) == (ROOT / "README.md").read_text().count("```python") == 7


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_print_what_stands_under_them(code, printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = StringIO()
    with redirect_stdout(output):
        exec(compile(code, "README.md", "exec"), {})
    assert output.getvalue() == printed


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_are_short(code, printed):
    del printed
    assert len(code.strip().splitlines()) <= 15
