"""Moments after cuts: the projections against NumPy, and the table of the page."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from experiments import moments_after_cuts as study

AXES = rmtjax.KernelAxes((0,), (1,), ())


def kernels_and_moments():
    """A kernel of some energy in all directions, and the state of SGD with a momentum."""
    kernel, momentum = (jax.random.normal(jax.random.key(i), (60, 90)) for i in (0, 1))
    params = {"kernel": kernel, "bias": jnp.ones(90)}
    state = optax.sgd(0.1, momentum=0.9).init(params)
    return params, optax.tree.set(state, trace={"kernel": momentum, "bias": jnp.ones(90)})


@pytest.mark.parametrize("way", ["kept", "projected", "tangent"])
def test_a_cut_and_its_projections_are_those_of_numpy(way):
    params, state = kernels_and_moments()
    kernels = study.Kernels(params, {"kernel": AXES})
    lower, new, _, removed, lost = study.cut(
        kernels, way, "trace", params, state, {"kernel": jnp.asarray(10)}
    )
    u, s, vt = np.linalg.svd(np.asarray(params["kernel"], float), full_matrices=False)
    u, vt = u[:, :10], vt[:10]
    # Entries near 1, in float32.
    close = lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    close(lower["kernel"], u * s[:10] @ vt)
    close(removed, (s[10:] ** 2).sum())
    momentum = np.asarray(optax.tree.get(state, "trace")["kernel"], float)
    rest = momentum - u @ (u.T @ momentum)
    rest -= rest @ vt.T @ vt
    close(lost, (rest**2).sum() / (momentum**2).sum())
    wanted = {
        "kept": momentum,
        "projected": u @ (u.T @ momentum @ vt.T) @ vt,
        "tangent": momentum - rest,
    }
    found = optax.tree.get(new, "trace")
    close(found["kernel"], wanted[way])
    np.testing.assert_array_equal(found["bias"], 1)
    np.testing.assert_array_equal(lower["bias"], params["bias"])


def test_steps_of_adam_are_projected_and_entries_without_gradients_get_none():
    params, _ = kernels_and_moments()
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (60, 90))
    mean, square = draw(2).at[3].set(0), (draw(3) ** 2).at[3].set(0)
    state = optax.adam(0.1).init({"kernel": params["kernel"]})
    state = optax.tree.set(state, mu={"kernel": mean}, nu={"kernel": square})
    kernels = study.Kernels(params, {"kernel": AXES})
    ranks = {"kernel": jnp.asarray(10)}
    params = {"kernel": params["kernel"]}
    _, new, sides, *_ = study.cut(kernels, "steps", "mu", params, state, ranks)
    found = optax.tree.get(new, "mu")["kernel"]
    left, right = (np.asarray(side[0], float) for side in sides["kernel"])
    scale = np.sqrt(np.asarray(square, float)) + 1e-8
    np.testing.assert_allclose(found, scale * (left @ (mean / scale) @ right), rtol=1e-3, atol=1e-3)
    assert np.abs(found[3]).max() < 1e-5


def test_ranks_remove_no_more_than_the_share():
    params, _ = kernels_and_moments()
    squares = np.linalg.svd(params["kernel"], compute_uv=False) ** 2
    rank = study.Kernels(params, {"kernel": AXES}).ranks(params, 0.25)["kernel"]
    assert squares[rank:].sum() <= 0.25 * squares.sum() < squares[rank - 1 :].sum()


def test_the_page_has_the_tables_of_the_committed_results(capsys):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    assert study.main(["--show-only"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(lines).strip() in page
