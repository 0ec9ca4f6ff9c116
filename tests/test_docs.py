"""The pages of `docs/`: their Python prints what stands under it, and no public name is missing."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from helpers.examples import find_examples, printed_by

import rmtjax

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
EXAMPLES = {page: find_examples(text) for page, text in PAGES.items()}
ELSEWHERE = {"layers", "training_live"}  # run by `test_layer_table.py` and `test_metrics.py`
# These pages train networks; the README has the same calls on smaller ones.
SLOW = {
    "agreement",
    "columns",
    "compress",
    "lowrank",
    "monitor",
    "prune",
    "rules",
    "sparse",
    "start",
}
RUN = [
    pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page
    for page, examples in EXAMPLES.items()
    if examples and page not in ELSEWHERE
]
REFERENCE = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
SHOWN = set(re.findall(r"^::: (\S+)", REFERENCE, re.M))


@pytest.mark.parametrize("page", PAGES)
def test_every_example_has_its_output(page):
    assert len(EXAMPLES[page]) == PAGES[page].count("```python")


@pytest.mark.parametrize("page", RUN)
def test_examples_print_what_stands_under_them(page, tmp_path, monkeypatch):
    """Each example of a page goes on from those before it."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, printed in EXAMPLES[page]:
        assert printed_by(code, f"{page}.md", names) == printed


@pytest.mark.parametrize("page", sorted(DOCS.glob("api/*.md")), ids=lambda path: path.stem)
def test_a_page_of_the_reference_says_what_it_has_and_where_it_is_shown(page):
    """In a clone it shows no docstrings, so it must lead to a page that can be read."""
    _, words, _ = re.split(r"^(?:# .*|:::[^#]*)$", page.read_text(), flags=re.M, maxsplit=2)
    assert len(words.split()) > 10
    guides = re.findall(r"\]\(\.\./(\w+)\.md", words)
    assert guides
    assert set(guides) <= set(PAGES)


def public_names():
    """Names in `__all__` of the package and of its public modules."""
    modules = [value for value in vars(rmtjax).values() if inspect.ismodule(value)]
    public = [module for module in modules if module.__name__.rpartition(".")[2] in rmtjax.__all__]
    yield from (f"rmtjax.{name}" for name in rmtjax.__all__)
    for module in (*public, importlib.import_module("rmtjax.cli")):
        short = module.__name__.rpartition(".")[2]
        yield from (f"rmtjax.{short}.{name}" for name in getattr(module, "__all__", ()))


NAMES = {*public_names()}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_has_its_place_in_the_reference(name):
    """By itself, or under its module, whose listed names the site shows."""
    assert SHOWN & {name, name.rpartition(".")[0]}
    assert pkgutil.resolve_name(name).__doc__


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_the_reference_names_what_there_is(name):
    assert pkgutil.resolve_name(name).__doc__
