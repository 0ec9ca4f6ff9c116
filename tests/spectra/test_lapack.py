"""Spectra by LAPACK on the host, against NumPy in float64."""

import contextlib
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits, ThreadpoolController

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax.spectra import spectra

MATRIX, STACK = KernelAxes((0,), (1,)), KernelAxes((1,), (2,), (0,))
EPS = np.finfo(np.float32).eps


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def exact(matrix):
    """Eigenvalues by the singular values in float64; NaN where these do not exist."""
    if not np.isfinite(matrix).all():
        return np.full(min(matrix.shape), np.nan)
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2 / max(matrix.shape)


def host_spectra(kernel, axes=MATRIX):
    return spectra({"": MatrixView("", kernel, axes)})[""].spectrum


def eigenvalues(matrix):
    return host_spectra(matrix).eigenvalues[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape", [(120, 120), (120, 200), (600, 60), (60, 600), (9000, 50), (7, 1)]
)
def test_equals_the_singular_values_in_float64(rng, shape, dtype):
    matrix = rng.standard_normal(shape).astype(dtype)
    result = host_spectra(matrix)
    assert result.eigenvalues.dtype == np.float32
    np.testing.assert_allclose(result.ratio, [min(shape) / max(shape)], rtol=EPS)
    expected = exact(matrix)
    # Small values of a square matrix are exact to the last bit of the largest, and far better.
    np.testing.assert_allclose(eigenvalues(matrix), expected, rtol=1e-5, atol=EPS**2 * expected[0])


@pytest.mark.parametrize("shape", [(200, 200), (800, 200)])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_what_a_fit_uses_is_not_squared_away(rng, shape, condition):
    """Noise under directions that are larger by orders of magnitude, as in trained kernels."""
    noise = rng.standard_normal(shape)
    signal = np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
    matrix = (noise + condition / 30 * signal).astype(np.float32)
    expected = exact(matrix)
    # What remains is the rounding of float64, of the largest eigenvalue.
    np.testing.assert_allclose(eigenvalues(matrix), expected, rtol=3e-4, atol=expected[0] / 2**53)


@pytest.mark.parametrize("columns", [100, 300])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_follows_the_scale(rng, scale, columns):
    matrix = rng.standard_normal((300, columns)).astype(np.float32)
    scaled = eigenvalues((scale * matrix).astype(np.float32))
    bulk = slice(columns - 5)
    np.testing.assert_allclose(scaled[bulk], scale**2 * eigenvalues(matrix)[bulk], rtol=1e-4)


