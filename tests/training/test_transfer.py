"""The state of an optimizer after `transfer`, against the chain rule in NumPy and simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from experiments import mid_training
from rmtjax import Factors, transfer_opt_state

# Kernels whose paths end alike, and one that stays; and the factors of the others.
DENSE = {"kernel": (12, 9), "a": {"kernel": (10, 8), "bias": (8,)}, "b": {"kernel": (9, 3)}}
FACTORS = DENSE | {
    "kernel": Factors((12, 2), (2, 9)),
    "a": {"kernel": Factors((10, 2), (2, 8)), "bias": (8,)},
}
# A stack, a projection to the heads of an attention, and a convolution.
MORE = {"bir,bro->bio": (3, 8, 10), "ir,rhd->ihd": (12, 4, 5), "hwir,ro->hwio": (3, 3, 2, 11)}
MORE_FACTORS = {
    "bir,bro->bio": Factors((3, 8, 2), (3, 2, 10)),
    "ir,rhd->ihd": Factors((12, 2), (2, 4, 5)),
    "hwir,ro->hwio": Factors((3, 3, 2, 2), (2, 11)),
}


def random_tree(shapes, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple) and not isinstance(node, Factors)
    make = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
    return jax.tree.map(make, shapes, is_leaf=is_shape)


def assert_close(actual, expected, **tolerance):
    wide = lambda leaf: np.asarray(leaf, np.float64)
    close = lambda a, b: np.testing.assert_allclose(wide(a), wide(b), **tolerance)
    jax.tree.map(close, actual, expected)


PARAMS, THIN = random_tree(DENSE), random_tree(FACTORS)


def chain_rule(path, grad, leaf):
    """The gradient of the factors from that of the kernel, in float64."""
    if not isinstance(leaf, Factors):
        return np.asarray(grad, np.float64)
    left, right = (np.asarray(factor, np.float64) for factor in leaf)
    product = path[0].key if "->" in path[0].key else "ir,ro->io"
    a, b, c = product.replace("->", ",").split(",")
    return Factors(np.einsum(f"{c},{b}->{a}", grad, right), np.einsum(f"{a},{c}->{b}", left, grad))


@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_momentum_is_what_the_factors_would_have_gathered(dtype, rounding):
    params, *grads = (random_tree(DENSE | MORE, seed, dtype) for seed in (0, 1, 2))
    thin = random_tree(FACTORS | MORE_FACTORS, 3, dtype)
    momentum = lambda first, second: (0.9 * first + second).astype(first.dtype)
    got = transfer_opt_state(optax.TraceState(jax.tree.map(momentum, *grads)), params, thin).trace
    gathered = (jax.tree_util.tree_map_with_path(chain_rule, grad, thin) for grad in grads)
    # The dtype's rounding of sums of at most 20 terms of order 1.
    assert_close(got, jax.tree.map(momentum, *gathered), rtol=rounding, atol=5 * rounding)


@pytest.mark.parametrize("name", MORE)
def test_mean_squares_of_more_axes_are_those_of_the_matrices(name):
    params, mu, nu = (random_tree({name: MORE[name]}, seed) for seed in range(3))
    thin, nu = random_tree({name: MORE_FACTORS[name]}, 3), jax.tree.map(jnp.square, nu)
    got = transfer_opt_state(optax.ScaleByAdamState(jnp.int32(9), mu, nu), params, thin).nu[name]
    left, right = thin[name]
    many = left.shape[0] if name.startswith("b") else 1
    shape = (many, left.size // many // 2, right.size // many // 2)
    matrices = [left.reshape(many, -1, 2), right.reshape(many, 2, -1)]
    matrices += [tree[name].reshape(shape) for tree in (params, mu, nu)]
    for i, (left, right, *trees) in enumerate(zip(*matrices, strict=True)):
        dense, mean, square = ({"kernel": tree} for tree in trees)
        state = optax.ScaleByAdamState(jnp.int32(9), mean, square)
        one = transfer_opt_state(state, dense, {"kernel": Factors(left, right)}).nu["kernel"]
        for part, whole in zip(one, got, strict=True):
            # Sums of at most 20 squares in another order.
            np.testing.assert_allclose(whole.reshape(many, *part.shape)[i], part, rtol=1e-5)


def simulate(grads, rank=3):
    """A kernel with such gradients, its factors, and the mean squares of those of all."""
    left, _, right = np.linalg.svd(grads[0], full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    means = [np.mean(a**2, axis=0) for a in (grads, grads @ right.T, left.T @ grads)]
    kernel, *factors = (jnp.asarray(a, jnp.float32) for a in (grads[0], left, right))
    return {"kernel": kernel}, {"kernel": Factors(*factors)}, {"kernel": means[0]}, means[1:]


def test_mean_squares_are_exact_for_independent_entries():
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.1, 3.0, (30, 40))
    params, thin, nu, expected = simulate(scales * rng.normal(size=(2000, 30, 40)))
    got = transfer_opt_state(optax.ScaleByRmsState(jax.tree.map(jnp.float32, nu)), params, thin)
    # A mean of 2,000 squares of normal numbers has a standard error of 3.2 %: five of them.
    assert_close(tuple(got.nu["kernel"]), tuple(expected), rtol=0.16)


def test_mean_squares_follow_the_correlation_that_the_momentum_shows():
    rng = np.random.default_rng(0)
    # As in training: outputs that are correlated, and a kernel made of such gradients.
    mix = np.eye(40) + rng.normal(size=(40, 3)) @ rng.normal(size=(3, 40)) / 3
    grads = rng.normal(size=(300, 200, 40)) @ mix
    params, thin, nu, (expected, _) = simulate(grads)
    mu = {"kernel": jnp.asarray(np.tensordot(0.1 * 0.9 ** np.arange(299), grads[1:], 1))}
    nu = jax.tree.map(jnp.float32, nu)
    informed = transfer_opt_state(optax.ScaleByAdamState(jnp.int32(9), mu, nu), params, thin).nu
    blind = transfer_opt_state(optax.ScaleByRmsState(nu), params, thin).nu
    # The squares of 200 rows give each direction to 10 %: three of them, and simulation's 8 %.
    np.testing.assert_allclose(np.median(informed["kernel"].left / expected, 0), 1, atol=0.3)
    assert (np.median(blind["kernel"].left / expected, 0) < 0.5).all()


def test_the_loss_goes_on_where_it_was():
    rng = np.random.default_rng(0)
    inputs, low, high = (rng.normal(size=shape) for shape in [(100, 12), (12, 2), (2, 9)])
    inputs, target = jnp.asarray(inputs, jnp.float32), jnp.asarray(inputs @ low @ high, jnp.float32)
    loss = jax.jit(lambda tree: jnp.mean((inputs @ rmtjax.merge(tree)["kernel"] - target) ** 2))
    optimizer = optax.sgd(0.1, momentum=0.9)
    params = {"kernel": jnp.asarray(0.1 * rng.normal(size=(12, 9)), jnp.float32)}
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
    thin = {"kernel": rmtjax.factorize_matrix(params["kernel"], 2)}
    truncated = loss({"kernel": rmtjax.truncate_matrix(params["kernel"], 2)})
    np.testing.assert_allclose(loss(thin), truncated, rtol=1e-5)  # float32
    updates, state = optimizer.update(jax.grad(loss)(thin), transfer_opt_state(state, params, thin))
    assert loss(optax.apply_updates(thin, updates)) < 0.95 * truncated


LESS = lambda tree: {name: leaf for name, leaf in tree.items() if name != "b"}
OTHER = lambda *shape: PARAMS | {"kernel": jnp.ones(shape)}
STATE = optax.TraceState(PARAMS)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("`params` has 'b/kernel', which is not in `factorized`", (STATE, PARAMS, LESS(THIN))),
        ("`factorized` has 'b/kernel', which is not in `params`", (STATE, LESS(PARAMS), THIN)),
        ("`factorized` has 'kernel' of shape .* in `params`", (STATE, OTHER(12, 8), THIN)),
        ("`factorized` has 'kernel' of shape .* in `params`", (STATE, OTHER(9, 12), THIN)),
        ("has 'trace' of 'kernel'", (optax.TraceState(OTHER(12, 8)), PARAMS, THIN)),
        ("has '' of 'a/kernel'", (PARAMS, PARAMS, THIN)),
        ("tree with names", (STATE, PARAMS["kernel"], THIN["kernel"])),
    ],
)
def test_trees_that_do_not_belong_together_are_errors(words, arguments):
    with pytest.raises(ValueError, match=words):
        transfer_opt_state(*arguments)


def test_wrong_options_are_errors():
    with pytest.raises(ValueError, match='`moments` must be "project" or "reset", got \'none\''):
        transfer_opt_state(STATE, PARAMS, THIN, moments="none")
    with pytest.raises(ValueError, match="needs `optimizer`"):
        transfer_opt_state(STATE, PARAMS, THIN, moments="reset")
    with pytest.raises(ValueError, match="`optimizer` does not start with a state like"):
        transfer_opt_state(STATE, PARAMS, THIN, moments="reset", optimizer=optax.adam(0.1))


@pytest.mark.slow
def test_the_experiment_prints_a_row_for_each_way(capsys):
    short = "--source sample --dataset fashion_mnist --widths 64 --epochs 1 --steps 2 --seeds 0"
    mid_training.main([*short.split(), "--slower", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "±" in line]
    for name in ("SGD", "Adam"):
        ways = {
            row[4]: [cell for cell in row if "." in cell][::2] for row in rows if row[0] == name
        }
        assert ways.keys() == {"dense", "project", "reset", "all"}
        assert len({before for before, *_ in ways.values()}) == 1
        before, at_switch, *_ = ways.pop("dense")
        assert before == at_switch
        assert len({at_switch for _, at_switch, *_ in ways.values()}) == 1
