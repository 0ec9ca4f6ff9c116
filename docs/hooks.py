"""What the site needs besides pages: the files at the top, and formulas without JavaScript."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NAME = re.compile(r'(?<!">)<code>(rmtjax\.[\w.]+)</code>')  # not of a link already


def on_files(files, config):
    """Shows the files at the top, and the figures of the results, where they lie."""
    for name in ("README", "CHANGELOG", "CONTRIBUTING"):
        page = File.generated(config, f"{name.lower()}.md", abs_src_path=str(ROOT / f"{name}.md"))
        files.append(page)
    results = ROOT / "experiments" / "results"
    for path in sorted(results.rglob("*.png")):
        name = f"results/{path.relative_to(results).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    """Turns links into the repository to those of the site."""
    # The README is a page of the site, too.
    markdown = markdown.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")
    return re.sub(r"\]\((\.\./)?experiments/results/", "](results/", markdown)


def _to_mathml(match):
    display = "inline" if match[1] == "span" else "block"
    formula = convert(html.unescape(match[2]), display=display)
    # A thin space between a function and its argument: log p.
    return re.sub(r"(<mi>[a-z]{2,}</mi>)(?=<mi>|<msub>)", r'\1<mspace width="0.17em"/>', formula)


def on_page_content(content, **_):
    """Turns formulas into MathML, and names into links; those of docstrings too."""
    link = r'<autoref optional identifier="\1"><code>\1</code></autoref>'
    return NAME.sub(link, FORMULA.sub(_to_mathml, content))
