"""The drift of pruning: cuts against NumPy, looks at planted directions, the table of the page."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.drift import __main__ as drift
from experiments.drift.ways import CARRIED, cut, Known, look_at, NOTHING, optimal, Way, WAYS

LONG, SHORT = 160, 80
FOLDER = Path(__file__).parents[2]
FRESH = "inputs held", "left factors frozen"  # tried on other seeds too


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
        scale, ratio = np.sqrt(LONG * float(known.variance)), SHORT / LONG
        y = np.linalg.svd(np.float64(KERNEL), compute_uv=False)[:2] / scale
        values = scale * np.sqrt((y**2 - ratio - 1) ** 2 - 4 * ratio) / y
        found = np.linalg.svd(lower, compute_uv=False)[:2]
        np.testing.assert_allclose(found, values, rtol=1e-4)  # float32, and a difference of squares
    else:
        # Entries near 1, in float32.
        np.testing.assert_allclose(lower, wanted, atol=1e-4)
    assert int(known.rank) == 2
    # Of 12,800 entries the variance has a standard error of 1.3 %.
    assert float(known.variance) == pytest.approx(1, rel=0.04)


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
        for way in (Way(), Way(caps=True))
    ]
    assert ranks == [3, 2]


@pytest.mark.parametrize(
    ("name", "sides"), [("inputs held", "u"), ("outputs held", "v"), ("both held", "uv")]
)
def test_spaces_of_the_first_cut_are_held(name, sides):
    lower, known = after_a_cut()
    u, _, vt = np.linalg.svd(np.float64(lower), full_matrices=False)
    change = spikes(7, 50)  # stands out, and has both sides elsewhere
    new = cut(jnp.asarray(lower + change), known, WAYS[name])[0]
    wanted = truncated(lower + change, 3)
    wanted = u[:, :2] @ (u[:, :2].T @ wanted) if "u" in sides else wanted
    wanted = (wanted @ vt[:2].T) @ vt[:2] if "v" in sides else wanted
    np.testing.assert_allclose(new, wanted, atol=1e-3)  # values near 50, in float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_factor_is_frozen_and_all_else_is_trained(side):
    params = {"Dense_0": {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(SHORT)}}
    thin, optimizer = drift.freeze(params, side)
    assert drift.ranks_of(thin) == {"Dense_0": [2.0]}
    ones = jax.tree.map(jnp.ones_like, thin)
    updates, _ = optimizer.update(ones, optimizer.init(thin), thin)
    moved = {
        jax.tree_util.keystr(path): bool(jnp.any(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert [path for path, moves in moved.items() if not moves] == [f"['Dense_0']['kernel'].{side}"]
    assert len(moved) == 3


def turned(kernel, angle, side):
    """A kernel whose leading column or row is turned by an angle, away from all that it has."""
    u, s, vt = np.linalg.svd(np.float64(kernel), full_matrices=True)
    if side == "columns":
        u[:, 0] = np.cos(angle) * u[:, 0] + np.sin(angle) * u[:, 10]
    else:
        vt[0] = np.cos(angle) * vt[0] + np.sin(angle) * vt[10]
    return jnp.asarray(u[:, :SHORT] * s @ vt, jnp.float32)


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize(("angle", "new"), [(0.6, 0), (1.0, 1)])  # half of the squares at 0.785
def test_a_look_tells_new_directions_from_those_that_have_turned_a_little(side, angle, new):
    lower, known = after_a_cut()
    look = look_at(turned(lower, angle, side), known, known.threshold)
    assert (int(look.rank), int(look.new)) == (2, new)
    squares = np.linalg.svd(lower, compute_uv=False)[:2] ** 2
    over = LONG * float(known.threshold)
    # All rel are of float32.
    assert float(look.newest) == pytest.approx(new * squares[0] / over, rel=1e-3)
    # What has turned keeps its other side, so that nothing is outside both.
    assert float(look.beyond) < 1e-6
    within = (np.cos(angle) ** 2 * squares[0] + squares[1]) / squares.sum()
    assert float(look.first) == pytest.approx(within, rel=1e-3)


def test_a_look_sees_what_is_removed_and_what_is_beyond():
    lower, known = after_a_cut()
    u, _, vt = np.linalg.svd(np.float64(lower), full_matrices=True)
    weak = jnp.asarray(lower + 5 * np.outer(u[:, 5], vt[5]), jnp.float32)
    look = look_at(weak, known, known.threshold)
    wanted = 5**2 / (LONG * float(known.threshold))
    assert float(look.next) == pytest.approx(wanted, rel=1e-3)
    assert float(look.beyond) == pytest.approx(wanted, rel=1e-3)
    assert float(look.first) == pytest.approx(1, rel=1e-5)


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


def test_the_end_is_a_mean_of_epochs_and_is_compared_with_early_stopping():
    """By hand: the plain run stops at 80, the other ends at a mean of 77."""
    epoch = lambda test, **more: {"test": test, "validation": test, "wrong": 10.0, **more}
    plain = [epoch(80.0), *[epoch(60.0)] * 5]
    looks = {"looks": {"Dense_0": [7.0]}}
    other = [epoch(90.0), *(epoch(test, **looks) for test in (75.0, 76.0, 77.0, 78.0, 79.0))]
    runs = [{"way": n, "seed": 0, "history": h} for n, h in ((NOTHING, plain), (CARRIED, other))]
    table = drift.summary({"runs": runs}, drift.Config(seeds=(0,)))
    rows = [*zip(*(list(column.cells) for column in table.columns), strict=True)]
    assert rows == [
        (NOTHING, "60.00 (-20.00)", "10.00", ""),
        (CARRIED, "77.00 (-3.00)", "10.00", "7.0"),
    ]


def test_the_page_has_the_tables(capsys):
    blocks = (FOLDER / "docs" / "drift.md").read_text().split("```")[1::2]
    tried, looks, fresh = (blocks[i].removeprefix("text\n").splitlines() for i in (1, 0, 2))
    again = ["--seeds", "2", "3", "4", "--ways", NOTHING, CARRIED, *FRESH]
    for options, tables in ([], tried + looks), (again, fresh):
        assert drift.main(["--show-only", *options]) == 0
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert printed[: len(tables)] == tables
