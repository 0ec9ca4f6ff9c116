"""Sums over rows, their shrinkage and their centre, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmtjax.moments import Moment, Moments
from rmtjax.moments._moment import sums_of_lookups, sums_of_rows
from rmtjax.moments._second import second_moment


def rows_of(shape, seed=0):
    """Correlated rows with a mean."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(shape[-1], shape[-1])) / np.sqrt(shape[-1])
    return (draw.normal(size=shape) @ mix + draw.normal(size=shape[-1])).astype(np.float32)


def moments_of(moment, **options):
    return Moments({"a": moment}, {}, (("a", "a"),), **options)


# Under and over the widths from which a Gram matrix is made of two parts, and of three.
@pytest.mark.parametrize("shape", [(1, 30, 7), (3, 20, 12), (1, 40, 271), (1, 40, 520)])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_those_of_numpy(shape, transform, dtype):
    rows = jnp.asarray(rows_of(shape), dtype)
    found, wide = transform(sums_of_rows)(rows), np.asarray(rows, np.float64)
    norms = np.sum(wide**2, axis=-1)
    expected = {
        "rows": np.full(shape[0], shape[1]),
        "total": wide.sum(1),
        "second": np.swapaxes(wide, 1, 2) @ wide,
        "third": np.einsum("bn,bnm->bm", norms, wide),
        "fourth": np.sum(norms**2, axis=1),
    }
    for name, value in expected.items():
        seen = np.asarray(getattr(found, name))
        # Sums of float32, relative to the largest; products of bfloat16 are exact in float32.
        np.testing.assert_allclose(seen, value, rtol=1e-5, atol=1e-5 * np.abs(value).max())
    np.testing.assert_array_equal(found.second, np.swapaxes(found.second, 1, 2))


def test_a_million_rows_are_those_of_float64():
    # Sums of 1,000 batches, each added to what was there: as `linen.moments` does it.
    draw, total, expected = np.random.default_rng(0), None, np.zeros((4, 4))
    add = jax.jit(lambda a, b: a + b)
    for _ in range(100):
        rows = draw.normal([3.0, 0, -1, 0.1], size=(1, 10_000, 4)).astype(np.float32)
        expected += rows[0].astype(np.float64).T @ rows[0]
        sums = jax.jit(sums_of_rows)(rows)
        total = sums if total is None else add(total, sums)
    np.testing.assert_allclose(total.second[0] / 1e6, expected / 1e6, rtol=1e-4, atol=1e-5)
    assert total.rows[0] == 1_000_000


def test_lookups_are_rows_with_a_single_one():
    indices = np.array([[0, 3, 3], [5, 3, 0]])
    found = jax.jit(sums_of_lookups, static_argnums=1)(indices, 6)
    as_rows = sums_of_rows(jnp.asarray(np.eye(6, dtype=np.float32)[indices.ravel()])[None])
    np.testing.assert_array_equal(found.second, np.diagonal(as_rows.second, axis1=1, axis2=2))
    for name in ("rows", "total", "third", "fourth"):
        np.testing.assert_array_equal(getattr(found, name), getattr(as_rows, name))
    # The same shrinkage, whether a diagonal or a matrix is given.
    intensities = [
        second_moment(m, centred=False, shrinkage=None).intensity for m in (found, as_rows)
    ]
    np.testing.assert_allclose(*intensities, rtol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("count", [5, 40, 3000])
def test_the_shrinkage_is_that_of_ledoit_and_wolf(centred, count):
    rows = rows_of((1, count, 12))
    found = second_moment(sums_of_rows(jnp.asarray(rows)), centred=centred, shrinkage=None)
    x = rows[0].astype(np.float64)
    x = x - x.mean(0) if centred else x
    exact, level = x.T @ x / count, np.sum(x**2) / count / 12
    np.testing.assert_allclose(found.exact[0], exact, atol=1e-5 * np.abs(exact).max())
    # By the definition: the mean distance of one row's square from the mean of all.
    noise = np.mean([np.sum((np.outer(row, row) - exact) ** 2) for row in x]) / count
    spread = np.sum((exact - level * np.eye(12)) ** 2)
    # Fourth powers in float32.
    np.testing.assert_allclose(found.intensity[0], min(noise / spread, 1), rtol=1e-4)
    if centred:
        np.testing.assert_allclose(found.mean[0], rows[0].mean(0), rtol=1e-5)
    else:
        assert found.mean is None


def test_a_given_shrinkage_is_taken():
    second = moments_of(sums_of_rows(jnp.asarray(rows_of((1, 9, 3)))), shrinkage=0.25).second("a")
    assert second.intensity == 0.25
    equal = sums_of_rows(jnp.eye(3)[None])  # nothing to shrink, and nothing to divide by
    assert moments_of(equal).second("a").intensity == 0


def test_moments_add_up_and_pass_through_programs():
    rows = jnp.asarray(rows_of((1, 20, 6)))
    whole, (one, other) = (
        sums_of_rows(rows),
        (sums_of_rows(rows[:, s]) for s in (slice(8), slice(8, None))),
    )
    total = jax.jit(lambda a, b: a + b)(moments_of(one, centred=True), moments_of(other))
    assert total.centred
    assert [*total] == ["a"]
    assert total["a"].rows == 20
    # Sums of float32 in another order.
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())
    jax.tree.map(close, total["a"], whole)
    np.testing.assert_allclose(total["a"].mean[0], np.mean(rows[0], axis=0), rtol=1e-5)


def test_options_are_changed_one_at_a_time():
    moments = moments_of(sums_of_rows(jnp.ones((1, 2, 3))))
    assert moments.with_options(centred=True).shrinkage == "ledoit_wolf"
    assert not moments.with_options(shrinkage=0.5).centred
    with pytest.raises(
        ValueError, match=r"`shrinkage` must be in \[0, 1\] or 'ledoit_wolf', got 2"
    ):
        moments.with_options(shrinkage=2.0)


def test_moments_of_different_models_are_not_added():
    one, other = sums_of_rows(jnp.ones((1, 2, 3))), sums_of_rows(jnp.ones((1, 2, 4)))
    with pytest.raises(ValueError, match=r"`\+` needs moments of one kernel, got shapes"):
        one + other
    with pytest.raises(ValueError, match=r"`\+` needs moments of one model: 'b'"):
        moments_of(one) + Moments({"a": one}, {}, (("a", "a"), ("b", "a")))
    with pytest.raises(TypeError):
        moments_of(one) + 1
    with pytest.raises(TypeError):
        one + 1


def test_no_rows_are_refused():
    none = Moment(np.zeros(1, int), *(np.zeros(s) for s in ((1, 2), (1, 2, 2), (1, 2), (1,))))
    with pytest.raises(ValueError, match="`moments` has no rows for 'a': give batches in which"):
        moments_of(none).second("a")
