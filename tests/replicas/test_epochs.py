"""Epochs of replicas and of a chain: models of many kinds learn, wrong labels are not learnt."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers.architectures import CNN, MLP, positions, VOCABULARY, WIDTH
from helpers.nnx_checks import update as update_nnx
from helpers.slow import slow_except

import rmtjax

SIZE, CLASSES, BATCH = 96, 10, 8


class Transformer(nn.Module):
    """A block of attention between an embedding and the mean over positions."""

    @nn.compact
    def __call__(self, tokens, train: bool):
        del train
        x = nn.Embed(VOCABULARY, WIDTH)(tokens) + positions()
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(x.mean(-2))


class GRU(nn.Module):
    """A recurrent cell that reads the rows of pictures."""

    @nn.compact
    def __call__(self, x, train: bool):
        del train
        return nn.Dense(CLASSES)(nn.RNN(nn.GRUCell(WIDTH))(x[..., 0])[:, -1])


RNG = np.random.default_rng(0)
LABELS = jnp.asarray(RNG.integers(0, CLASSES, SIZE))


def pictures(*shape):
    """One picture for each class, and noise."""
    means = RNG.normal(size=(CLASSES, *shape))
    return jnp.asarray(means[LABELS] + 0.5 * RNG.normal(size=(SIZE, *shape)), jnp.float32)


# Each class has words of its own, and there are others.
WORDS = np.where(
    RNG.random((SIZE, positions().shape[1])) < 0.5,
    9 * np.asarray(LABELS)[:, None] + RNG.integers(0, 9, (SIZE, 1)),
    RNG.integers(0, VOCABULARY, (SIZE, positions().shape[1])),
)
PICTURES = pictures(8, 8, 1)
MODELS = {
    "MLP": (MLP(), PICTURES.reshape(SIZE, -1)),
    "CNN": (CNN(), PICTURES),
    "Transformer": (Transformer(), jnp.asarray(WORDS, jnp.int32)),
    "GRU": (GRU(), PICTURES),
}
OPTIMIZERS = {"AdamW": optax.adamw(2e-3), "SGD": optax.sgd(0.05, 0.5)}
CASES = [(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS]
EACH = pytest.mark.parametrize("case", slow_except([("MLP", "AdamW")], CASES))


def mean_loss(apply, params, inputs, labels):
    logits = apply({"params": params}, inputs, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_epoch(state, inputs, labels):
    """An epoch of a `TrainState` over the samples in order."""

    def step(state, batch):
        gradients = jax.grad(partial(mean_loss, state.apply_fn))(state.params, *batch)
        return state.apply_gradients(grads=gradients), None

    batched = lambda leaf: leaf.reshape(-1, BATCH, *leaf.shape[1:])
    return jax.lax.scan(step, state, (batched(inputs), batched(labels)))[0]


def begin(case, wrap=lambda inner: inner):
    name, optimizer = case
    module, inputs = MODELS[name]
    params = module.init(jax.random.key(0), inputs[:1], train=True)["params"]
    inner = wrap(OPTIMIZERS[optimizer])
    return TrainState.create(apply_fn=module.apply, params=params, tx=inner), inputs


def assert_learnt(state, params, inputs):
    """Half of what can be learnt, after few epochs of which a part was merged away."""
    loss = jax.jit(partial(mean_loss, state.apply_fn))
    before, after = loss(state.params, inputs, LABELS), loss(params, inputs, LABELS)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    assert after < 0.7 * before


@EACH
def test_a_chain_learns(case):
    steps = SIZE // BATCH
    first, inputs = begin(case, lambda inner: optax.chain(inner, rmtjax.agree(steps)))
    # Its functions have caches of their own, and the step of a new state is a Python number.
    state, epoch = first.replace(step=jnp.zeros((), jnp.int32)), jax.jit(partial(train_epoch))
    for seed in range(24):
        order = jax.random.permutation(jax.random.key(seed), SIZE)
        state = epoch(state, inputs[order], LABELS[order])
    assert_learnt(first, state.params, inputs)
    kept = [v for name, v in rmtjax.metrics(state.opt_state).items() if name.startswith("kept")]
    assert kept
    assert all(0 <= share < 1.5 for share in kept)
    assert epoch._cache_size() == 1


@EACH
def test_replicas_of_a_train_state_learn(case):
    first, inputs = begin(case)
    params, replicas = first.params, rmtjax.replicate(first, 2)
    epoch, merge = jax.jit(jax.vmap(partial(train_epoch))), jax.jit(rmtjax.merge_replicas)
    for seed in range(16):
        parts = rmtjax.deal(jax.random.key(seed), SIZE, 2)
        replicas = replicas.replace(params=rmtjax.replicate(params, 2))
        replicas = epoch(replicas, inputs[parts], LABELS[parts])
        params = merge(params, replicas.params).params
    assert_learnt(first, params, inputs)
    assert replicas.step.tolist() == [16 * SIZE // BATCH // 2] * 2
    assert epoch._cache_size() == 1
    # The state of the optimizer stays apart.
    moments = jax.tree.leaves(replicas.opt_state)
    assert any(bool((leaf[0] != leaf[1]).any()) for leaf in moments if leaf.ndim > 1)


class Net(nnx.Module):
    """Dense layers with dropout between them."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.hidden(x))))


