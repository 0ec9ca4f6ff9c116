"""Spectra that the host finds, against float64 singular values and the compiled programs."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import rmtjax
from rmtjax import ranks
from rmtjax._axes import KernelAxes
from rmtjax.planning import _measure
from rmtjax.spectra import _host_spectra, _values

MATRIX = KernelAxes((0,), (1,))
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
    return _host_spectra.host_spectra({"": (kernel, axes)}, lambda _, spectra: spectra)[""]


def found(matrix):
    return host_spectra(matrix).eigenvalues[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape", [(120, 120), (120, 200), (600, 60), (60, 600), (9000, 50), (7, 1)]
)
def test_equals_the_singular_values_in_float64(rng, shape, dtype):
    matrix = rng.standard_normal(shape).astype(dtype)
    spectra = host_spectra(matrix)
    assert spectra.eigenvalues.dtype == np.float32
    np.testing.assert_allclose(spectra.ratio, [min(shape) / max(shape)], rtol=EPS)
    expected = exact(matrix)
    # Small values of a square matrix are exact to the last bit of the largest, and far better.
    np.testing.assert_allclose(found(matrix), expected, rtol=1e-5, atol=EPS**2 * expected[0])


@pytest.mark.parametrize("shape", [(200, 200), (800, 200)])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_what_a_fit_uses_is_not_squared_away(rng, shape, condition):
    """Noise under directions that are larger by orders of magnitude, as in trained kernels."""
    noise = rng.standard_normal(shape)
    signal = np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
    matrix = (noise + condition / 30 * signal).astype(np.float32)
    expected = exact(matrix)
    # What remains is the rounding of float64, of the largest eigenvalue.
    np.testing.assert_allclose(found(matrix), expected, rtol=3e-4, atol=expected[0] / 2**53)


@pytest.mark.parametrize("columns", [100, 300])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_follows_the_scale(rng, scale, columns):
    matrix = rng.standard_normal((300, columns)).astype(np.float32)
    scaled = found((scale * matrix).astype(np.float32))
    bulk = slice(columns - 5)
    np.testing.assert_allclose(scaled[bulk], scale**2 * found(matrix)[bulk], rtol=1e-4)


def test_squares_may_leave_the_range_of_float32(rng):
    """The eigenvalues are the squares over n: they need not, and then there is no warning."""
    matrix = np.zeros((400, 50), np.float32)
    matrix[np.arange(50), np.arange(50)] = 1.9e19 * np.linspace(1, 2, 50)
    assert np.isfinite(found(matrix)[-1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_a_spectrum_of_nan(rng, bad):
    kernel = rng.standard_normal((3, 60, 80)).astype(np.float32)
    kernel[1, 5, 7] = bad
    spectra = host_spectra(kernel, KernelAxes((1,), (2,), (0,)))
    np.testing.assert_array_equal(np.isnan(spectra.eigenvalues).all(axis=1), [False, True, False])


def test_a_thin_product_has_directions_of_nothing(rng):
    thin = rng.standard_normal((300, 20)) @ rng.standard_normal((20, 400))
    values = found(thin.astype(np.float32))
    assert (values[20:] < (300 * EPS) ** 2 * values[0]).all()
    np.testing.assert_array_equal(found(np.zeros((60, 50), np.float32)), np.zeros(50))


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
    axes = [MATRIX] * 7 + [KernelAxes((1,), (2,), (0,))]
    pairs = zip(kernels, axes, strict=True)
    return {str(i): (kernel.astype(np.float32), own) for i, (kernel, own) in enumerate(pairs)}


def test_many_at_once_are_as_one_alone(rng, threads):
    kernels = many(rng)
    together = _host_spectra.host_spectra(kernels, lambda path, spectra: (path, spectra))
    assert together.keys() == kernels.keys()
    for path, (told, spectra) in together.items():
        assert told == path
        kernel = kernels[path][0]
        matrices = kernel.reshape(-1, *kernel.shape[-2:])
        expected = np.array([exact(matrix) for matrix in matrices])
        atol = EPS**2 * np.max(expected)
        np.testing.assert_allclose(spectra.eigenvalues, expected, rtol=1e-5, atol=atol)


def test_threads_are_given_back(rng, threads):
    kernels = many(rng)
    before, within = num_threads(), []
    _host_spectra.host_spectra(kernels, lambda *_: within.append(num_threads()))
    assert {1} == {number for numbers in within for number in numbers}
    assert num_threads() == before

    def fail(*_):
        raise KeyError("of the one who uses a spectrum")

    with pytest.raises(KeyError, match="who uses"):
        _host_spectra.host_spectra(kernels, fail)
    assert num_threads() == before


def test_there_are_as_many_at_once_as_blas_has_threads(threads, monkeypatch):
    together, find = threading.Barrier(threads), _host_spectra._beside_others
    inside, most = threading.Semaphore(threads), []

    def meet(*args):
        most.append(inside.acquire(blocking=False))  # not by one more
        together.wait(10)  # and fails alone
        found = find(*args)
        inside.release()
        return found

    monkeypatch.setattr(_host_spectra, "_beside_others", meet)
    kernels = {str(i): (np.eye(600, dtype=np.float32), MATRIX) for i in range(10)}
    assert len(_host_spectra.host_spectra(kernels, lambda _, spectra: spectra)) == 10
    assert most == [True] * 10


class Library:
    """A BLAS of which each thread has a limit of its own, and which goes on telling its number."""

    def __init__(self, *told):
        self.lib_controllers = [SimpleNamespace(num_threads=number) for number in told]
        self.limited = set()

    def limit(self, limits):
        assert limits == 1
        self.limited.add(threading.get_ident())
        return contextlib.nullcontext()


@pytest.mark.parametrize("told", [(), (None,), (0,), (1,), (7,), (None, 7)])
def test_each_thread_is_limited_whatever_a_library_tells(rng, told, monkeypatch):
    library, kernels = Library(*told), many(rng)
    find, seen = _host_spectra._beside_others, set()
    look = lambda *args: (seen.add(threading.get_ident()), find(*args))[1]
    monkeypatch.setattr(_host_spectra, "_libraries", lambda: library)
    monkeypatch.setattr(_host_spectra, "_beside_others", look)
    spectra = _host_spectra.host_spectra(kernels, lambda _, spectra: spectra)
    assert spectra.keys() == kernels.keys()
    assert seen <= library.limited
    if 7 in told:  # which it keeps: one matrix at a time
        assert len(seen) == 1


def test_a_rule_may_make_a_plan_of_its_own(rng):
    kernels = many(rng)
    inner = lambda *_: _host_spectra.host_spectra(kernels, lambda path, _: path)
    found = _host_spectra.host_spectra(kernels, inner)
    assert found == {path: {path: path for path in kernels} for path in kernels}


def test_layouts_that_must_be_copied(rng):
    """As attention has them: heads, inputs, size of a head."""
    axes = KernelAxes((1,), (0, 2))
    kernels = {str(i): (rng.standard_normal((4, 70, 15 + i), np.float32), axes) for i in range(9)}
    found = _host_spectra.host_spectra(kernels, lambda _, spectra: spectra)
    for path, (kernel, _) in kernels.items():
        expected = exact(kernel.transpose(1, 0, 2).reshape(70, -1))
        own = found[path].eigenvalues[0]
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=EPS**2 * expected[0])


def test_who_limits_the_threads_is_not_joined_by_others(rng):
    """Who came second would take the limit of the first for that of the user, and restore it."""
    kernels, joined = many(rng), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asked = []

        def first(*_):
            if not asked:
                second = lambda *_: joined.set()
                asked.append(pool.submit(_host_spectra.host_spectra, kernels, second))
                assert not joined.wait(0.3)

        _host_spectra.host_spectra(kernels, first)
        asked[0].result()
    assert joined.is_set()


def test_large_ones_share_the_threads_in_little_room(rng, monkeypatch):
    monkeypatch.setattr(_host_spectra, "_LARGE", 100)
    kernels = {
        name: (rng.standard_normal((n, n)).astype(np.float32), MATRIX)
        for name, n in {"small": 60, "large": 100, "larger": 120, "least": 50}.items()
    }
    within = {}
    spectra = _host_spectra.host_spectra(
        kernels, lambda path, own: within.setdefault(path, (num_threads(), own))
    )
    assert [*spectra] == ["larger", "large", "small", "least"]
    assert within["large"][0] == within["larger"][0] == num_threads()
    for path, (kernel, _) in kernels.items():
        expected = exact(kernel)
        own = spectra[path][1].eigenvalues[0]
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=EPS**2 * expected[0])


def test_the_host_takes_what_lies_there():
    kernel = np.ones((4, 4), np.float32)
    assert _values.on_host(kernel)
    assert _values.on_host(jnp.asarray(kernel))
    assert _values.on_host(jax.ShapeDtypeStruct((4, 4), np.float16))
    assert not _values.on_host(kernel.astype(np.float64))
    assert not _values.on_host(rmtjax.Factors(kernel, kernel))
    assert not jax.jit(lambda kernel: jnp.asarray(_values.on_host(kernel)))(kernel)


@pytest.mark.parametrize("rule", [ranks.bema(), ranks.gavish_donoho(), ranks.energy(0.9)])
def test_a_plan_is_that_of_the_compiled_programs(rng, rule, monkeypatch):
    """On a GPU all kernels are measured in these."""
    planted = rng.standard_normal((100, 240)).astype(np.float32)
    planted[:, :4] += 3
    stack = jnp.asarray(rng.standard_normal((3, 80, 100)), jnp.bfloat16)
    params = {"a": planted, "b": {"c": stack, "d": np.asarray(planted.T[:90])}}
    axes = {"a": MATRIX, "b/c": KernelAxes((1,), (2,), (0,)), "b/d": MATRIX}
    here = rmtjax.plan(params, axes=axes, rule=rule)
    again = rmtjax.plan(params, axes=axes, rule=rule, fits={"a": here["a"].fit})
    monkeypatch.setattr(_measure, "on_host", lambda kernel: False)
    there = rmtjax.plan(params, axes=axes, rule=rule)
    assert str(here) == str(there) == str(again)
    for row, other in zip(here.values(), there.values(), strict=True):
        np.testing.assert_allclose(row.spectrum.eigenvalues, other.spectrum.eigenvalues, 1e-4, 1e-6)
        for number, like in zip(row.fit, other.fit, strict=True):
            np.testing.assert_allclose(number, like, rtol=1e-4, atol=1e-6)
