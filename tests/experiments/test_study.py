"""The study: its parts shortened on the sample, its files, its measures and its statistics."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import training
from experiments.study import driver, outcomes, results, runs, tasks
from experiments.study.__main__ import main
from experiments.study.arms import ARMS, carried_ranks, plan_by_ranks
from experiments.study.options import Options

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

SHORT = {  # options of a shortened run, and the number of its runs
    "truncation": ("--datasets fashion_mnist --seeds 0 1 --widths 64 --epochs 2", 2),
    "memorisation": (
        "--dataset fashion_mnist --images 900 --validation 100 --seeds 0 1 --widths 96 "
        "--epochs 3 --prune-start 2 --cuts 2 --weight-decays 1e-3 1e-1 --dropouts 0.5 "
        "--arms nothing weight_decay dropout RMT RMT,_weight_decay RMT,_weight_decay_5e-4",
        2 + 1 + 2 + 2 * 6,
    ),
    "elsewhere": (
        "--dataset fashion_mnist --datasets --images 600 --validation 100 --seeds 0 --noises 0 0.4 "
        "--widths 64 --epochs 2 --prune-start 1 --cuts --full-epochs 1 --arms nothing",
        2 + 1,
    ),
    "pilot": (
        "--dataset fashion_mnist --images 600 --validation 100 --seeds 0 --widths 64 --epochs 2 "
        "--prune-start 1 --cuts --arms nothing RMT",
        2,
    ),
    "clean": (
        "--datasets fashion_mnist --images 900 --validation 100 --seeds 0 --weight-decays 5e-4 "
        "--widths 64 --epochs 3 --fine-tune-epochs 1 --prune-start 2",
        1,
    ),
    "artefact": ("--datasets fashion_mnist --seeds 0 1 --widths 64 --epochs 2", 4),
    "cnn": (
        "--images 600 --validation 100 --noises 0.4 --seeds 0 --channels 8 64 --width 64 "
        "--epochs 2 --prune-start 1",
        2,
    ),
}


# The others take 5 to 20 seconds each. The same driver runs this one.
FAST = {"artefact"}
PARTS = [part if part in FAST else pytest.param(part, marks=pytest.mark.slow) for part in SHORT]


def command(part, folder, *more):
    options = [option.replace("_", " ") for option in SHORT[part][0].split()]
    options = [option.replace("fashion mnist", "fashion_mnist") for option in options]
    return [part, *options, "--source", "sample", "--out", str(folder), *more]


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    """The folder of a part's shortened run, made when it is first asked for."""

    @functools.cache
    def run(part):
        folder = tmp_path_factory.mktemp(part)
        assert main(command(part, folder)) == 0
        return folder

    return run


@pytest.mark.parametrize("part", PARTS)
def test_a_part_writes_its_runs_once_and_shows_them_again(part, shortened, capsys):
    folder = shortened(part)
    path = folder / f"{part}.json"
    written = path.read_text()
    content = json.loads(written)
    assert len(content["runs"]) == SHORT[part][1]
    assert content["command"].startswith(f"python -m experiments.study {part} --")
    assert content["seconds"] == pytest.approx(sum(r["seconds"] for r in content["runs"]))
    assert content["environments"][0]["versions"]["jax"] == jax.__version__
    capsys.readouterr()
    assert main(command(part, folder)) == 0
    again = capsys.readouterr().out
    assert main([part, "--show-only", "--out", str(folder)]) == 0
    assert capsys.readouterr().out == again
    assert path.read_text() == written
    assert (folder / f"{part}.png").read_bytes().endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("part", PARTS)
def test_another_configuration_is_told_from_the_first(part, shortened, capsys):
    assert main(command(part, shortened(part), "--momentum", "0.5")) == 2
    assert "`momentum` 0.9 there, 0.5 now" in capsys.readouterr().out


@pytest.fixture(scope="module")
def records(shortened):
    return json.loads((shortened("memorisation") / "memorisation.json").read_text())["runs"]


def by_arm(records, seed=0):
    core = [r for r in records if r["settings"]["task"] == records[0]["settings"]["task"]]
    return {r["settings"]["arm"]: r for r in core if r["settings"]["seed"] == seed}


@pytest.mark.slow
def test_arms_of_a_seed_share_start_images_and_batches(records):
    arms = by_arm(records)
    plain, pruned = (arms[arm]["history"]["test"] for arm in ("nothing", "RMT"))
    # Two compilations of the same sums, on 1,000 images: one may fall to the other side.
    assert plain[0] == pytest.approx(pruned[0], abs=0.2)
    assert by_arm(records, 1)["nothing"]["history"]["test"][0] != plain[0]


