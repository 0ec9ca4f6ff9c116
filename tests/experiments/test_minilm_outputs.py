"""Cuts of the encoder by output: the study at a small size, its results and its page."""

import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import experiments.minilm.outputs as study
from experiments.minilm import prose

ROOT = Path(__file__).parents[2]
RECORDS = json.loads((ROOT / "experiments" / "results" / "minilm_outputs.json").read_text())


def shown(records):
    console = Console(file=StringIO(), width=140)
    console.print(study.table(records))
    return [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_windows_have_no_padding_and_leave_no_token_out_but_the_last():
    vocabulary = {"[CLS]": 1, "[SEP]": 2}
    found = prose.windows([[5, 6], [7], [8, 9, 10]], vocabulary, length=4)
    np.testing.assert_array_equal(found, [[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 10, 2]])


def test_prose_is_words_and_not_code():
    texts = prose.python_prose()
    assert len(texts) == len({*texts}) > 300
    letters = lambda text: sum(one.isalpha() or one == " " for one in text)
    assert all(text.isascii() and letters(text) > 0.9 * len(text) for text in texts)


def means(method, part="prose", tokens=None):
    runs = [one for one in RECORDS["runs"] if (one["method"], one["part"]) == (method, part)]
    most = max(one["tokens"] for one in runs) if tokens is None else tokens
    cell = lambda share: [
        one["mean"] for one in runs if one["share"] == share and one["tokens"] == most
    ]
    return np.array([np.mean(cell(share)) for share in study.SHARES])


def test_the_results_hold_what_the_page_promises():
    best, alone = means("output, budget, gradients"), means("weights, one rank", "weights")
    assert (best >= [0.93, 0.84, 0.66]).all()
    assert best[1] - alone[1] > 0.15
    assert (means("output, budget") > means("weights, budget", "weights")).all()
    for one in RECORDS["runs"]:
        if "budget" in one["method"]:
            assert one["share"] - 0.01 < one["kept"] <= one["share"]


@pytest.mark.parametrize("page", ["compress", "minilm"])
def test_tables_on_the_pages_are_those_of_the_results(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"minilm\.outputs[^\n]*\n\n```text\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert lines or page == "minilm"
    assert set(lines) <= set(shown(RECORDS))


@pytest.mark.slow
def test_the_study_goes_on_where_it_stopped(tmp_path, minilm_folder, capsys):
    options = ["--out", str(tmp_path), "--tokens", "300", "--draws", "1", "--most", "1"]
    assert study.main(options) == 0
    first = json.loads((tmp_path / "minilm_outputs.json").read_text())
    assert {one["part"] for one in first["runs"]} == {"weights"}
    # The committed results are those of this command, up to the rounding of other machines.
    for one in first["runs"]:
        (same,) = [
            two
            for two in RECORDS["runs"]
            if all(one[name] == two[name] for name in ("part", "method", "share"))
        ]
        assert one["mean"] == pytest.approx(same["mean"], abs=2e-3)
    assert study.main(["--out", str(tmp_path), "--show-only"]) == 0
    assert "weights, budget" in capsys.readouterr().out


def test_a_model_that_is_missing_is_told(tmp_path, capsys):
    options = ["--model", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert study.main(options) == 2
    assert "has no config.json" in capsys.readouterr().out
