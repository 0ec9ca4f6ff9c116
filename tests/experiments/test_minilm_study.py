"""The study of the pretrained encoder: its analysis, its cuts, its command and its page."""

import dataclasses
import json
import re
import shutil
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import rmtjax
from experiments.minilm import cuts, drift, model, tables, weights, words
from experiments.minilm.__main__ import main

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECORDS = json.loads((ROOT / "experiments" / "results" / "minilm.json").read_text())
TINY = model.Config(  # with one shape for all kernels, so that little is compiled
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)


def made_params():
    blank = jax.ShapeDtypeStruct((1, 1), "int32"), jax.ShapeDtypeStruct((1, 1), "bool")
    shapes = jax.eval_shape(model.Bert(TINY).init, jax.random.key(0), *blank)["params"]
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: draw.normal(0, 0.1, leaf.shape).astype("f4"), shapes)


def write_folder(folder):
    """A folder as the package has it, of an encoder that nobody trained."""
    from safetensors.numpy import save_file

    def to_torch(path, leaf):
        inputs = 2 if "/out/" in path else 1
        matrix = np.reshape(leaf, (int(np.prod(leaf.shape[:inputs])), -1))
        return np.ascontiguousarray(matrix.T if path.endswith("kernel") else matrix)

    params = {
        path: leaf.ravel() if path.endswith(("bias", "scale")) else to_torch(path, leaf)
        for path, leaf in cuts.by_path(made_params()).items()
    }
    tensors = {weights.torch_name(path): np.asarray(leaf) for path, leaf in params.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(TINY) | {"other": 1}))
    letters = "abcdefghijklmnopqrstuvwxyz.,'-"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{one}" for one in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


@pytest.fixture(scope="module")
def pretrained(minilm_folder):
    """Folder and parameters."""
    return minilm_folder, weights.read_params(minilm_folder)


def test_every_kernel_has_a_row_and_the_pooler_is_noise(pretrained):
    """The committed rows are those of the weights; the layer that nobody trained has no signal."""
    params = pretrained[1]
    rule = rmtjax.ranks.bema(level=0.1)  # That of the committed analysis.
    rows = {row.path: row for row in rmtjax.analyze(params, rule=rule).rows}
    leaves = cuts.by_path(params)
    assert rows.keys() == {path for path, leaf in leaves.items() if leaf.ndim > 1} - {
        path for path in leaves if path.endswith("bias")
    }
    for committed in RECORDS["kernels"]:
        row = rows[committed["path"]]
        if row.spikes is None:
            assert committed["spikes"] is None
        else:  # an eigenvalue at the threshold may fall on either side, by rounding
            assert abs(row.spikes - committed["spikes"]) <= 1
            np.testing.assert_allclose(row.distance, committed["distance"], atol=2e-3)
    assert not np.any(params["pooler"]["bias"])  # as it was initialised
    assert rows["pooler/kernel"].spikes == 0
    assert rows["pooler/kernel"].distance < 5 / 384  # what pure noise stays under


@pytest.mark.slow
def test_the_pretrained_encoder_runs_factorized(pretrained):
    folder, params = pretrained
    sentences = words.read_sentences(folder)
    embed = drift.embedder(model.Bert(weights.read_config(folder)), sentences)
    chosen = ("attention/query", "attention/out", "intermediate")
    where = lambda path, leaf: path in [f"layer_0/{name}/kernel" for name in chosen]
    plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(64), where=where)
    assert [row.action for row in plan.values()] == ["factorize"] * 3
    lower, thin = rmtjax.truncate(params, plan), rmtjax.factorize(params, plan)
    found, expected = embed(thin), embed(lower)
    # The rounding of float32 in one layer, through five more: 1e-6 at the worst.
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - embed(params)).max() > 1e-2  # the cut is no small one


