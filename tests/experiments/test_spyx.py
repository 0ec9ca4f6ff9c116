"""The spiking network of the bench against the same one of `spyx`, which is pruned and run thin."""

import importlib
import itertools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rmtjax
from experiments.neighbours import networks

# As `test_neighbours.py`.
pytestmark = pytest.mark.slow

SIZES = 40, 64, 64, 64, 10
STEPS, LEAK = 3, 0.9
LAYERS = len(SIZES) - 1
# A layer of spyx tells the next one of a spike a step later, so its outputs come later too.
DELAY = LAYERS - 1


@pytest.fixture(scope="module")
def spyx():
    spec = importlib.util.find_spec("spyx")
    if spec is None:
        pytest.skip("Needs `pip install --no-deps spyx`.")
    # The package itself imports readers of data sets, with packages that its layers do not need.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "spyx", importlib.util.module_from_spec(spec))
        return SimpleNamespace(
            nn=importlib.import_module("spyx.nn"), axn=importlib.import_module("spyx.axn")
        )


@pytest.fixture(scope="module")
def params():
    """Parameters of the network of the bench, whose biases are 0."""
    module = networks.Spiking(width=SIZES[1], steps=STEPS)
    return module.init(jax.random.key(0), inputs(), False)["params"]


def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(0, 2, (32, SIZES[0])), jnp.float32)


def build(spyx, params):
    spike, layers = spyx.axn.superspike(networks.SLOPE), []
    for i, (rows, columns) in enumerate(itertools.pairwise(SIZES)):
        linear = nnx.Linear(rows, columns, rngs=nnx.Rngs(0))
        linear.kernel[...] = params[f"Dense_{i}"]["kernel"]
        hidden = i < LAYERS - 1
        options = {"activation": spike} if hidden else {}
        neurons = spyx.nn.LIF if hidden else spyx.nn.LI
        layers += [linear, neurons((columns,), beta=LEAK, rngs=nnx.Rngs(0), **options)]
    return spyx.nn.Sequential(*layers)


def logits(spyx, model, x):
    outputs, _ = spyx.nn.run(model, jnp.broadcast_to(x[None], (STEPS + DELAY, *x.shape)))
    return outputs[DELAY:].mean(0)


def loss(logits):
    labels = jnp.arange(len(logits)) % SIZES[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_a_spike_is_the_superspike_of_spyx(spyx):
    potentials = jnp.linspace(-2, 2, 401)
    theirs, ours = spyx.axn.superspike(networks.SLOPE), networks.spike
    np.testing.assert_array_equal(ours(potentials), theirs(potentials))
    slopes = [jax.vmap(jax.grad(f))(potentials) for f in (ours, theirs)]
    np.testing.assert_allclose(*slopes, rtol=1e-6)


def test_a_spiking_network_has_the_logits_and_the_gradient_of_one_of_spyx(spyx, params):
    module, model, x = networks.Spiking(width=SIZES[1], steps=STEPS), build(spyx, params), inputs()
    ours = lambda params: module.apply({"params": params}, x, False)
    # Sums of 64 products in float32; what differs is their order.
    np.testing.assert_allclose(ours(params), logits(spyx, model, x), atol=1e-5)
    expected = nnx.grad(lambda model: loss(logits(spyx, model, x)))(model)
    found = jax.grad(lambda params: loss(ours(params)))(params)
    for i in range(LAYERS):
        kernel = np.asarray(expected.layers[2 * i].kernel[...])
        assert np.abs(kernel).max() > 1e-5
        scale = 1e-4 * np.abs(kernel).max()
        np.testing.assert_allclose(found[f"Dense_{i}"]["kernel"], kernel, atol=scale)


def test_a_network_of_spyx_is_analyzed_pruned_and_run_thin(spyx, params):
    model, x = build(spyx, params), inputs()
    paths = [f"layers/{2 * i}/kernel" for i in range(LAYERS)]
    assert [row.path for row in rmtjax.nnx.analyze(model).rows] == paths
    plan = rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(8))
    assert list(plan.changes) == paths[1:-1]  # the others have a side under 50
    thin = rmtjax.nnx.factorize(model, plan)
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count(model) - count(thin) == 2 * (64 * 64 - 8 * 128)
    found, cut, whole = (
        np.asarray(logits(spyx, m, x)) for m in (thin, rmtjax.nnx.truncate(model, plan), model)
    )
    assert np.abs(cut - whole).max() > 0.01
    # A rounding may move a potential over the threshold, in few samples.
    assert np.quantile(np.abs(found - cut).max(axis=1), 0.9) < 1e-5
