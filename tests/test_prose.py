"""README, docs and docstrings are written in short sentences, and begin as they should."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
MODULES = sorted([*(ROOT / "rmtjax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
# Code, output, tables, comments, formulas and link targets are no prose.
NO_PROSE = re.compile(
    r"```.*?```|<!--.*?-->|\$\$.*?\$\$|^ {4}.*?$|^\|.*?$|^#.*?$|\]\([^)]*\)",
    re.DOTALL | re.MULTILINE,
)
ENDS = re.compile(r"(?<=[.!?:])[*`)]*\s+|\n\s*\n|\n\s*(?:- |\d+\. )")


def sentences(text):
    """The numbers of words of the sentences of a text, with the sentences."""
    parts = (" ".join(part.split()) for part in ENDS.split(NO_PROSE.sub(" ", text)))
    counted = [(len(part.split()), part) for part in parts]
    return [(count, part) for count, part in counted if count > 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_sentence_of_a_page_is_over_30_words(page):
    assert not [part for count, part in sentences(page.read_text()) if count > 30]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sentences_of_a_page_have_14_words_at_most_on_average(page):
    counts = [count for count, _ in sentences(page.read_text())]
    assert sum(counts) <= 14 * len(counts)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_of_functions_say_what_they_do(module):
    nodes = ast.walk(ast.parse(module.read_text()))
    kinds = (ast.FunctionDef, ast.ClassDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    assert not [text for text in texts if re.match(r"(What|Refuses|Whether|How|Why)\b", text)]
