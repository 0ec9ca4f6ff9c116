"""Kernels in spectral form: what they hold, how they run, and how their values are pruned."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.linen_checks import draw
from helpers.transform_checks import planted

import rmtjax
from rmtjax import KernelAxes, linen, ranks
from rmtjax.lowrank import prune_values, SpectralFactors, to_factors, to_spectral
from rmtjax.nnx import params as nnx_params

STACK = KernelAxes((1,), (2,), (0,))
# Float32 products in another order, relative to the largest entry.
EXACT = 1e-5


def close(actual, expected, tolerance=EXACT):
    expected = np.asarray(expected, np.float64)
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


def product(kernel):
    """U diag(s) V^T in float64, by hand."""
    u, s, v = (np.asarray(part, np.float64) for part in (kernel.u, kernel.s, kernel.v))
    if kernel.spatial:
        return np.einsum("...air,...r,...rbo->...abio", u, s, v)
    stack, rank = s.reshape(-1, s.shape[-1]), s.shape[-1]
    left, right = u.reshape(len(stack), -1, rank), v.reshape(len(stack), rank, -1)
    return np.einsum("bmr,br,brn->bmn", left, stack, right).reshape(kernel.shape)


@pytest.mark.parametrize("fill", ["zeros", "constant", "dead rows", "twice"])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_vectors_of_values_near_zero_are_orthonormal_too(shape, fill):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    half = shape[0] // 2
    if fill in ("zeros", "constant"):
        kernel[:] = fill == "constant"
    kernel[:half] = kernel[half:] if fill == "twice" else kernel[:half] * (fill != "dead rows")
    held = to_spectral({"kernel": jnp.asarray(kernel)})
    assert float(rmtjax.lowrank.orthogonality(held)) < 1e-9
    np.testing.assert_allclose(held["kernel"].multiply(), kernel, rtol=0, atol=1e-5)


CASES = {
    "matrix": ((20, 16), None, {}),
    "wide": ((16, 20), None, {}),
    "stack": ((3, 12, 10), STACK, {}),
    "convolution": ((3, 2, 5, 16), KernelAxes((0, 1, 2), (3,)), {}),
    "spatial": ((3, 2, 5, 16), KernelAxes((0, 1, 2), (3,)), {"spatial": True}),
    "spatial stack": ((2, 3, 2, 5, 8), KernelAxes((1, 2, 3), (4,), (0,)), {"spatial": True}),
    "heads": ((20, 4, 4), KernelAxes((0,), (1, 2)), {}),
}


def hold(name, **options):
    shape, axes, more = CASES[name]
    kernel = jnp.asarray(draw(*shape))
    axes = {"kernel": axes} if axes else None
    return kernel, to_spectral({"kernel": kernel}, axes=axes, **more, **options)["kernel"]


@pytest.mark.parametrize("name", CASES)
def test_at_full_rank_it_is_the_kernel_with_orthonormal_vectors(name):
    kernel, held = hold(name)
    assert held.shape == kernel.shape
    assert held.axes == (CASES[name][1] or KernelAxes((0,), (1,)))
    close(product(held), kernel)
    close(rmtjax.merge({"kernel": held})["kernel"], kernel)
    u = np.asarray(held.u, np.float64).reshape(*held.s.shape[:-1], -1, held.s.shape[-1])
    gram = np.swapaxes(u, -1, -2) @ u
    close(gram, np.broadcast_to(np.eye(u.shape[-1]), gram.shape))
    assert (np.diff(held.s, axis=-1) <= 0).all()
    again = to_spectral({"kernel": held})["kernel"]
    if not held.spatial:  # whose matrix is another one than that of its product
        close(product(again), kernel)


@pytest.mark.parametrize("name", ["matrix", "convolution", "heads"])
def test_at_a_lower_rank_it_is_the_nearest_matrix(name):
    kernel, held = hold(name, rank=4)
    axes = held.axes
    rows = int(np.prod([kernel.shape[a] for a in axes.inputs]))
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64).reshape(rows, -1), full_matrices=False)
    close(product(held).reshape(rows, -1), u[:, :4] * s[:4] @ vt[:4])
    pair = to_factors({"kernel": held})["kernel"]
    assert isinstance(pair, rmtjax.Factors)
    close(rmtjax.merge({"kernel": pair})["kernel"], product(held))
    # Each factor gets the root of each value.
    close(np.sum(np.square(pair.left), axis=tuple(range(pair.left.ndim - 1))), s[:4])


def test_negative_values_keep_their_sign_in_factors():
    _, held = hold("stack")
    held = SpectralFactors(held.u, held.s * jnp.where(jnp.arange(10) % 3 == 0, -1, 1)[None], held.v)
    pair = to_factors({"kernel": held})["kernel"]
    close(rmtjax.merge({"kernel": pair})["kernel"], product(held))


def test_what_is_no_matrix_in_order_stays():
    params = {
        "Dense_0": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)},
        "Einsum_0": {"kernel": jnp.ones((6, 4))},
        "table": {"kernel": jnp.ones((6, 4), jnp.int32)},
        "odd": {"kernel": jnp.ones((2, 3, 4))},
    }
    axes = {"Einsum_0/kernel": KernelAxes((1,), (0,))}
    held = to_spectral(params, axes=axes)
    assert isinstance(held["Dense_0"]["kernel"], SpectralFactors)
    for name in ("Einsum_0", "table", "odd"):
        assert held[name]["kernel"] is params[name]["kernel"]
    assert held["Dense_0"]["bias"] is params["Dense_0"]["bias"]


def test_bfloat16_stays():
    held = to_spectral({"kernel": jnp.asarray(draw(20, 16), jnp.bfloat16)})["kernel"]
    assert {part.dtype.name for part in jax.tree.leaves(held)} == {"bfloat16"}
    assert rmtjax.merge({"kernel": held})["kernel"].dtype == jnp.bfloat16


def test_a_value_of_zero_has_the_gradient_of_its_direction():
    _, held = hold("matrix")
    held = SpectralFactors(held.u, held.s.at[3].set(0.0), held.v)
    weight = jnp.asarray(draw(20, 16))
    loss = lambda held: jnp.sum(weight * rmtjax.merge({"kernel": held})["kernel"])
    slope = jax.grad(loss)(held).s
    u, v = np.asarray(held.u, np.float64), np.asarray(held.v, np.float64)
    close(slope, np.einsum("mr,mn,rn->r", u, np.asarray(weight, np.float64), v))


GEOMETRY = {"strides": (2, 1), "padding": ((1, 0), (0, 2)), "kernel_dilation": (1, 2)}


@pytest.mark.parametrize(
    "options", [{}, GEOMETRY, {"padding": "CIRCULAR"}], ids=["", "odd", "ring"]
)
@pytest.mark.parametrize("kind", [nn.Conv, nn.ConvTranspose])
def test_a_spatial_convolution_is_two_of_one_axis(kind, options):
    if kind is nn.ConvTranspose and "padding" in options:
        options = {"strides": (2, 1), "padding": "SAME" if options is GEOMETRY else "CIRCULAR"}
    module, inputs = kind(8, (3, 2), **options), jnp.asarray(draw(2, 6, 7, 5))
    params = {"kernel": jnp.asarray(draw(3, 2, 5, 8)), "bias": jnp.asarray(draw(8))}
    axes = {"kernel": KernelAxes((0, 1, 2), (3,))}
    held = to_spectral(params, spatial=True, axes=axes)
    run = jax.jit(lambda params: linen.apply(module, {"params": params}, inputs))
    close(run(held), module.apply({"params": params}, inputs))
    thin = to_spectral(params, spatial=True, rank=4, axes=axes)
    dense = {**params, "kernel": jnp.asarray(product(thin["kernel"]), jnp.float32)}
    close(run(thin), module.apply({"params": dense}, inputs))
    kernels = [eqn.invars[1].aval.shape for eqn in convolutions(jax.make_jaxpr(run)(thin).jaxpr)]
    assert [sorted(shape) for shape in kernels] == [sorted((3, 1, 5, 4)), sorted((1, 2, 4, 8))]


def convolutions(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from convolutions(inner.jaxpr)


class Cells(nn.Module):
    """Gates as separate layers, and all as one product."""

    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.LSTMCell(16))(x), nn.RNN(nn.OptimizedLSTMCell(16))(x)


@pytest.mark.slow  # compiles two cells three times
def test_gates_of_an_lstm_run_and_train():
    module, inputs = Cells(), jnp.asarray(draw(2, 5, 12))
    params = module.init(jax.random.key(0), inputs)["params"]
    held = to_spectral(params, rank=6)
    leaves = jax.tree.leaves(held, is_leaf=lambda leaf: isinstance(leaf, SpectralFactors))
    assert sum(isinstance(leaf, SpectralFactors) for leaf in leaves) == 16  # 2 cells of 8 kernels
    run = jax.jit(lambda params: linen.apply(module, {"params": params}, inputs))
    jax.tree.map(close, run(held), module.apply({"params": rmtjax.merge(held)}, inputs))
    loss = lambda params: sum(jnp.sum(out**2) for out in run(params))
    gradients = jax.grad(loss)(held)
    _, pull = jax.vjp(rmtjax.merge, held)
    (expected,) = pull(
        jax.grad(lambda p: sum(jnp.sum(o**2) for o in module.apply({"params": p}, inputs)))(
            rmtjax.merge(held)
        )
    )
    jax.tree.map(lambda a, b: close(a, b, 1e-4), gradients, expected)


@pytest.mark.slow  # compiles a cell twice
@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell])
def test_gates_of_nnx_run(cell):
    model = nnx.RNN(cell(12, 16, rngs=nnx.Rngs(0)))
    held = to_spectral(nnx_params(model), rank=6)
    thin, dense = (rmtjax.nnx.replace(model, tree) for tree in (held, rmtjax.merge(held)))
    run = nnx.jit(lambda model, inputs: model(inputs))
    inputs = jnp.asarray(draw(2, 5, 12))
    close(run(thin, inputs), run(dense, inputs))
    assert jax.tree.structure(nnx_params(thin)) == jax.tree.structure(held)


def test_any_rule_prunes_the_values():
    kernel = planted(num_spikes=3)
    held = to_spectral({"a": {"kernel": kernel}, "b": {"bias": jnp.ones(3)}})
    s = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
    share = np.cumsum(s**2) / np.sum(s**2)
    cases = {
        ranks.bema(): 3,
        ranks.fixed(10): 10,
        ranks.energy(0.9): int(np.sum(share < 0.9)) + 1,
    }
    u, _, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    for rule, rank in cases.items():
        pruned = prune_values(held, rule=rule)
        assert pruned.ranks == {"a/kernel": rank}
        assert pruned.reasons["a/kernel"] == f"{rank} of 64 are signal, rank {rank}"
        thin = pruned.params["a"]["kernel"]
        assert (thin.u.shape, thin.s.shape, thin.v.shape) == ((64, rank), (rank,), (rank, 96))
        close(product(thin), u[:, :rank] * s[:rank] @ vt[:rank])
        assert pruned.params["b"]["bias"] is held["b"]["bias"]


def test_the_largest_values_stay_in_any_order_and_sign():
    _, held = hold("stack")
    order = np.random.default_rng(0).permutation(10)
    signs = jnp.where(jnp.arange(10) % 2 == 0, -1, 1)[None]
    mixed = SpectralFactors(held.u[..., order], held.s[:, order] * signs, held.v[:, order])
    thin = prune_values({"kernel": mixed}, rule=ranks.fixed(4)).params["kernel"]
    assert thin.s.shape == (3, 4)
    close(np.abs(thin.s), held.s[:, :4])
    for member in range(3):
        kept = np.argsort(-np.abs(np.asarray(mixed.s[member])))[:4]
        u, s, v = (np.asarray(part[member], np.float64) for part in (mixed.u, mixed.s, mixed.v))
        close(product(thin)[member], u[:, kept] * s[kept] @ v[kept])


def test_exact_prunes_the_product_and_not_the_values_as_they_are():
    _, held = hold("matrix")
    skewed = SpectralFactors(held.u @ jnp.asarray(draw(16, 16)), jnp.ones(16), held.v)
    kernel = product(skewed)
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    thin = prune_values({"kernel": skewed}, rule=ranks.fixed(5), exact=True).params["kernel"]
    close(thin.s, s[:5])
    close(product(thin), u[:, :5] * s[:5] @ vt[:5])


def test_ranks_are_rounded_up_and_never_below_the_smallest():
    held = to_spectral({"kernel": planted()})
    rank = lambda **options: prune_values(held, rule=ranks.bema(), **options).ranks["kernel"]
    assert (rank(), rank(multiple=8), rank(min_rank=5), rank(min_rank=5, multiple=4)) == (
        3,
        8,
        5,
        8,
    )


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (np.random.default_rng(0).normal(size=(64, 96)), "no signal"),
        (np.random.default_rng(0).standard_t(1, size=(64, 96)), "does not accept"),
        (np.random.default_rng(0).normal(size=(30, 40)), "short side 30 under 50"),
    ],
)
def test_values_that_a_rule_cannot_judge_stay(kernel, words):
    held = to_spectral({"kernel": jnp.asarray(kernel, jnp.float32)})
    pruned = prune_values(held, rule=ranks.bema())
    assert words in pruned.reasons["kernel"]
    assert pruned.params["kernel"] is held["kernel"]


def test_values_that_are_not_finite_stay():
    held = to_spectral({"kernel": planted()})["kernel"]
    broken = SpectralFactors(held.u, held.s.at[0].set(jnp.nan), held.v)
    assert prune_values({"kernel": broken}).reasons == {"kernel": "kept: not finite"}


def test_values_that_were_cut_are_fitted_over_what_is_left():
    """Half of the values are enough for the noise level; a whole spectrum they are not."""
    kernel = planted(num_spikes=3)
    held = prune_values(to_spectral({"kernel": kernel}), rule=ranks.fixed(40)).params
    assert prune_values(held, rule=ranks.bema()).ranks == {"kernel": 3}


def test_plan_and_report_see_the_product_and_leave_it():
    held = to_spectral({"kernel": planted()}, rank=10)
    plan = rmtjax.plan(held, rule=ranks.fixed(4))
    assert plan["kernel"].action == "keep"
    assert plan["kernel"].reason == "kept: held as SpectralFactors (rank 8 of 10)"
    s = np.linalg.svd(np.asarray(planted(), np.float64), compute_uv=False)
    close(plan["kernel"].spectrum.eigenvalues[:10], s[:10] ** 2 / 96)
    assert plan["kernel"].cost.parameters == 10 * (64 + 96 + 1)
    assert "no noise level" in rmtjax.plan(held)["kernel"].reason
    assert rmtjax.factorize(held, plan)["kernel"] is held["kernel"]
    dense_plan = rmtjax.plan({"kernel": planted()}, rule=ranks.fixed(4))
    with pytest.raises(ValueError, match="is held as SpectralFactors"):
        rmtjax.factorize(held, dense_plan)


def test_nnx_gates_as_a_stack_need_factors():
    model = nnx.OptimizedLSTMCell(12, 16, rngs=nnx.Rngs(0))
    tree = nnx_params(model, gates="each")
    axes = {"dense_h/kernel": STACK}
    held = to_spectral(tree, where="*dense_h*", axes=axes)
    with pytest.raises(ValueError, match="has `SpectralFactors` for 'dense_h/kernel', and Linear"):
        rmtjax.nnx.replace(model, held)


def test_wrong_arguments_are_named():
    params = {"kernel": planted()}
    with pytest.raises(ValueError, match=r"^`rank` must be an integer of at least 1, got 0"):
        to_spectral(params, rank=0)
    with pytest.raises(ValueError, match=r"^`prune_values` needs a tree with `SpectralFactors`"):
        prune_values(params)
    with pytest.raises(TypeError, match=r"^`rule` must be a rank rule"):
        inspect.unwrap(prune_values)(to_spectral(params), rule="bema")
    with pytest.raises(ValueError, match=r"^`multiple` must be an integer of at least 1, got 0"):
        prune_values(to_spectral(params), multiple=0)