def test_squares_may_leave_the_range_of_float32(rng):
    """The eigenvalues are the squares over n: they need not, and then there is no warning."""
    matrix = np.zeros((400, 50), np.float32)
    matrix[np.arange(50), np.arange(50)] = 1.9e19 * np.linspace(1, 2, 50)
    assert np.isfinite(eigenvalues(matrix)[-1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_a_spectrum_of_nan(rng, bad):
    kernel = rng.standard_normal((3, 60, 80)).astype(np.float32)
    kernel[1, 5, 7] = bad
    result = host_spectra(kernel, STACK)
    np.testing.assert_array_equal(np.isnan(result.eigenvalues).all(axis=1), [False, True, False])


def test_a_thin_product_has_directions_of_nothing(rng):
    thin = rng.standard_normal((300, 20)) @ rng.standard_normal((20, 400))
    values = eigenvalues(thin.astype(np.float32))
    assert (values[20:] < (300 * EPS) ** 2 * values[0]).all()
    np.testing.assert_array_equal(eigenvalues(np.zeros((60, 50), np.float32)), np.zeros(50))


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    """So many threads of NumPy's BLAS, and as many matrices at once."""
    with threadpool_limits(request.param, user_api="blas"):
        yield request.param


def num_threads():
    return [
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    ]


def many(rng):
    """Kernels of many shapes: alone or in stacks, long or not, one of them not finite."""
    shapes = [(60, 60), (60, 60), (300, 60), (60, 130), (520, 600), (300, 60), (7, 1), (5, 60, 80)]
    scales = np.geomspace(1e-12, 1e12, len(shapes))
    kernels = [a * rng.standard_normal(shape) for a, shape in zip(scales, shapes, strict=True)]
    kernels[5] += 100 * kernels[5].max()  # to be squared in float64, and its neighbour is not
    kernels[1][3, 4] = np.nan
    axes = [MATRIX] * 7 + [STACK]
    pairs = zip(kernels, axes, strict=True)
    views = [MatrixView(str(i), a.astype(np.float32), axes) for i, (a, axes) in enumerate(pairs)]
    return {view.path: view for view in views}


def assert_exact(view, values):
    """The eigenvalues are those of the matrices in float64, to the rounding of the largest."""
    expected = np.array([exact(matrix) for matrix in view.matrices()])
    atol = EPS**2 * np.max(expected)
    np.testing.assert_allclose(values.spectrum.eigenvalues, expected, rtol=1e-5, atol=atol)


@pytest.mark.slow
def test_many_at_once_are_as_one_alone(rng, threads):
    views = many(rng)
    together = spectra(views)
    assert [*together] == [*views]
    for path, view in views.items():
        assert_exact(view, together[path])
        assert (together[path].num_exact == view.short).all()


def test_threads_are_given_back(rng, threads, monkeypatch):
    before, decompose, within = num_threads(), np.linalg.eigvalsh, []
    spy = lambda squares: (within.extend(num_threads()), decompose(squares))[1]
    monkeypatch.setattr(np.linalg, "eigvalsh", spy)
    spectra(many(rng))
    assert set(within) == {1}
    assert num_threads() == before

    def fail(squares):
        raise KeyError("in the middle")

    monkeypatch.setattr(np.linalg, "eigvalsh", fail)
    with pytest.raises(KeyError, match="in the middle"):
        spectra(many(rng))
    assert num_threads() == before


def test_there_are_as_many_at_once_as_blas_has_threads(threads, monkeypatch):
    together, decompose = threading.Barrier(threads), np.linalg.eigvalsh
    free, met = threading.Semaphore(threads), []

    def meet(squares):
        met.append(free.acquire(blocking=False))  # False if there is one more than threads
        together.wait(60)  # and fails if there is one less
        values = decompose(squares)
        free.release()
        return values

    monkeypatch.setattr(np.linalg, "eigvalsh", meet)
    kernel = np.eye(600, dtype=np.float32)
    assert len(spectra({str(i): MatrixView(str(i), kernel, MATRIX) for i in range(10)})) == 10
    assert met == [True] * 10


class Library:
    """A BLAS in which each thread has its limit, with any number of threads or none."""

    def __init__(self, *counts):
        self.lib_controllers = [SimpleNamespace(num_threads=count) for count in counts]
        self.limited = set()

    def limit(self, limits):
        assert limits == 1
        self.limited.add(threading.get_ident())
        return contextlib.nullcontext()


@pytest.mark.parametrize("counts", [(), (None,), (0,), (1,), (7,), (None, 7)])
def test_each_thread_is_limited_whatever_number_a_library_gives(rng, counts, monkeypatch):
    library, views, seen = Library(*counts), many(rng), set()
    decompose = np.linalg.eigvalsh
    spy = lambda squares: (seen.add(threading.get_ident()), decompose(squares))[1]
    monkeypatch.setattr(np.linalg, "eigvalsh", spy)
    monkeypatch.setattr(ThreadpoolController, "select", lambda self, user_api: library)
    assert spectra(views).keys() == views.keys()
    assert seen
    assert seen <= library.limited


def test_no_code_of_a_leaf_runs_while_threads_are_limited(rng):
    class Leaf:
        """A kernel that finds spectra of its own when it becomes an array."""

        shape, dtype = (60, 60), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            spectra(inner)
            return np.eye(60, dtype=np.float32)

    inner = {path: view for path, view in many(rng).items() if path in "02"}
    outer = inner | {"leaf": MatrixView("leaf", Leaf(), MATRIX)}
    assert spectra(outer).keys() == outer.keys()


def test_layouts_that_must_be_copied(rng):
    """As attention has them: heads, inputs, size of a head."""
    axes = KernelAxes((1,), (0, 2))
    kernels = [rng.standard_normal((4, 70, 15 + i), np.float32) for i in range(9)]
    views = {str(i): MatrixView(str(i), kernel, axes) for i, kernel in enumerate(kernels)}
    for path, values in spectra(views).items():
        assert_exact(views[path], values)


def test_large_ones_are_decomposed_in_place_beside_small_ones(rng):
    """From 2,048 columns on. The singular values of diagonals are known without decomposing."""
    small = rng.standard_normal((60, 70)).astype(np.float32)
    diagonals = {str(n): np.linspace(2, 1, n, dtype=np.float32) for n in (2048, 2060)}
    views = {path: MatrixView(path, np.diag(d), MATRIX) for path, d in diagonals.items()}
    views = {"small": MatrixView("small", small, MATRIX)} | views
    results = spectra(views)
    assert [*results] == [*views]
    assert_exact(views["small"], results["small"])
    for path, diagonal in diagonals.items():
        expected = diagonal.astype(np.float64) ** 2 / len(diagonal)
        np.testing.assert_allclose(results[path].spectrum.eigenvalues[0], expected, rtol=EPS)