@pytest.mark.slow
def test_replicas_of_nnx_learn_and_drop_other_units():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(5e-3), wrt=nnx.Param)
    graphdef, params, rest = nnx.split((model, optimizer), nnx.Param, ...)
    inputs = PICTURES.reshape(SIZE, -1)

    def loss_of(model, inputs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels).mean()

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, 0))
    def epoch(params, rest, part):
        model, optimizer = nnx.merge(graphdef, params, rest)
        for index in part.reshape(-1, BATCH):
            gradients = nnx.grad(loss_of)(model, inputs[index], LABELS[index])
            update_nnx(optimizer, model, gradients)
        return nnx.split((model, optimizer), nnx.Param, ...)[1:]

    merge = jax.jit(rmtjax.merge_replicas)
    before, rest = params, rmtjax.replicate(rest, 2)
    for seed in range(12):
        replicas, rest = epoch(params, rest, rmtjax.deal(jax.random.key(seed), SIZE, 2))
        params = merge(params, replicas).params
    keys = [
        leaf for leaf in jax.tree.leaves(rest) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    assert keys
    assert all(bool((key[0] != key[1]).all()) for key in keys)
    values = []
    for trained in (before, params):
        model, _ = nnx.merge(graphdef, trained, jax.tree.map(lambda leaf: leaf[0], rest))
        values.append(float(loss_of(nnx.view(model, deterministic=True), inputs, LABELS)))
    assert values[1] < 0.7 * values[0]


def wrong_labels():
    """Samples about the means of classes, 40 % of them with a label drawn anew; a test set."""
    rng = np.random.default_rng(0)
    means = 0.5 * rng.normal(size=(8, 48))
    labels, fresh = rng.integers(0, 8, 1024), rng.integers(0, 8, 2000)
    draw = lambda labels: means[labels] + rng.normal(size=(len(labels), 48))
    given = np.where(rng.random(1024) < 0.4, rng.integers(0, 8, 1024), labels)
    arrays = (draw(labels), given, draw(fresh), fresh, given != labels)
    return [jnp.asarray(a.astype("f4") if a.ndim > 1 else a) for a in arrays]


def trained_on_wrong_labels(rest):
    """Accuracy on the test set, and the share of the wrong labels that were learnt."""
    inputs, labels, fresh, true, wrong = wrong_labels()
    module = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(8)])
    apply = lambda variables, x, train: module.apply(variables, x)
    optimizer = optax.chain(optax.sgd(0.1), rmtjax.agree(len(inputs) // BATCH, rest=rest))
    params = module.init(jax.random.key(0), inputs[:1])["params"]
    state = TrainState.create(apply_fn=apply, params=params, tx=optimizer)
    epoch = jax.jit(train_epoch)
    for seed in range(20):
        order = jax.random.permutation(jax.random.key(seed), len(inputs))
        state = epoch(state, inputs[order], labels[order])
    right = lambda x, y: jnp.argmax(module.apply({"params": state.params}, x), -1) == y
    learnt = jnp.sum(right(inputs, labels) & wrong) / jnp.sum(wrong)
    return float(right(fresh, true).mean()), float(learnt)


@pytest.mark.slow
def test_what_halves_agree_on_has_few_wrong_labels_in_it():
    accuracy, learnt = trained_on_wrong_labels(rest=0.0)
    # With all of the rest kept, the transform is plain training.
    plain, all_learnt = trained_on_wrong_labels(rest=1.0)
    assert all_learnt > 0.8
    assert learnt < 0.3
    assert accuracy > plain + 0.05
