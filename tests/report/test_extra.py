"""Columns of shuffled kernels and of blocks of one aspect ratio, in every form of a report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cli_models import save, usage_error

import rmtjax
from rmtjax import checkpoint, cli, ranks
from rmtjax.spectra import blocks_of

AXES = {"stack": rmtjax.KernelAxes((1,), (2,), (0,))}


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def params():
    entry = noise(0, 60, 150)
    entry[3, 4] = 60.0
    return {
        "entry": entry,
        "noise": noise(1, 60, 150) + 0.5,  # a mean is not a trap
        "stack": np.stack([entry, noise(2, 60, 150)]),
        "factors": rmtjax.factorize_matrix(entry, 8),
        "nan": np.full((60, 150), np.nan, np.float32),
    }


@pytest.fixture(scope="module")
def report(params):
    options = {"where": "*", "axes": AXES, "rule": ranks.energy(0.9)}
    return rmtjax.analyze(params, randomized=4, aspect=1.0, **options)


@pytest.mark.slow
def test_shuffled_kernels_have_the_spikes_of_their_entries(report):
    entry, plain, stack = (report.metrics[path] for path in ("entry", "noise", "stack"))
    assert entry["shuffled_spikes"] == entry["shuffled_rate"] == 1
    # The entry alone is a singular value of 60; the threshold of noise is at s^2 / n of 2.9.
    variance = (60**2 / 9000) + 1
    top = (60**2 / 150 + 1) / (variance * 2.9)
    np.testing.assert_allclose(entry["shuffled_top"], top, rtol=0.1)
    assert plain["shuffled_spikes"] == plain["shuffled_rate"] == 0
    assert 0.8 < plain["shuffled_top"] < 1
    assert stack["shuffled_spikes"] == 0.5
    for path in ("factors", "nan"):
        assert report.metrics[path].get("shuffled_spikes") is None


def test_noise_has_a_spike_at_the_level_of_the_rule():
    for level in (0.01, 0.1):
        kernel = {"kernel": noise(4, 60, 90)}
        rule = ranks.bema(level=level)
        rate = rmtjax.analyze(kernel, rule=rule, randomized=500).metrics["kernel"]["shuffled_rate"]
        # Three standard errors of 500 draws; `test_traps.py` has more of them.
        assert abs(rate - level) < 3 * (level * (1 - level) / 500) ** 0.5


@pytest.mark.parametrize("shape", [(60, 150), (150, 60), (60, 60), (60, 75)])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.3])
def test_blocks_cover_a_matrix_and_have_one_aspect_ratio(shape, ratio):
    blocks, seen = blocks_of(*shape, ratio), np.zeros(shape, int)
    for block in blocks:
        seen[block] += 1
        short, long = sorted(seen[block].shape)
        assert abs(short / long - ratio) < 0.5 / short
    assert seen.min() == 1
    assert seen.max() <= 2


def test_pooled_exponents_are_those_of_the_blocks(params, report):
    kernel = np.float64(params["noise"])
    starts = [0, 45, 90]
    squares = [np.linalg.svd(kernel[:, i : i + 60], compute_uv=False) ** 2 / 60 for i in starts]
    pooled = np.sort(np.concatenate(squares))[::-1]
    tail = pooled[:90]
    hill = 1 + 90 / np.log(tail / tail[-1]).sum()
    found = report.metrics["noise"]
    np.testing.assert_allclose(found["pooled_hill"], hill, rtol=1e-4)
    np.testing.assert_allclose(found["pooled_hill_error"], (hill - 1) / 90**0.5, rtol=1e-4)
    for transform in (lambda f: f, jax.jit):
        spectrum = transform(rmtjax.pooled_spectrum)(jnp.asarray(params["noise"]))
        # Small eigenvalues are differences of large ones in float32.
        np.testing.assert_allclose(spectrum.eigenvalues, pooled, rtol=1e-3, atol=1e-5)
        assert spectrum.ratio == 1
    alpha = rmtjax.metrics_of(spectrum).alpha
    np.testing.assert_allclose(found["pooled_alpha"], alpha, rtol=1e-3)


def test_equal_seeds_give_equal_orders(params):
    one = {"kernel": params["entry"]}
    tops = [
        rmtjax.analyze(one, randomized=2, seed=seed).metrics["kernel"]["shuffled_top"]
        for seed in (0, 0, 1)
    ]
    assert tops[0] == tops[1] != tops[2]


def test_every_form_and_the_command_line_have_the_columns(params, report, tmp_path, capsys):
    assert "shuffled_rate" in report.table("traps").splitlines()[0]
    assert report.to_pandas("pooled")["pooled_hill"].isna().tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert report.to_dict("shuffled_spikes")["rows"][0] == {"shuffled_spikes": 1.0}
    plain = rmtjax.analyze({"kernel": params["noise"]})
    assert plain.to_dict("traps")["rows"][0]["shuffled_rate"] is None
    path = save(tmp_path, **{"a.weight": params["entry"], "a.bias": np.ones(60, np.float32)})
    found = checkpoint.analyze_file(path, randomized=3, aspect=0.5, seed=2)
    tree = rmtjax.analyze({"a.weight": params["entry"]}, randomized=3, aspect=0.5, seed=2)
    assert found.metrics["a.weight"] == tree.metrics["a.weight"]
    assert cli.main(["analyze", path, "--randomized", "--aspect", "0.5"]) == 0
    head = capsys.readouterr().out.splitlines()[0].split()
    assert {"shuffled_spikes", "pooled_hill"} <= {*head}
    assert "`aspect` must be in (0, 1]" in usage_error(capsys, "analyze", path, "--aspect", "2")


@pytest.mark.parametrize("options", [{"randomized": -1}, {"aspect": 0.0}, {"seed": -1}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
        rmtjax.analyze({"kernel": noise(0, 60, 90)}, **options)
    with pytest.raises(ValueError, match=r"`ratio` must be in \(0, 1\]"):
        rmtjax.pooled_spectrum(noise(0, 60, 90), ratio=1.5)
