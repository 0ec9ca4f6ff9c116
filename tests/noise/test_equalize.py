"""Scales of the noise by rows and columns, against NumPy in float64 and the authors' packages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import ranks

SHAPE = (60, 90)
PLACES = ([0, 10, 59], [0, 20, 89])


def scaled(seed=7, shape=SHAPE):
    """Noise with log-normal scales of rows and columns, and one direction of signal."""
    rng = np.random.default_rng(seed)
    rows, columns = shape
    noise = np.exp(0.5 * rng.standard_normal((rows, 1))) * rng.standard_normal(shape)
    noise *= np.exp(0.3 * rng.standard_normal((1, columns)))
    return noise + 3 * rng.standard_normal((rows, 1)) * rng.standard_normal((1, columns))


def reference(matrix, steps):
    """Deviations of the noise by steps of the Dyson equalizer, from inverse matrices."""
    rows, columns = (np.ones(side) for side in matrix.shape)
    for _ in range(steps):
        even = matrix / np.outer(rows, columns)
        eta = np.median(np.linalg.svd(even, compute_uv=False))
        inverse = lambda square: np.linalg.inv(square + eta**2 * np.eye(len(square)))  # noqa: B023
        g, h = (eta * np.diag(inverse(square)) for square in (even @ even.T, even.T @ even))
        x = (1 / g - eta) / np.sqrt(len(g) - eta * g.sum())
        y = (1 / h - eta) / np.sqrt(len(h) - eta * h.sum())
        share = np.sqrt(x.mean() / y.mean())
        rows, columns = rows * np.sqrt(x / share), columns * np.sqrt(y * share)
    return np.outer(rows, columns)


def deviations(even):
    return np.outer(np.asarray(even.rows, np.float64), even.columns)


def test_the_reference_is_the_authors_step():
    # dyson-equalizer 0.1.8, `compute_scaling_factors`: variances.
    known = [0.5992135811666794, 0.6893744723141113, 0.6474158148230272]
    np.testing.assert_allclose(reference(scaled(), 1)[PLACES] ** 2, known, rtol=1e-9)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_scales_are_those_of_the_reference(transform, turned):
    matrix = scaled()
    given = jnp.asarray(matrix.T if turned else matrix, jnp.float32)
    even = transform(rmtjax.equalize)(given)
    assert even.converged
    found = deviations(even)
    # The last step moves variances by less than 0.1 %, and each shrinks the rest fivefold.
    np.testing.assert_allclose(found.T if turned else found, reference(matrix, 40), rtol=1e-3)
    np.testing.assert_allclose(even.matrix * found.astype(np.float32), given, rtol=1e-5)
    mean_square = lambda scales: float(jnp.mean(scales**2))
    np.testing.assert_allclose(mean_square(even.rows), mean_square(even.columns), rtol=1e-5)
    # brine-equalizer 0.2.0 stops by the distance from the law: it is within 5 % of the rest.
    brine = [0.8012832037057867, 0.7652736074858187, 0.6990985724650521]
    places = PLACES[::-1] if turned else PLACES
    np.testing.assert_allclose(found[places], brine, rtol=0.05)


@pytest.mark.parametrize("sides", ["rows", "columns"])
def test_one_side_has_scales_and_the_other_none(sides):
    rng = np.random.default_rng(0)
    scales = np.exp(0.7 * rng.standard_normal((100, 1)))
    kernel = np.float32(scales * rng.standard_normal((100, 300)))
    even = rmtjax.equalize(kernel if sides == "rows" else kernel.T, sides=sides)
    own, other = (even.rows, even.columns) if sides == "rows" else (even.columns, even.rows)
    assert float(jnp.ptp(other)) == 0
    # Each is known to 1 / sqrt(2 n), 4 %; the largest of a hundred errors is 2.6 times that.
    np.testing.assert_allclose(own * other[0], scales[:, 0], rtol=0.15)


def count(matrix, rule=ranks.bema()):  # noqa: B008 - a frozen value
    spectrum = rmtjax.spectrum(matrix)
    fit = rule.fit(spectrum)
    return int(fit.num_spikes), bool(rule.accepts(spectrum, fit))


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("planted", [0, 8])
def test_planted_directions_are_found_where_the_plain_fit_is_lost(sigma, planted):
    rng = np.random.default_rng(1)
    shape = 200, 400
    left, right = (np.linalg.qr(rng.standard_normal((side, planted))).Q for side in shape)
    noise = np.exp(sigma * rng.standard_normal((200, 1))) * rng.standard_normal(shape)
    kernel = np.float32(noise + (left * 20 * np.linspace(2, 5, planted)) @ right.T)
    plain, accepted = count(kernel)
    assert plain > planted + 8
    assert not accepted
    assert count(rmtjax.equalize(kernel).matrix) == (planted, True)


def test_a_stack_scales_far_from_one_and_other_dtypes():
    kernel = jnp.asarray(scaled(), jnp.float32)
    even = rmtjax.equalize(kernel)
    several = jax.vmap(rmtjax.equalize)(jnp.stack([kernel, 1e-25 * kernel, 1e25 * kernel]))
    assert several.converged.all()
    for scale, one in zip([1, 1e-25, 1e25], several.matrix, strict=True):
        np.testing.assert_allclose(one, even.matrix, rtol=1e-3, err_msg=str(scale))
    half = rmtjax.equalize(kernel.astype(jnp.bfloat16))
    assert half.matrix.dtype == jnp.float32
    np.testing.assert_allclose(half.rows, even.rows, rtol=0.01)  # bfloat16 has 8 bits


def test_zeros_constants_and_what_is_not_finite():
    kernel = scaled().astype(np.float32)
    padded = np.zeros((100, 90), np.float32)
    padded[:60] = kernel
    even = rmtjax.equalize(padded)
    # With more than half of the singular values zero, the median is that of the others.
    np.testing.assert_allclose(even.matrix[:60], rmtjax.equalize(kernel).matrix, rtol=5e-3)
    for matrix in (np.zeros(SHAPE, np.float32), np.ones((1, 1), np.float32)):
        even = rmtjax.equalize(matrix)
        assert all(np.isfinite(field).all() for field in even)
        assert (even.rows > 0).all()
        assert (even.columns > 0).all()
    kernel[3, 4] = np.nan
    even = rmtjax.equalize(kernel)
    assert not even.converged
    np.testing.assert_array_equal(even.matrix, kernel)


def test_wrong_arguments_are_errors():
    with pytest.raises((ValueError, TypeError), match=r"sides"):
        rmtjax.equalize(np.ones(SHAPE, np.float32), sides="row")
    with pytest.raises((ValueError, TypeError), match="matrix"):
        rmtjax.equalize(np.ones((3, 4, 5), np.float32))
    with pytest.raises((ValueError, TypeError), match="matrix"):
        rmtjax.equalize(np.ones(SHAPE, np.int32))
    with pytest.raises((ValueError, TypeError), match="equalize"):
        ranks.bema(equalize="rows")
    for make in (rmtjax.prune_spectrum, rmtjax.lowrank.shrink_tail):
        options = {"strength": 0.1} if make is rmtjax.lowrank.shrink_tail else {}
        with pytest.raises(ValueError, match="`rule` must have `equalize=False` outside of plans"):
            make(every=10, rule=ranks.bema(equalize=True), **options)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(60, 60), (60, 120), (100, 400)])
def test_noise_alone_has_spikes_at_the_level_of_the_rule(shape):
    rng = np.random.default_rng(3)
    scale = lambda *size: np.exp(0.5 * rng.standard_normal(size))
    make = lambda: scale(shape[0], 1) * rng.standard_normal(shape) * scale(1, shape[1])
    params = {"kernel": jnp.asarray(np.stack([make() for _ in range(500)]), jnp.float32)}
    axes = {"kernel": rmtjax.KernelAxes((1,), (2,), (0,))}
    for level in (0.01, 0.1):
        rule = ranks.bema(level=level, equalize=True)
        counts = rmtjax.plan(params, rule=rule, axes=axes)["kernel"].fit.num_spikes
        # Three standard errors of 500 draws, and 0.02 of the correction by the aspect ratio.
        assert abs(np.mean(counts > 0) - level) < 0.02 + 3 * (level * (1 - level) / 500) ** 0.5
