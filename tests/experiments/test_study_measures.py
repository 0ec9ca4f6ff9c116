"""The study's measures, images, sizes and statistics, and the training loop under it."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from experiments import training
from experiments.study import clean, runs, tasks
from experiments.study.statistics import paired_difference

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

TASK = tasks.Task("fashion_mnist", 50, 20, 0.4)


class FirstPixel(nn.Module):
    """Gives each image the class of its first pixel."""

    @nn.compact
    def __call__(self, images):
        return jax.nn.one_hot(images[:, 0, 0], 10)


def test_shares_of_labels_learnt_are_counted():
    # Five images: right by label and truth, wrong label learnt, wrong label resisted, ...
    predicted, given, true = [1, 2, 3, 4, 5], [1, 2, 0, 0, 5], [1, 9, 3, 9, 5]
    split = training.Split(
        jnp.zeros((5, 28, 28), jnp.uint8).at[:, 0, 0].set(jnp.array(predicted, jnp.uint8)),
        jnp.array(given),
    )
    images = tasks.Images(split, np.array(true), split, split)
    found = runs.fitted(FirstPixel(), {}, images)
    assert found == {"given": 60.0, "true": 60.0, "wrong": 33.33}
    assert runs.accuracies(FirstPixel(), {}, images) == {
        "test": 60.0,
        "validation": 60.0,
        "never": 1,
    }
    clean_labels = images._replace(true_labels=np.array(given))
    assert runs.fitted(FirstPixel(), {}, clean_labels)["wrong"] is None


def test_tasks_hold_out_clean_images_and_redraw_the_others():
    first, second = (tasks.load(TASK, seed, "sample") for seed in (0, 0))
    other = tasks.load(TASK, 1, "sample")
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.train.labels, second.train.labels)
    assert not np.array_equal(first.train.images, other.train.images)
    whole = tasks.dataset("fashion_mnist", "sample", None)
    key = lambda images, labels: {
        (bytes(image), int(label)) for image, label in zip(np.asarray(images), labels, strict=True)
    }
    truth = key(whole.train_images, whole.train_labels)
    train, held_out = key(first.train.images, first.true_labels), key(*first.validation)
    assert train | held_out <= truth
    assert not train & held_out
    assert not np.array_equal(first.train.labels, first.true_labels)
    with pytest.raises(ValueError, match="at most 2,000 together"):
        tasks.load(tasks.Task("fashion_mnist", 1990, 20, 0.0), 0, "sample")


def test_rivals_are_as_large_as_allowed_and_no_larger():
    size = 30_000
    module = training.MLP((96, 64))
    image = jnp.zeros((1, 28, 28), jnp.uint8)
    dense = lambda a, b: 784 * a + a + a * b + b + b * 10 + 10
    width = clean.narrower(module, image, size).widths[0]
    assert dense(width, width) <= size < dense(width + 1, width + 1)
    params = module.init(jax.random.key(0), image)["params"]
    ranks = clean.ranks_of_size(params, rmtjax.ranks.fixed, [*range(1, 97)], size)
    kept = sum(leaf.size for leaf in jax.tree.leaves(clean.factorized(params, ranks)))
    (rank,) = set(ranks.values())
    thin = lambda r: dense(96, 64) - 784 * 96 - 96 * 64 + r * (784 + 96) + min(r * 160, 96 * 64)
    assert kept == thin(rank) <= size < thin(rank + 1)


def test_bootstrap_interval_is_that_of_all_resamples():
    differences = [3.0, 1.0, 4.5, -1.2, 5.7]
    found = paired_difference(dict(enumerate(differences)), dict.fromkeys(range(7), 0.0))
    means = np.mean([*itertools.product(differences, repeat=5)], axis=1)
    assert (found.mean, found.seeds) == (pytest.approx(2.6), 5)
    # 9,999 of 3,125 equally likely resamples: the ends move by a few of their steps.
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.15)
    assert str(paired_difference({0: 1.0}, {0: 3.0})) == "-2.00"
    assert paired_difference({0: 1.0}, {1: 3.0}) is None


def test_dropout_acts_only_where_it_has_a_key_and_shares_the_start():
    images = jax.random.randint(jax.random.key(0), (8, 28, 28), 0, 256).astype(jnp.uint8)
    plain, dropped = training.MLP((64,)), training.MLP((64,), dropout=0.5)
    params, same = (m.init(jax.random.key(1), images)["params"] for m in (plain, dropped))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    labels = jnp.zeros(8, jnp.int32)
    loss = lambda module, key=None: training.losses(module, params, images, labels, key)[0]
    np.testing.assert_array_equal(loss(plain), loss(dropped))
    assert not np.allclose(loss(dropped), loss(dropped, jax.random.key(2)))


def test_single_steps_are_the_steps_of_the_scan():
    images = jax.random.randint(jax.random.key(0), (50, 28, 28), 0, 256).astype(jnp.uint8)
    split = training.Split(images, jnp.arange(50) % 10)
    module, optimizer = training.MLP((16,), dropout=0.5), optax.sgd(0.05, 0.9)
    ends = []
    for scan in (True, False):
        params = module.init(jax.random.key(1), images[:1])["params"]
        epoch = training.make_epoch(module, optimizer, scan=scan)
        batches = training.batches(jax.random.key(2), 50, 20)
        ends.append(epoch(params, optimizer.init(params), split, *batches, jax.random.key(3)))
    # Two compilations of the same sums: rounding, over three steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)
