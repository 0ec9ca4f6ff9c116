"""The leading directions alone: against NumPy in float64, planted spikes, scales and failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rmtjax._axes import KernelAxes
from rmtjax.spectra import _svd
from rmtjax.spectra._subspace_iteration import block_size, iteration_pays, leading, leading_above

MATRIX, STACK = KernelAxes((0,), (1,)), KernelAxes((1,), (2,), (0,))


def first_directions(kernel, axes, rank):
    """The first directions by iteration, of smaller matrices than those for which it pays."""
    options = {"axes": axes, "block": block_size(rank), "iterate": True}
    u, s, vt = _svd.directions(jnp.asarray(kernel), rank, **options)
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def spiked(shape, values, seed=0, dtype: type = np.float32):
    """Unit noise, of norm about sqrt(m) + sqrt(n), and some directions on top of it."""
    rng = np.random.default_rng(seed)
    rows, columns = shape
    u, _ = np.linalg.qr(rng.normal(size=(rows, len(values))))
    v, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
    return (rng.normal(size=shape) + (u * np.array(values)) @ v.T).astype(dtype)


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


def assert_leads(matrix, rank, rtol, found=None):
    """The product of the first directions is NumPy's, relative to the largest value."""
    if found is None:
        found = leading(jnp.asarray(matrix), rank, block_size(rank))
        assert found.converged
    u, s, vt = (np.asarray(part, np.float64) for part in found[:3])
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    wanted, values = truncated(matrix, rank)
    np.testing.assert_allclose((u * s) @ vt, wanted, rtol=0, atol=rtol * np.abs(wanted).max())
    np.testing.assert_allclose(s, values[:rank], rtol=0, atol=rtol * values[0])
    for vectors in (u, vt.T):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 300), (300, 420), (900, 300), (300, 900)], ids=str)
def test_spikes_are_those_of_the_decomposition(shape):
    matrix = spiked(shape, np.linspace(200, 60, 9))
    # Rounding of float32, over the gap between the last spike and the bulk: 20 eps / 0.1.
    assert_leads(matrix, 9, rtol=3e-5)
    found = [part[0] for part in first_directions(matrix, MATRIX, 9)]
    assert_leads(matrix, 9, 3e-5, found)


def test_in_float64_they_are_found_to_its_rounding():
    with jax.enable_x64(True):
        assert_leads(spiked((300, 400), [200, 100, 60], dtype=np.float64), 3, rtol=1e-12)


@settings(max_examples=12, deadline=None)
@given(
    scale=st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]),
    rank=st.sampled_from([1, 5, 12]),  # of two blocks, each compiled once
    top=st.floats(70, 1e5),
    seed=st.integers(0, 99),
)
def test_the_certificate_holds_at_all_scales(scale, rank, top, seed):
    matrix = (scale * spiked((320, 300), np.geomspace(top, 60, rank), seed)).astype(np.float32)
    found = leading(jnp.asarray(matrix), rank, block_size(rank))
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert found.converged
    # Weyl: each value found lies within the residual of a true one, here of its own; and rounding.
    apart = np.abs(np.asarray(found.s[:rank], np.float64) - values[:rank]).max()
    assert apart <= (float(found.residual) + 2e-6) * values[0]


def test_values_of_any_rank_and_clusters_are_no_trouble():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 300))  # lower than the rank asked for
    assert_leads(low.astype(np.float32), 5, rtol=2e-5)
    _, s, _ = first_directions(low.astype(np.float32), MATRIX, 9)
    assert (s[0, 5:] < 1e-5 * s[0, 0]).all()
    equal = spiked((300, 300), [300.0] * 4)  # one value, four times: any basis of it will do
    assert_leads(equal, 4, rtol=3e-5)


def test_what_cannot_converge_gives_up_and_is_decomposed():
    # The values differ by less than their rounding: any direction is as good as another.
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(300, 300)))[0] for _ in range(2))
    matrix = ((u * np.linspace(1, 1 - 1e-5, 300)) @ v.T).astype(np.float32)
    assert not leading(jnp.asarray(matrix), 4, block_size(4)).converged
    u, s, vt = (np.asarray(part[0], np.float64) for part in first_directions(matrix, MATRIX, 4))
    np.testing.assert_allclose(matrix @ vt.T, u * s, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_and_what_is_not_finite_are_told(dtype):
    zeros = jnp.zeros((300, 300), dtype)
    u, s, vt = first_directions(zeros, MATRIX, 4)
    assert all(np.isfinite(part).all() for part in (u, vt))
    assert (s == 0).all()
    _, s, _ = first_directions(zeros.at[3, 3].set(jnp.inf), MATRIX, 4)
    assert np.isnan(s).all()
    stack = jnp.stack([zeros.at[0, 0].set(jnp.nan), zeros.at[0, 0].set(2)])
    _, s, _ = first_directions(stack, STACK, 2)
    assert np.isnan(s[0]).all()
    np.testing.assert_allclose(s[1], [2, 0], atol=1e-6)


def test_one_program_serves_the_ranks_of_a_block(caplog):
    matrix = jnp.asarray(spiked((310, 300), np.linspace(200, 60, 6)))
    first_directions(matrix, MATRIX, 2)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for rank in (3, 4, 5, 6):
            assert block_size(rank) == 16
            first_directions(matrix, MATRIX, rank)
    assert not [line for line in caplog.messages if "directions" in line]


@pytest.mark.parametrize("shape", [(1000, 1000), (1500, 1000), (1000, 1500)])
def test_few_directions_of_a_large_matrix_are_iterated(shape):
    assert iteration_pays(16, shape)
    assert not iteration_pays(104, shape)  # over a tenth
    assert not iteration_pays(16, (999, 1000))  # too small to be worth compiling
    assert not iteration_pays(16, (1000, 2000))  # long, and decomposed by its triangle


@settings(max_examples=12, deadline=None)
@given(
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    shape=st.sampled_from([(300, 320), (320, 300)]),
    above=st.integers(0, 12),
    top=st.floats(62, 1e5),
    seed=st.integers(0, 99),
)
def test_none_above_a_value_is_missed(scale, shape, above, top, seed):
    planted = np.geomspace(top, 60, above) if above else []  # the noise ends at 35
    matrix = (scale * spiked(shape, planted, seed)).astype(np.float32)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    least = scale * 55
    found = leading_above(jnp.asarray(matrix), jnp.float32(least), 32)
    assert found.converged
    assert int((found.s > least).sum()) == (values > least).sum()
    assert_leads(matrix.astype(np.float64) / scale, above, 3e-5, found._replace(s=found.s / scale))


def test_one_that_stands_alone_beside_a_giant_is_not_missed():
    """When the giant has converged, the block has hardly been lifted: to look on is what counts."""
    matrix = spiked((300, 300), [1e5, 40])
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    found = leading_above(jnp.asarray(matrix), jnp.float32(values[1] * 0.999), 16)
    assert not found.converged or int((found.s > values[1] * 0.999).sum()) == 2


@pytest.mark.parametrize("least", [1.0, 33.0])
def test_what_fills_its_block_gives_up(least):
    matrix = spiked((300, 300), np.linspace(90, 60, 20))
    found = leading_above(jnp.asarray(matrix), jnp.float32(least), 16)
    assert not found.converged
