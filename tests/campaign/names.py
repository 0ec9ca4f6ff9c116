"""Names that are hostile to pages, terminals, spreadsheets, YAML and file systems."""

import csv
import io
import json
import random
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

import rmtjax

PARTS = (
    *("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "<script>alert(1)</script>"),
    *("</script>", "<img src=x onerror=alert(1)>", "&amp;", "{{rows}}", "\x1b[2J", "\x07"),
    *("\r\n", "\n", "\0", "../../etc/passwd", "/abs", "..", "CON", "a:b", "- x", "&a", "*a"),
    *("!!python/object", "%s", "{0}", "$(id)", "`id`", "';--", '"', "\\", "|", "`", "$x$"),
    *("\u202e", "\ufeff", "\U0001f600", "é", "e\u0301", "__metadata__", "rmtjax", "left"),
    *("right", "nan", "true", "1e3", "x" * 300),
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")


class Tags(HTMLParser):
    """The elements of a page, by name."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))


def tags_of(text):
    parser = Tags()
    parser.feed(text)
    return parser.found


def check_forms(report, plain):
    """No form acts on a name: they have the structure of a report with a plain name."""
    assert tags_of(report.to_html()) == tags_of(plain.to_html())
    page, other = report.to_page(), plain.to_page()
    without_breaks = lambda text: [tag for tag in tags_of(text) if tag != ("wbr",)]
    assert without_breaks(page) == without_breaks(other)
    for text in (str(report), report.to_markdown(), report.to_html(), page, report.to_csv()):
        assert not CONTROL.search(text), repr(CONTROL.search(text))
    assert len(str(report).splitlines()) == len(str(plain).splitlines())
    assert len(report.to_markdown().split("\n")) == len(plain.to_markdown().split("\n"))
    rows = list(csv.reader(io.StringIO(report.to_csv())))
    assert [len(row) for row in rows] == [
        len(row) for row in csv.reader(io.StringIO(plain.to_csv()))
    ]
    for cell in (cell for row in rows[1:] for cell in row):
        number = re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell)
        assert number or not cell.lstrip().startswith(("=", "+", "-", "@")), cell
    (row,) = json.loads(report.to_json())["rows"]
    assert row["path"] == report.rows[0].path


def run(tally, rounds, seed):
    """Tries each part alone, and so many names of several parts."""
    rng = random.Random(seed)
    kernel = np.random.default_rng(0).normal(size=(60, 50)).astype(np.float32)
    plain = rmtjax.analyze({"a": {"kernel": kernel}})
    names = [*PARTS, *("".join(rng.choices(PARTS, k=rng.randint(2, 4))) for _ in range(rounds))]
    for name in names:
        tree = {name: {"kernel": kernel}}
        with tally.trial("names in reports", repr(name)):
            check_forms(rmtjax.analyze(tree), plain)
        with tally.trial("names in files", repr(name)), tempfile.TemporaryDirectory() as folder:
            inside = Path(folder, "x")
            inside.mkdir()
            for target in ("a.safetensors", "tree"):
                rmtjax.checkpoint.save(inside / target, tree)
                (back,) = rmtjax.checkpoint.restore(inside / target, like=tree).values()
                assert np.array_equal(back["kernel"], kernel)
            assert [*Path(folder).iterdir()] == [inside]
