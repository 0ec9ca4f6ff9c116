"""The pages of `docs/` and the README tell what the committed results hold."""

import functools
import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from experiments import certificate, fits
from experiments.study.__main__ import PARTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
# A command, and what it prints, or some lines of it.
BLOCK = re.compile(
    r"^    python (?:-m experiments\.study (\w+)|(?:-m experiments\.|experiments/)"
    r"(fits|certificate))[^\n]*\n\n"
    r"```text\n(.*?)```",
    re.DOTALL | re.MULTILINE,
)
BLOCKS = [
    pytest.param(part or script, text, id=f"{page.stem}, {part or script}, {index}")
    for page in PAGES
    for index, (part, script, text) in enumerate(BLOCK.findall(page.read_text()))
]


@functools.cache
def printed(name):
    """The tables of the committed results, as wide as the program prints them."""
    content = json.loads((RESULTS / f"{name}.json").read_text())
    if name == "fits":
        tables = [fits.to_table(table, rows) for table, rows in content["rows"].items()]
    elif name == "certificate":
        tables = [certificate.to_table(content["rows"])]
    else:
        tables = PARTS[name].tables(content["runs"])
    console = Console(file=StringIO(), width=210)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def stripped(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(("name", "text"), BLOCKS)
def test_tables_are_those_of_the_committed_results(name, text):
    missing = set(stripped(text)) - set(stripped(printed(name)))
    assert not missing


def test_every_part_has_its_results_and_is_told():
    # Those of other pages have tests of their own.
    told = {path.stem for path in RESULTS.glob("*.json")}
    told -= {"language", "minilm", "minilm_outputs", "tasks", "tasks_size", "agreement"}
    told -= {"agreement_oracle", "efficientnet", "moments_after_cuts", "worth", "drift"}
    assert told == {*PARTS, "fits", "certificate"}
    assert {block.values[0] for block in BLOCKS} == told


@pytest.mark.parametrize("page", ["study", "fit", "certificate"])
def test_numbers_in_the_words_of_a_page_are_in_its_tables(page):
    """Each number with a decimal point, but for those of a setting: these stand in `code`."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    code = re.compile(r"```.*?```|`[^`]*`|^    [^\n]*$|\]\([^)]*\)", re.DOTALL | re.MULTILINE)
    words = code.sub("", text)
    tables = " ".join(printed(name) for name in (*PARTS, "fits", "certificate"))
    known = {number.lstrip("-") for number in re.findall(r"-?\d+\.\d+", tables)}
    assert {n for n in re.findall(r"\d+\.\d+", words) if n not in known} == set()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_how_they_were_made(path):
    content = json.loads(path.read_text())
    assert content["command"].startswith("python ")
    assert content["seconds"]
    environments = content.get("environments") or [content["environment"]]
    assert all(
        {"versions", "devices", "cores"} <= environment.keys() for environment in environments
    )
    assert path.stat().st_size < 400_000
