"""The pages of `docs/`: their Python prints what stands under it, and no public name is missing."""

import ast
import pkgutil
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from test_readme import EXAMPLE

import rmtjax

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
EXAMPLES = {page: EXAMPLE.findall(text) for page, text in PAGES.items()}
ELSEWHERE = {"layers", "training_live"}  # run by `test_layer_table.py` and `test_metrics.py`
RUN = [page for page, examples in EXAMPLES.items() if examples and page not in ELSEWHERE]
TOLD = set(re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in DOCS.glob("api/*.md")), re.M))


@pytest.mark.parametrize("page", PAGES)
def test_every_example_has_its_output(page):
    assert len(EXAMPLES[page]) == PAGES[page].count("```python")


@pytest.mark.parametrize("page", RUN)
def test_examples_print_what_stands_under_them(page, tmp_path, monkeypatch):
    """Each example of a page goes on from those before it."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, printed in EXAMPLES[page]:
        with redirect_stdout(output := StringIO()):
            exec(compile(code, f"{page}.md", "exec"), names)
        assert output.getvalue() == printed


def public_names():
    """Modules without an underscore, and what a module passes on as its own (`f as f`)."""
    modules = {module.name for module in pkgutil.iter_modules(rmtjax.__path__)}
    files = {"rmtjax": rmtjax.__file__}
    for name in sorted(m for m in modules if not m.startswith("_")):
        yield f"rmtjax.{name}"
        files[f"rmtjax.{name}"] = Path(rmtjax.__file__).with_name(f"{name}.py")
    for module, file in files.items():
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.ImportFrom):
                aliases = [alias for alias in node.names if alias.asname == alias.name]
                yield from (f"{module}.{alias.name}" for alias in aliases)


NAMES = {name for name in public_names() if not name.partition(".")[2].startswith("_")}


@pytest.mark.parametrize("name", sorted(NAMES - {"rmtjax.report"}))  # the package has all of it
def test_every_public_name_has_its_place_in_the_reference(name):
    assert name in TOLD


@pytest.mark.parametrize("name", sorted(TOLD))
def test_the_reference_names_what_there_is(name):
    assert pkgutil.resolve_name(name).__doc__