@pytest.mark.slow
def test_pruning_is_measured_right_after_it_and_counted(records):
    record = by_arm(records)["RMT"]
    (ranks,) = record["history"]["ranks"].values()
    assert ranks[0] == 96 > ranks[1]
    saved = 784 * 96 - ranks[-1] * (784 + 96)
    assert record["parameters"] == 784 * 96 + 96 + 96 * 10 + 10 - max(saved, 0)


@pytest.mark.slow
def test_tuned_arms_get_the_value_that_clean_validation_chooses(records):
    tuning = {
        r["settings"]["recipe"]["weight_decay"]: r["final"]["validation"]
        for r in records
        if r["settings"]["arm"] == "weight decay, tuning"
    }
    chosen = by_arm(records)["weight decay"]["settings"]["recipe"]["weight_decay"]
    assert tuning[chosen] == max(tuning.values())
    assert len(set(tuning.values())) == 2  # a decay of 0.1 leaves nothing, so it is a choice


@pytest.mark.slow
def test_early_stopping_and_single_cuts_come_of_the_plain_run(records):
    record = by_arm(records)["nothing"]
    history = record["history"]
    epoch = int(np.argmax(history["validation"]))
    found = {one.arm: one for one in outcomes.outcomes([record])}
    assert found["early stopping"].test == history["test"][epoch]
    assert found["nothing"].test == history["test"][-1]
    assert found["nothing"].best == max(history["test"])
    once = {outcomes.RMT_AT_END, "stopped at epoch 2", "stopped at epoch 2, cut"}
    assert set(found) == {"nothing", "early stopping", *once}
    assert found[outcomes.RMT_AT_END].parameters < record["parameters"]


@pytest.mark.parametrize("pruning", ARMS.values(), ids=ARMS)
def test_every_arm_is_a_transform_with_options_that_it_knows(pruning):
    state = pruning.transform(1, 1).init({"kernel": jnp.ones((60, 80))})
    assert carried_ranks(state) == {"kernel": 60}
    plan = plan_by_ranks({"kernel": jnp.ones((60, 80))}, {"kernel": 7})
    assert (plan["kernel"].rank, plan["kernel"].action) == (7, "factorize")


def make_part(perform):
    run = lambda arm, seed: runs.Run(arm, seed, TASK, training.MLP((4,)), None)
    return types.SimpleNamespace(
        plan_runs=lambda config, find: [run(arm, seed) for arm in "ab" for seed in (0, 1)],
        perform=perform,
    )


TASK = tasks.Task("fashion_mnist", 50, 20, 0.4)


def test_an_interrupted_part_goes_on_where_it_stopped(tmp_path):
    path, config, done = tmp_path / "part.json", Options("sample", out=tmp_path), []

    def perform(run, images):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((run.arm, run.seed))
        return {"found": images.train.labels.tolist()}

    part, console = make_part(perform), Console(quiet=True)
    start = driver.open_results(part, config, path, ["part"])
    with pytest.raises(KeyboardInterrupt):
        driver.run_all(part, config, start, path, console)
    assert [file.name for file in tmp_path.iterdir()] == ["part.json"]
    part = make_part(lambda run, images: done.append((run.arm, run.seed)) or {})
    driver.run_all(part, config, driver.open_results(part, config, path, ["part"]), path, console)
    assert done == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    config = Options("sample", out=tmp_path, discard=("a",))
    left = driver.open_results(part, config, path, ["part"])
    assert [r["settings"]["arm"] for r in left.runs] == ["b", "b"]
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="holds no results"):
        results.read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cnn", "--show-only"], "cnn.json, which is not there"),
        (["memorisation", "--arms", "magic"], "`arms` must be of nothing, weight decay"),
        (["memorisation", "--seeds", "100"], "`tuning_seed` must not be among the seeds"),
        (["cnn", "--noises", "1.5"], "`noises` must be in [0, 1]"),
        (["clean", "--epochs", "0"], "`epochs` must be at least 1"),
        (["clean", "--source", "sample"], "needs `name="),
    ],
)
def test_wrong_options_are_told(options, message, tmp_path, capsys):
    try:
        code = main([*options, "--out", str(tmp_path)])
    except SystemExit as exit:  # the parser's own
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in " ".join((printed.out + printed.err).replace("│", " ").split())
    assert not [*tmp_path.iterdir()]


def test_the_sample_does_not_stand_in_for_what_is_missing(monkeypatch):
    found = tasks.data.load("fashion_mnist", source="sample")
    monkeypatch.setattr(tasks.data, "load", lambda name, **where: found)
    with pytest.raises(FileNotFoundError, match="MNIST was not found"):
        tasks.load(tasks.Task("mnist", 50, 20, 0.0), 0)
