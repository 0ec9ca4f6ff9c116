"""The drift of pruning: cuts against NumPy, looks at planted directions, the table of the page."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.drift import __main__ as drift
from experiments.drift.ways import CARRIED, cut, Known, look_at, NOTHING, optimal, Way, WAYS

LONG, SHORT = 160, 80
FOLDER = Path(__file__).parents[2]


def draw(seed, *shape):
    """Standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spikes(seed, *sizes):
    """A kernel of orthogonal directions of these singular values."""
    u, v = (
        np.linalg.qr(draw(10 * seed + i, n, len(sizes)))[0] for i, n in enumerate((LONG, SHORT))
    )
    return u * np.asarray(sizes, np.float32) @ v.T


def truncated(matrix, rank):
    """The nearest matrix of a rank."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, float), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


KERNEL = draw(0, LONG, SHORT) + spikes(1, 60, 40)


def after_a_cut(way=WAYS[CARRIED]):
    """A kernel that was cut, and what is known of it."""
    lower, known, _ = cut(jnp.asarray(KERNEL), Known.of(jnp.asarray(KERNEL)), way)
    return np.asarray(lower), known


@pytest.mark.parametrize("name", [name for name in WAYS if name != NOTHING])
def test_the_first_cut_leaves_what_stands_out_of_the_noise(name):
    lower, known = after_a_cut(WAYS[name])
    wanted = truncated(KERNEL, 2)
    if "shrunk" in name:
        # Shrinkage takes off what noise has added: s^2 -> s^2 less (m + n), to the leading order.
        assert 0.9 < np.linalg.norm(lower) / np.linalg.norm(wanted) < 0.97
    else:
        # Entries near 1, in float32.
        np.testing.assert_allclose(lower, wanted, atol=1e-4)
    assert int(known.rank) == 2
    assert float(known.variance) == pytest.approx(1, rel=0.03)


def test_a_kernel_of_noise_is_not_cut():
    noise = jnp.asarray(draw(3, LONG, SHORT))
    lower, known, _ = cut(noise, Known.of(noise), Way())
    np.testing.assert_array_equal(lower, noise)
    assert not known.was_cut


def test_ways_differ_in_what_of_a_change_they_keep():
    """A change of weak noise and a direction that stands out of it, but not of the first noise."""
    lower, known = after_a_cut()
    change = 0.1 * draw(5, LONG, SHORT) + spikes(6, 8)
    kernel = jnp.asarray(lower + change)
    ranks = {}
    for name in ("carried noise", "noise of now", "noise of a period", "change cut"):
        new = np.asarray(cut(kernel, known, WAYS[name])[0])
        ranks[name] = np.linalg.matrix_rank(new, tol=1e-2)
    assert ranks == {
        "carried noise": 2, "noise of now": 3, "noise of a period": 3, "change cut": 3,
    }  # fmt: skip


def test_the_rank_only_falls_where_it_may_not_rise():
    lower, known = after_a_cut()
    kernel = jnp.asarray(lower + spikes(7, 50))
    ranks = [
        np.linalg.matrix_rank(cut(kernel, known, way)[0], tol=1e-2)
        for way in (Way(), Way(falls=True))
    ]
    assert ranks == [3, 2]


def test_a_look_tells_new_directions_from_those_that_have_turned():
    lower, known = after_a_cut()
    threshold = known.threshold
    new = look_at(jnp.asarray(lower + spikes(7, 50)), jnp.asarray(lower), threshold)
    assert (int(new.rank), int(new.new)) == (3, 1)
    wanted = 50**2 / (LONG * float(threshold))
    # A planted direction leans a little on those that are there: they overlap by 1 / sqrt(80).
    assert float(new.newest) == pytest.approx(wanted, rel=0.1)
    assert float(new.beyond) == pytest.approx(wanted, rel=0.1)
    turned = look_at(jnp.asarray(1.5 * lower), jnp.asarray(lower), threshold)
    assert (int(turned.rank), int(turned.new)) == (2, 0)
    assert float(turned.beyond) < 1e-6


def test_the_optimal_threshold_is_that_of_gavish_and_donoho():
    assert optimal(1.0) == pytest.approx(16 / 3)  # the square of 4 / sqrt(3)
    # Their table for known noise has 1.9786 at a ratio of 1/2.
    assert optimal(0.5) ** 0.5 == pytest.approx(1.9786, abs=1e-4)


def test_a_short_run_is_written_and_shown_again(tmp_path, capsys):
    file = tmp_path / "drift.json"
    options = ["--ways", NOTHING, CARRIED, "momentum reset", "--seeds", "0", "--widths", "64", "64"]
    options += ["--source", "sample", "--dataset", "fashion_mnist", "--images", "1000"]
    options += ["--epochs", "10", "--file", str(file)]
    assert drift.main(options) == 0
    shown, written = capsys.readouterr().out, file.read_text()
    assert "carried noise" in shown
    assert drift.main([*options, "--show-only"]) == 0
    assert capsys.readouterr().out == shown
    assert drift.main(options) == 0
    assert file.read_text().split('"runs"')[1] == written.split('"runs"')[1]


def test_the_page_has_the_tables(capsys):
    assert drift.main(["--show-only"]) == 0
    page = (FOLDER / "docs" / "drift.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line.rstrip() in page
