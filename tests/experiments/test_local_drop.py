"""LocalDrop with learnt keep rates: its regularizer, its masks, its two stages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from experiments.neighbours import arms, local_drop, sizes, tracks, trainer
from experiments.neighbours.local_drop import Held

# As `test_neighbours.py`.
pytestmark = pytest.mark.slow

CUTS = {"first": 2, "second": 3}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def reference(rates, kernels):
    """Reg in float64."""
    norm = np.prod([np.linalg.norm(rate) / np.sqrt(rate.size) for rate in rates.values()])
    flat = {path: kernel.reshape(-1, kernel.shape[-1]) for path, kernel in kernels.items()}
    values = {path: np.linalg.svd(kernel, compute_uv=False) for path, kernel in flat.items()}
    return norm * sum(s[CUTS[path] :].sum() / s.size for path, s in values.items())


def test_the_regularizer_and_its_slopes_are_those_of_differences():
    rates = {"one": np.abs(draw(0, 7)) % 1, "two": np.abs(draw(1, 5)) % 1}
    kernels = {"first": draw(2, 7, 9), "second": draw(3, 2, 3, 5)}
    single = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
    reg = lambda rates, kernels: local_drop.regularizer(rates, kernels, CUTS)
    found, slopes = jax.value_and_grad(reg, argnums=(0, 1))(single(rates), single(kernels))
    assert found == pytest.approx(reference(rates, kernels), rel=1e-5)
    for tree, slope in zip((rates, kernels), slopes, strict=True):
        for name, leaf in tree.items():
            expected = np.zeros(leaf.size)
            for i in range(leaf.size):
                ends, middle = [], leaf.flat[i]
                for step in (1e-6, -1e-6):
                    leaf.flat[i] = middle + step
                    ends.append(reference(rates, kernels))
                leaf.flat[i] = middle
                expected[i] = (ends[0] - ends[1]) / 2e-6
            # The slopes are in float32, and of the order of 0.1.
            np.testing.assert_allclose(slope[name].ravel(), expected, atol=1e-5)


def test_a_mask_keeps_each_unit_with_its_rate():
    rate, shape = jnp.array([0.2, 0.6, 1.0]), (400, 9, 9, 3)
    for blocks in (False, True):
        found = np.asarray(
            local_drop.mask(jax.random.key(0), rate[None, None, None], shape, blocks)
        )
        assert set(np.unique(found)) == {0, 1}
        inside = found[:, 1:-1, 1:-1]
        # 19,600 positions; in blocks of nine they count as a ninth of it: 0.011 is a deviation.
        np.testing.assert_allclose(inside.mean((0, 1, 2)), rate, atol=0.04)
    # A block is at least two positions wide, also at a border.
    out = np.pad(found == 0, ((0, 0), (0, 0), (1, 1), (0, 0)))
    assert np.all(out[:, :, :-2] | out[:, :, 2:] | ~out[:, :, 1:-1])


def held_of(letter):
    """A track in short, its network with random biases, and random rates."""
    track = tracks.TRACKS[letter].short()
    setting = trainer.Setting(track, track.levels[-1], 0, arms.ALL[0].draw(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1, trainer.start(setting).params)
    rates = local_drop.initial_rates(setting, params)
    for i, (name, rate) in enumerate(rates.items()):
        np.testing.assert_allclose(rate, 0.8)  # the first trial has a dropout of 0.2
        rates[name] = jax.random.uniform(jax.random.key(i), rate.shape, minval=0.1)
    return track, Held(params, rates)


@pytest.mark.parametrize("letter", list("abc"))  # the tracks of this arm
def test_rates_that_are_folded_in_are_those_of_the_expected_masks(letter):
    track, held = held_of(letter)
    x, y = (jnp.asarray(part[:8]) for part in track.load().train)
    found = local_drop.loss(track.module, held, x, y, local_drop.expected)
    folded = local_drop.fold(held, local_drop.PLACES[letter])
    logits = rmtjax.linen.apply(track.module, {"params": folded}, x, False)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    whole = rmtjax.linen.apply(track.module, {"params": held.params}, x, False)
    assert np.abs(logits - whole).max() > 1e-3


def test_a_high_price_lowers_all_rates_and_none_follows_the_loss():
    track, held = held_of("a")
    batch = tuple(jnp.asarray(part[:50]) for part in track.load().train)
    rates = jax.tree.map(lambda rate: jnp.full_like(rate, 0.5), held.rates)
    held, state = held._replace(rates=rates), local_drop.OF_RATES.init(rates)
    cuts = {"Dense_1/kernel": jnp.asarray(4), "Dense_2/kernel": jnp.asarray(4)}
    step = lambda price, held: local_drop.step_of_rates(
        track.module, held, state, batch, cuts, price
    )[0]
    for rate in step(1e4, held).values():
        np.testing.assert_allclose(rate, 0.45, atol=1e-4)  # a first step of Adam has its full rate
    free = jnp.concatenate([*step(0.0, held).values()])
    assert (free > 0.54).any()
    assert (free < 0.46).any()
    ends = held._replace(rates=jax.tree.map(lambda rate: rate.at[0].set(0.11), rates))
    assert all(rate[0] == jnp.float32(local_drop.LEAST) for rate in step(1e4, ends).values())


def test_rates_are_learnt_unit_by_unit_within_their_range():
    track = tracks.TRACKS["a"].short()
    arm = next(arm for arm in arms.ALL if arm.name == "LocalDrop, rates")
    setting = trainer.Setting(track, track.levels[-1], 0, arm.draw(0))
    params = local_drop.learnt(setting).params
    for rate in params[local_drop.RATES].values():
        assert local_drop.LEAST <= rate.min() < rate.max() <= 1
        assert jnp.std(rate) > 0.01
    # They are no part of the network that comes out.
    thin = local_drop.local_drop_rates(setting).training.params
    assert {*sizes.leaves_by_path(thin)} == {*sizes.leaves_by_path(trainer.start(setting).params)}
