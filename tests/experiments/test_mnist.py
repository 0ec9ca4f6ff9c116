"""The main job, on the sample of Fashion-MNIST and a narrow network."""

import json

import jax
import numpy as np
import optax
import pytest

import rmtjax
from experiments import data, figures, measure, mnist, output, training

OPTIONS = (
    *("--dataset", "fashion_mnist", "--source", "sample", "--widths", "96", "--epochs", "3"),
    *("--prune-start", "2", "--fine-tune-epochs", "1", "--seeds", "0", "1"),
)
NETWORKS = (
    *("baseline", "baseline, factorized", "baseline, factorized, fine-tuned"),
    *("baseline, fine-tuned", "pruned", "pruned, factorized", "pruned, factorized, fine-tuned"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def printed(folder):
    capture = pytest.MonkeyPatch()
    with capture.context() as patch:
        console = output.console()
        patch.setattr(output, "console", lambda: console)
        with console.capture() as text:
            assert mnist.main([*OPTIONS, "--out", str(folder)]) == 0
    return text.get()


@pytest.fixture(scope="module")
def results(printed, folder):
    return json.loads((folder / "results.json").read_text())


def test_tables_have_a_row_for_each_network_and_kernel(printed):
    assert "2,000 training and 1,000 test images" in printed
    for network in NETWORKS:
        assert f" {network} " in printed
    assert printed.count("Dense_0/kernel  784x96") == 4  # two networks, two seeds
    assert printed.count("kept: short side 10 under 50") == 4
    assert "±" in printed


def test_results_hold_configuration_environment_history_and_rows(results):
    assert results["config"]["widths"] == [96]
    assert results["environment"]["versions"]["rmtjax"] == rmtjax.__version__
    for seed in ("0", "1"):
        found = results["seeds"][seed]
        assert sorted(found["networks"]) == sorted(NETWORKS)
        assert len(found["history"]) == 2 * 3 + 3 * 1
        assert [row["path"] for row in found["kernels"]["pruned"]] == [
            "Dense_0/kernel",
            "Dense_1/kernel",
        ]
        assert dict(found["truncation_curve"]["points"])[0] < 30  # nothing left of the kernel


def test_networks_learn_and_the_factorized_are_smaller(results):
    for found in results["seeds"].values():
        networks = found["networks"]
        for measures in networks.values():
            assert 50 < measures["test_accuracy"] <= 100
            assert set(measures["latency_ms"]) == {"1", "128"}
        dense, thin = networks["baseline"], networks["pruned, factorized, fine-tuned"]
        assert dense["parameters"] == 784 * 96 + 96 + 96 * 10 + 10
        assert dense["multiply_adds"] == 784 * 96 + 96 * 10
        rank = (thin["multiply_adds"] - 960) / (784 + 96)
        assert rank == int(rank) < 60


def test_pruning_happens_when_it_was_asked_for(results):
    history = [e for e in results["seeds"]["0"]["history"] if e["network"] == "pruned"]
    ranks = [entry["ranks"]["Dense_0/kernel"] for entry in history]
    assert ranks[0] == 96
    assert ranks[1] < 60


def test_figures_are_whole(folder, printed):
    for name in ("spectra", "accuracy", "truncation"):
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content.endswith(b"IEND\xaeB`\x82")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("accuracy.png", "results.json", "spectra.png", "truncation.png")
    ]


@pytest.mark.slow
def test_both_networks_see_the_same_batches_from_the_same_start():
    config = mnist.Config(widths=(64,), epochs=1, prune_start=1)
    module = training.MLP(config.widths)
    dataset = data.load("fashion_mnist", source="sample")
    stages = mnist.make_stages(config, module, dataset.train_labels.size)
    never = optax.chain(stages.plain.optimizer, rmtjax.prune_spectrum(every=10**6))
    idle = mnist.Stage(1, never, training.make_epoch(module, never))
    train, test = training.to_device(dataset, 0.0, 0)
    job = mnist.Job(config, module, stages, train, test, 0, lambda text: None)
    start = module.init(jax.random.key(0), train.images[:1])["params"]
    plain, _, _ = mnist.train(job, "plain", stages.plain, start)
    chained, _, _ = mnist.train(job, "chained", idle, start)
    # Two compilations of the same sums: rounding, grown over 16 steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, chained)


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_learn_and_end_as_one_network(replicas):
    config = mnist.Config(widths=(32,), epochs=3, prune_start=1, replicas=replicas, batch_size=32)
    module = training.MLP(config.widths)
    train, test = training.to_device(data.load("fashion_mnist", source="sample"), 0.4, 0)
    stages, told = mnist.make_stages(config, module, 2000), []
    job = mnist.Job(config, module, stages, train, test, 0, told.append)
    start = module.init(jax.random.key(0), train.images[:1])["params"]
    params, history = mnist.train_replicas(job, start)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, start)
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert {entry["network"] for entry in history} == {"agreement"}
    assert len(told) == 3
    # Ten classes, 40 % of wrong labels, and 60 to 90 steps.
    assert history[-1]["test_accuracy"] > 40


