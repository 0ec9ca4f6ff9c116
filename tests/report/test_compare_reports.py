"""What has changed in the spectra of two checkpoints."""

import numpy as np
import pytest
from helpers.cli_models import save

import rmtjax
from rmtjax import cli


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def kernels():
    old = noise(0, 60, 90)
    new = old.copy()
    new[:, :3] += 4
    return old, new


@pytest.fixture(scope="module")
def report(kernels):
    old, new = kernels
    rotation, _ = np.linalg.qr(noise(1, 60, 60))
    before = {"a": old, "turned": old, "wider": old, "short": old[:20], "gone": old}
    after = {"a": new, "turned": rotation @ old, "wider": noise(2, 60, 120), "short": old[:20]}
    reports = (rmtjax.analyze(tree, where="*") for tree in (before, {**after, "fresh": new}))
    return rmtjax.compare_reports(*reports)


def test_changes_are_those_of_the_singular_values(kernels, report):
    old, new = (np.linalg.svd(np.float64(kernel), compute_uv=False) for kernel in kernels)
    found = report.metrics["a"]
    size = np.linalg.norm(old)
    np.testing.assert_allclose(
        found["spectrum_change"], np.linalg.norm(new - old) / size, rtol=1e-5
    )
    assert found["spectrum_change"] <= np.linalg.norm(kernels[1] - kernels[0]) / size
    np.testing.assert_allclose(found["norm_change"], np.linalg.norm(new) / size - 1, rtol=1e-4)
    assert found["spikes_change"] == 1
    ranks = [np.sum(s**2) / s[0] ** 2 for s in (old, new)]
    np.testing.assert_allclose(found["stable_rank_change"], ranks[1] - ranks[0], rtol=1e-4)
    turned = report.metrics["turned"]
    # A rotation in float32.
    assert abs(turned["spectrum_change"]) < 1e-5
    assert turned["spikes_change"] == 0


def test_what_cannot_be_compared_has_no_numbers(report):
    for path in ("wider", "short", "fresh"):
        assert report.metrics[path]["spectrum_change"] is None
    assert "gone" not in report.metrics
    assert report.to_dict("change")["rows"][0]["spikes_change"] == 1
    with pytest.raises(ValueError, match="`old` and `new` must have kernels in common"):
        rmtjax.compare_reports(*(rmtjax.analyze({n: noise(0, 60, 90)}, where="*") for n in "xy"))
    with pytest.raises(TypeError, match="old"):
        rmtjax.compare_reports(None, report)


def test_the_command_line_compares_two_files(kernels, tmp_path, capsys):
    paths = []
    for name, kernel in zip(("old", "new"), kernels, strict=True):
        (tmp_path / name).mkdir()
        paths.append(save(tmp_path / name, **{"a.weight": kernel}))
    assert cli.main(["analyze", paths[1], "--against", paths[0]]) == 0
    assert "spectrum_change" in capsys.readouterr().out.splitlines()[0]