def test_cuts_keep_what_they_say():
    params = made_params()
    chosen = ("layer_0/attention/out/kernel", "layer_1/output/kernel", "types/embedding")
    where = lambda path, leaf: path in chosen
    plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(24), where=where, multiple=1)
    found = cuts.decompose(params, plan)
    assert set(found) == set(chosen[:2])  # two types are too few for a spectrum
    ranks = dict.fromkeys(found, 24)
    cut = lambda kind, rank=ranks: cuts.by_path(cuts.apply_cut(kind, params, found, rank, 0))
    whole, top, lower = (cuts.by_path(params), cut(cuts.keep_top), rmtjax.truncate(params, plan))
    rest = cut(cuts.keep_bottom, {path: found[path].values.size - 24 for path in found})
    random, noise = cut(cuts.keep_random), cut(cuts.add_noise)
    for path, leaf in cuts.by_path(lower).items():
        # Two decompositions in float32: rounding, over the gap to the next singular value.
        np.testing.assert_allclose(top[path], leaf, atol=1e-4)
        if path in found:
            np.testing.assert_allclose(top[path] + rest[path], whole[path], atol=1e-5)
            matrix = np.reshape(random[path], (found[path].left.shape[0], -1))
            assert np.linalg.matrix_rank(matrix, tol=1e-3) == 24
            size = lambda change: np.linalg.norm(np.ravel(change))
            expected = size(rest[path])
            np.testing.assert_allclose(size(noise[path] - whole[path]), expected, rtol=1e-3)


def test_what_is_measured_of_the_embeddings():
    draw = np.random.default_rng(0)
    whole = draw.normal(size=(12, 30))
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    topics = ("one",) * 6 + ("two",) * 6
    same = drift.measure(whole, whole, topics)
    assert {name: round(same[name], 6) for name in ("mean", "worst", "order")} == dict.fromkeys(
        ("mean", "worst", "order"), 1
    )
    assert same["itself"] == same["neighbour"] == 100
    turned, _ = np.linalg.qr(draw.normal(size=(30, 30)))
    moved = drift.measure(whole @ turned, whole, topics)
    assert moved["order"] > 0.999  # a rotation moves all and changes no similarity
    assert moved["neighbour"] == 100
    assert moved["topic"] == same["topic"]
    assert moved["mean"] < 0.5
    assert moved["itself"] < 100
    close = np.repeat(np.eye(2), 6, axis=0) + 0.1 * draw.normal(size=(12, 2))
    close /= np.linalg.norm(close, axis=1, keepdims=True)
    assert drift.measure(close, close, topics)["topic"] == 100
    assert drift.measure(close, close, ("one", "two") * 6)["topic"] < 100


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    chosen = {name: drift.RULES[name] for name in ("bema 0.1", "energy 0.9")}
    monkeypatch.setattr(drift, "RULES", chosen)
    made = write_folder(tmp_path / "made")
    options = ["--out", str(tmp_path / "out")]
    assert main(["--model", str(made), "--seeds", "3", *options]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "minilm.json").read_text())
    assert {"command", "seconds", "environment", "weights"} <= found.keys()
    assert found["configuration"] == {"seeds": [3]}
    assert len(found["kernels"]) == 3 * 6 + 4
    assert [row["rule"] for row in found["together"]] == list(chosen)
    # What factors compute is what truncated kernels do, to the rounding of float32.
    assert all(row["gap"] < 1e-5 for row in found["together"])
    assert len(found["alone"]) == 3 * 6 + 2  # neither the pooler nor the two types
    assert (tmp_path / "out" / "minilm.png").stat().st_size > 10_000
    shutil.rmtree(made)
    assert main(["--show-only", *options]) == 0
    assert capsys.readouterr().out == printed


@pytest.fixture(scope="module")
def printed():
    console = Console(file=StringIO(), width=210)
    for table in tables.tables(RECORDS):
        console.print(table)
    return console.file.getvalue()


def test_the_page_tells_the_committed_results(printed):
    text = (ROOT / "docs" / "minilm.md").read_text()
    lines = lambda text: {line.strip() for line in text.splitlines() if line.strip()}
    blocks = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert blocks
    assert lines("".join(blocks)) <= lines(printed)
    code = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
    known = {number.lstrip("-") for number in re.findall(r"-?\d+\.\d+", printed)}
    assert set(re.findall(r"\d+\.\d+", code.sub("", text))) <= known
