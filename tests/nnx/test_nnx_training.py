"""Training with `nnx.Optimizer`: pruned in the chain, made thin, and trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.draws import normal
from helpers.linen_checks import Fixed
from helpers.nnx_checks import update
from helpers.slow import slow_except

import rmtjax
from rmtjax import nnx as rmt_nnx

X = normal(0, 256, 60)
Y = normal(0, 256, 60)[:, :3] @ normal(1, 3, 5)
RULE = Fixed(8)


class Net(nnx.Module):
    """Two layers that can be pruned, in a list, and a head that is too narrow."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.Sequential(
            *(nnx.Linear(*size, rngs=rngs) for size in ((60, 64), (64, 56)))
        )
        self.norm = nnx.BatchNorm(56, rngs=rngs)
        self.head = nnx.Linear(56, 5, rngs=rngs)

    def __call__(self, x):
        for layer in self.hidden.layers:
            x = jnp.tanh(layer(x))
        return self.head(self.norm(x))


PATHS = ("hidden/layers/0/kernel", "hidden/layers/1/kernel")


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def step(model, optimizer):
    value, grads = nnx.value_and_grad(loss)(model, X, Y)
    update(optimizer, model, grads)
    return value


def train(model, optimizer, num_steps, run=None):
    run = run or nnx.jit(step)
    return [float(run(model, optimizer)) for _ in range(num_steps)]


def rank(kernel):
    return int(np.linalg.matrix_rank(np.asarray(kernel[...]), tol=1e-4))


def make(transform, seed=0):
    model = Net(seed)
    return model, nnx.Optimizer(model, transform, wrt=nnx.Param)


def prune(**options):
    axes = rmt_nnx.kernel_axes(Net())
    return rmtjax.prune_spectrum(2, rule=RULE, axes=axes, **options)


@pytest.mark.parametrize("how", slow_except(("jit",), ("eager", "jit")))
def test_the_transform_prunes_under_the_optimizer(how):
    model, optimizer = make(optax.chain(optax.sgd(0.05), prune()))
    train(model, optimizer, 1, None if how == "jit" else step)
    assert [rank(layer.kernel) for layer in model.hidden.layers] == [60, 56]
    before = [layer.kernel[...] for layer in model.hidden.layers]
    train(model, optimizer, 1, None if how == "jit" else step)
    assert [rank(layer.kernel) for layer in model.hidden.layers] == [8, 8]
    assert rank(model.head.kernel) == 5
    ranks = optax.tree.get(optimizer.opt_state, "ranks")
    assert {path: int(ranks[path][...]) for path in ranks} == dict.fromkeys(PATHS, 8)
    assert before[0].shape == model.hidden.layers[0].kernel.shape


@pytest.mark.slow
def test_both_ways_give_what_the_transform_gives_on_the_tree():
    model, optimizer = make(optax.chain(optax.sgd(0.05), prune()))
    params, transform = rmt_nnx.params(model), optax.chain(optax.sgd(0.05), prune())
    state = transform.init(params)
    for _ in range(2):
        of_tree = lambda params, model=model: loss(rmt_nnx.replace(model, params), X, Y)
        updates, state = transform.update(jax.grad(of_tree)(params), state, params)
        params = optax.apply_updates(params, updates)
    train(model, optimizer, 2)
    for one, other in zip(
        jax.tree.leaves(rmt_nnx.params(model)), jax.tree.leaves(params), strict=True
    ):
        # Two steps and a decomposition in float32.
        np.testing.assert_allclose(one, other, atol=2e-5)


def only_first(tree):
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: "layers/0/kernel" in name(path), tree)


WRAPPED = {
    "masked": lambda: optax.chain(optax.sgd(0.05), optax.masked(prune(), only_first)),
    "partition": lambda: optax.partition(
        {True: optax.chain(optax.sgd(0.05), prune()), False: optax.sgd(0.05)}, only_first
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.chain(optax.sgd(0.05), prune(where=lambda path, _: path == PATHS[0])), 2
    ),
}


@pytest.mark.parametrize("name", slow_except(("masked",), WRAPPED))
def test_it_prunes_inside_what_optax_wraps_around_it(name):
    transform = WRAPPED[name]()
    if name == "MultiSteps":
        transform = transform.gradient_transformation()
    model, optimizer = make(transform)
    train(model, optimizer, 4 if name == "MultiSteps" else 2)
    assert [rank(layer.kernel) for layer in model.hidden.layers] == [8, 56]


@pytest.mark.slow
def test_noise_levels_go_from_the_optimizer_to_the_plan():
    rule = rmtjax.ranks.bema(level=0.1)  # kernels of 20 steps have few clear spikes
    axes = rmt_nnx.kernel_axes(Net())
    prune = rmtjax.prune_spectrum(20, axes=axes, rule=rule, max_removed=1.0)
    model, optimizer = make(optax.chain(optax.adam(3e-2), prune))
    train(model, optimizer, 20)
    fits = rmtjax.noise_levels(optimizer.opt_state)
    assert fits.keys() == set(PATHS)
    plan = rmt_nnx.plan(model, fits=fits, multiple=1)
    ranks = optax.tree.get(optimizer.opt_state, "ranks")
    for path in PATHS:
        threshold = np.asarray(fits[path].threshold[...])
        np.testing.assert_array_equal(plan[path].fit.threshold, threshold)
        assert 1 <= plan[path].rank == int(ranks[path][...]) < 56
    thin = rmt_nnx.factorize(model, plan)
    for one in (model, thin):
        one.eval()
    np.testing.assert_allclose(thin(X), rmt_nnx.truncate(model, plan)(X), atol=1e-4)
    spikes = {row.path: row.spikes for row in rmt_nnx.analyze(thin, fits=fits).rows}
    assert [spikes[path] for path in PATHS] == [plan[path].rank for path in PATHS]


def test_a_thin_model_trains_on_in_its_factors():
    model, optimizer = make(optax.adam(1e-2))
    losses = train(model, optimizer, 20)
    thin = rmt_nnx.factorize(model, rmt_nnx.plan(model, rule=RULE))
    assert thin.hidden.layers[0].left_factor.kernel.shape == (60, 8)
    optimizer = nnx.Optimizer(thin, optax.adam(1e-2), wrt=nnx.Param)
    before = jax.tree.map(jnp.array, rmt_nnx.params(thin))
    losses = train(thin, optimizer, 40)
    assert losses[-1] < losses[0] / 2
    moved = jax.tree.map(
        lambda one, other: bool((one != other).any()), before, rmt_nnx.params(thin)
    )
    assert all(jax.tree.leaves(moved))
    # A model that was trained in its factors can be cut again.
    again = rmt_nnx.plan(thin, rule=rmtjax.ranks.fixed(4), multiple=1)
    thinner = rmt_nnx.factorize(thin, again)
    assert thinner.hidden.layers[0].right_factor.kernel.shape == (4, 64)
    assert {
        path: row.action for path, row in again.items() if row.action != "keep"
    } == dict.fromkeys(PATHS, "factorize")
    # The transform leaves factors alone: each is half of a kernel.
    transform = rmtjax.prune_spectrum(1, axes=rmt_nnx.kernel_axes(thin), min_size=2)
    state = transform.init(nnx.state(thin, nnx.Param))
    assert state.fits.keys() == {"head/kernel"}