@pytest.mark.parametrize("options", [{"replicas": 0}, {"replicas": 2, "devices": 2}])
def test_replicas_that_can_not_be_are_refused(options, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="`replicas` must be"):
        mnist.Config(**options)


def test_every_image_counts_once_in_an_epoch():
    order, weights = training.batches(jax.random.key(0), 1000, 128)
    assert order.shape == (8, 128)
    assert sorted(order[weights > 0].tolist()) == list(range(1000))


def test_label_noise_redraws_its_share():
    dataset = data.load("fashion_mnist", source="sample")
    train, test = training.to_device(dataset, 0.5, 0)
    changed = np.mean(np.asarray(train.labels) != dataset.train_labels)
    # A redrawn label is the old one in a tenth of the cases; three standard errors.
    assert changed == pytest.approx(0.45, abs=3 * (0.45 * 0.55 / 2000) ** 0.5)
    assert np.array_equal(test.labels, dataset.test_labels)


@pytest.mark.slow
def test_interrupted_run_leaves_whole_files_only(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "accuracy", interrupt)
    out = tmp_path / "out"
    options = ["--dataset", "fashion_mnist", "--source", "sample", "--widths", "64"]
    short = ["--epochs", "1", "--prune-start", "1", "--fine-tune-epochs", "0", "--out", str(out)]
    assert mnist.main([*options, *short]) == 130
    json.loads((out / "results.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "spectra.png"]
    assert "Stopped" in capsys.readouterr().out


def test_interrupted_before_a_seed_is_done_writes_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "accuracy", interrupt)
    options = ["--dataset", "fashion_mnist", "--source", "sample", "--out", str(tmp_path / "out")]
    assert mnist.main(options) == 130
    assert not [*(tmp_path / "out").iterdir()]


def refuse(*arguments):
    raise ConnectionError("no net here")


def test_no_run_overwrites_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample = data.load("fashion_mnist", source="sample")
    real = sample._replace(name="mnist", source="idx")
    for end in ("", "-2", "-3"):
        for dataset, name in ((sample, "fashion_mnist-sample"), (real, "mnist")):
            folder = output.make_folder(
                output.free_folder(dataset, overwrite=False), overwrite=False
            )
            assert folder.as_posix() == f"runs/{name}{end}"
            (folder / "results.json").touch()
    assert output.free_folder(real, overwrite=True).as_posix() == "runs/mnist"
    assert mnist.main(["--out", "runs/mnist"]) == 2
    assert "runs/mnist has the results of another run: give --overwrite" in capsys.readouterr().out


def test_output_folder_is_made_before_anything_else(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert mnist.main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert "--out can not be made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prune-start", "11"], "`prune_start` must be at most `epochs`"),
        (["--keep", "1.5"], "`keep` must be in"),
        (["--epochs", "0"], "`epochs` must be at least 1"),
        (["--devices", "99"], "`devices` must be at most"),
        (["--level", "0", "--dataset", "fashion_mnist", "--source", "sample"], "`level` must be"),
        (["--source", "idx", "--data-dir", "nowhere"], "nowhere"),
        (["--data-dir", "nowhere"], "`data_dir` nowhere does not exist"),
    ],
)
def test_wrong_options_are_told(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(data, "_from_download", refuse)  # no test asks the net
    try:
        code = mnist.main(["--out", str(tmp_path), *options])
    except SystemExit as exit:  # the parser's own
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in " ".join((printed.out + printed.err).replace("│", " ").split())


def test_latency_is_positive_for_each_network():
    module = training.MLP((64,))
    images = np.zeros((3, 28, 28), np.uint8)
    params = module.init(jax.random.key(0), images)["params"]
    times = measure.latencies(module, {"a": params, "b": params}, images, 4)
    assert set(times) == {"a", "b"}
    assert min(times.values()) > 0
