"""The language model made smaller: the study at a tiny size, its formulas, and its page."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import experiments.language.__main__ as study
import rmtjax
from experiments.language import cuts, figure, model, tables, text, trainer

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

SIZES = model.Sizes(width=16, layers=1, heads=2, length=16)


def printed(records):
    file = StringIO()
    console = Console(file=file, width=140)
    for table in tables.tables(records):
        console.print(table)
    return [line.strip() for line in file.getvalue().splitlines() if line.strip()]


def test_files_are_split_and_characters_are_numbers(tmp_path):
    for place in range(20):
        (tmp_path / f"m{place:02}.py").write_text(f"{place:02}é")
    found = text.read_sources(tmp_path)
    assert bytes(found.test.astype(np.uint8)).decode() == "00\x7f10\x7f"
    assert len(found.train) == 18 * 3
    windows = text.spread(found.train, 4, 10)
    assert windows.shape == (4, 11)
    np.testing.assert_array_equal(windows[0], found.train[:11])
    np.testing.assert_array_equal(windows[-1], found.train[-11:])


@pytest.fixture(scope="module")
def known():
    params = trainer.start(SIZES, 0)
    source = text.Text(np.arange(3000, dtype=np.int32) % 97, np.arange(300, dtype=np.int32) % 89)
    config = study.Config(sizes=SIZES, tokens=512)
    return study.collect(config, params, source)


def lost(known, tree):
    """The change of the outputs of the blocks on the data, layer by layer."""
    changes = rmtjax.certificate.output_changes(known.params, tree, cuts.plain(known))
    return {path: float(one.change) for path, one in changes.items() if path.startswith("block")}


@pytest.mark.slow
def test_rivals_lose_no_less_than_the_cut_by_output(known):
    trees = {name: cuts.METHODS[name](known, 0.5) for name in [*cuts.METHODS][:4]}
    found = {name: lost(known, tree) for name, tree in trees.items()}
    ours = found["output, one share"]
    assert {name: round(cuts.kept(known, tree), 1) for name, tree in trees.items()} == {
        **dict.fromkeys(trees, 0.5)
    }
    for name, changes in found.items():
        for path, change in changes.items():
            # The whitened cut is the same one, up to what is added to the diagonal.
            assert change >= 0.99 * ours[path], (name, path)
    for path, change in found["whitened (SVD-LLM), one share"].items():
        np.testing.assert_allclose(change, ours[path], rtol=2e-2, atol=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_where_the_last_one_stopped(tmp_path, capsys):
    options = ["--sizes.width", "16", "--sizes.layers", "1", "--sizes.heads", "2"]
    options += ["--sizes.length", "16", "--steps", "10", "--tokens", "512", "--tested", "8"]
    options += [
        "--shares",
        "0.5",
        "--out",
        str(tmp_path),
        "--model",
        str(tmp_path / "m.safetensors"),
    ]
    assert study.main([*options, "--most", "3"]) == 0
    first = json.loads((tmp_path / "language.json").read_text())["runs"]
    assert [(one["method"], one["after"]) for one in first] == [
        ("dense", ""),
        ("dense", "tuned"),
        ("weights, one share", ""),
    ]
    assert study.main(options) == 0
    runs = json.loads((tmp_path / "language.json").read_text())["runs"]
    assert runs[:3] == first
    assert len(runs) == 2 + len(cuts.METHODS) + len(cuts.REPAIRED) + len(cuts.TUNED)
    assert all(np.isfinite(one["perplexity"]) for one in runs)
    capsys.readouterr()
    assert study.main([*options, "--show-only"]) == 0
    assert "output, budget, gradients + tuned" in capsys.readouterr().out


def test_the_perplexity_of_an_untrained_model_is_near_the_number_of_characters(known):
    windows = text.spread(np.arange(300, dtype=np.int32) % 89, 8, SIZES.length)
    found = trainer.perplexity_on(SIZES, windows)(known.params)
    assert 90 < found < 400
    logits: Any = model.Model(SIZES).apply({"params": known.params}, windows[:, :-1])
    chances = np.asarray(jax.nn.log_softmax(logits), np.float64)
    surprise = -np.take_along_axis(chances, windows[:, 1:, None], -1).mean()
    np.testing.assert_allclose(found, np.exp(surprise), rtol=1e-4)


def records():
    """Results as a run writes them: each method loses a tenth for each quarter that is cut."""
    runs = [{"method": "dense", "share": 1.0, "after": "", "kept": 1.0, "perplexity": 5.0}]
    for name in cuts.METHODS:
        for share in (0.75, 0.5):
            found = {"kept": share, "perplexity": 5 * (1 + 0.4 * (1 - share))}
            runs.append({"method": name, "share": share, "after": "", **found})
    return {"runs": runs}


def test_the_table_has_a_row_for_each_method_relative_to_the_dense_model():
    _, head, *rows = printed(records())
    assert head.split()[0] == "method"
    assert head.index("75%") < head.index("50%")
    assert [row.split("  ")[0] for row in rows] == ["dense", *cuts.METHODS]
    assert rows[1].split()[-4:] == ["5.500", "(+10.0%)", "6.000", "(+20.0%)"]


def test_the_figure_has_a_line_for_each_method():
    (ax,) = figure.draw(records()).axes
    names = {line.get_label() for line in ax.lines}
    assert {*cuts.METHODS} <= names


def test_the_table_of_the_page_is_that_of_the_results():
    root = Path(__file__).parents[2]
    results = json.loads((root / "experiments" / "results" / "language.json").read_text())
    page = (root / "docs" / "compress.md").read_text()
    told = page.partition("```text\nperplexity of the next")[2].partition("```")[0]
    lines = f"perplexity of the next{told}".splitlines()
    squeeze = lambda lines: [" ".join(line.split()) for line in lines if line.strip()]
    assert squeeze(lines) == squeeze(printed(results))
