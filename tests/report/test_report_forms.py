"""A report in a terminal, in pandas and in Markdown."""

import json
import sys
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

import rmtjax


@pytest.fixture(scope="module")
def report():
    noise = np.random.default_rng(1).standard_normal((80, 120), np.float32)
    noise[:2] *= 20
    names = {"Dense_0": noise, "short": noise[:, :10]}
    return rmtjax.analyze({name: {"kernel": kernel} for name, kernel in names.items()})


def named(*names):
    kernels = {name: {"kernel": np.ones((60, 2), np.float32)} for name in names}
    return rmtjax.analyze(kernels)


def shown(report, width=120):
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(report)
    return console.file.getvalue()


def test_a_terminal_shows_a_table(report):
    head, *lines = shown(report).splitlines()
    assert head.split() == ["path", "spikes", "distance", "parameters", "reason"]
    assert lines[0].split()[:2] == ["Dense_0/kernel", "2"]
    assert report.rows[1].reason in lines[1]
    assert lines[2].split() == ["total", "10,400", "->", "1,200"]
    narrow = shown(report, width=60)
    assert max(map(len, narrow.splitlines())) <= 60


def test_names_are_no_markup_of_a_terminal():
    out = shown(named("[red]x[/red]", "\x1b[2J", "[/]"))
    assert "[red]x[/red]/kernel" in out
    assert "[/]/kernel" in out
    assert "\x1b" not in out
    assert "\\x1b[2J/kernel" in out


def test_a_data_frame_has_the_fields_and_their_types(report):
    frame = report.to_pandas()
    assert tuple(frame.columns) == rmtjax.Row._fields
    known = frame.astype(object).where(frame.notna(), None)
    assert known.to_dict("records") == [row._asdict() for row in report.rows]
    assert frame.dtypes[["spikes", "rank", "parameters"]].astype(str).tolist() == ["Int64"] * 3
    assert frame.dtypes[["variance", "milliseconds"]].astype(str).tolist() == ["float64"] * 2
    assert frame["spikes"].isna().tolist() == [False, True]
    assert rmtjax.analyze({}).to_pandas().shape == (0, len(rmtjax.Row._fields))


def test_missing_pandas_names_the_extra(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"rmtjax\[pandas\]"):
        report.to_pandas()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a_b", "a_b"),
        ("_a_", r"\_a\_"),
        ("__init__", r"\_\_init\_\_"),
        ("[x](y)", r"\[x\](y)"),
        ("`x`*y*~z~", r"\`x\`\*y\*\~z\~"),
        ("<img src=x>", "&lt;img src=x>"),
        ("a\nb|", "a\\\\nb\\|"),
    ],
)
def test_names_are_no_markdown(name, expected):
    assert named(name).to_markdown("path").splitlines()[2] == f"| {expected}/kernel |"


def test_a_table_has_a_line_a_kernel_whatever_its_name():
    report = named("a\nb", "\x1b[2J", "\u202ex")
    assert len(report.table().splitlines()) == 1 + 3
    assert report.table().isascii()
    assert '<table class="tex2jax_ignore' in report.to_html()


def test_dictionary_and_json_keep_names_as_they_are():
    report = named("a\nb")
    assert report.rows[0].path == report.to_dict()["rows"][0]["path"] == "a\nb/kernel"
    assert json.loads(report.to_json())["rows"][0]["path"] == "a\nb/kernel"
