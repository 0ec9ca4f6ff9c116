"""The bench of neighbours: counts of the papers, layers against references, every arm in short."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from experiments.neighbours import (
    __main__ as command,
    allocation,
    arms,
    block_term,
    claims,
    grouped,
    mnist1d,
    networks,
    runs,
    sizes,
    sweep,
    tensors,
    tracks,
    trainer,
)

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "neighbours.md"
FIRST = [0.04023, 0.299869, 0.466616, 0.159717]
LABELS = [7, 1, 1, 6, 4, 9, 4, 6, 0, 5]
# All arms on a track, and on others those that treat a recurrent cell or a convolution alike.
ARMS = [("a", arm.name) for arm in arms.on_track("a")]
ARMS += [("b", name) for name in ("tensorized, joint", "tensorized, per gate", "SET", "SER")]
LOW_RANK = "RMT, guarded", "SVD training", "dynamical low rank"
ARMS += [(letter, name) for letter in "bc" for name in LOW_RANK]
ARMS += [("c", name) for name in ("operator (MPO)", "state (MPS)", "block terms", "ADMM, bits")]
ARMS += [("c", "LocalDrop, rates")]  # which drops blocks of a convolution
ARMS += [("d", name) for name in ("SER", "2:4, SER", "8:16")]
ARMS += [("e", name) for name in ("edge budget", "2:4", "2:4, order as given")]
SIZED = {letter: track for letter, track in tracks.TRACKS.items() if not track.of_kernels}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# What the papers count.


def test_the_block_term_layer_of_ucf11_has_the_published_numbers():
    count, whole = claims.block_term_counts()
    assert count == 3392
    assert whole == 57_600 * 4 * 256
    assert whole // count == 17_388


@pytest.mark.parametrize(("bond", "weights"), [(2, 2752), (4, 5504), (8, 11_008)])
def test_the_tensorized_lstm_has_the_published_weights(bond, weights):
    assert claims.tensorized_counts(bond) == (weights, 290_816)
    # An operator for each gate costs exactly twice as much.
    assert claims.tensorized_counts(bond, joint=False) == (2 * weights, 290_816)


def test_a_binary_kernel_with_scales_is_31_times_smaller():
    assert claims.low_bit_ratio() == 32 / (1 + 32 / 1024)
    assert int(claims.low_bit_ratio()) == 31


def test_a_state_needs_less_than_an_operator():
    expected = {"SVD": 16_384, "MPS as counted": 8448, "MPS": 6272, "MPO": 18_432}
    assert claims.train_counts() == expected


# Data and layers.


def test_mnist1d_is_that_of_its_authors():
    x, y = mnist1d.generate(50)
    # By mnist1d 0.0.2.post1: make_dataset with num_samples=50.
    np.testing.assert_allclose(x[0, :4], FIRST, atol=1e-6)
    assert y[:10].tolist() == LABELS


def test_a_block_term_is_the_sum_of_its_terms():
    kernel = block_term.random_block_term(jax.random.key(0), ((3, 2), (4, 5)), rank=2, blocks=3)
    core, (a, b) = (
        np.asarray(kernel.core, np.float64),
        (np.asarray(side, np.float64) for side in kernel.sides),
    )
    expected = np.zeros((3, 4, 2, 5))
    for c, p, q in np.ndindex(core.shape):
        expected += core[c, p, q] * np.einsum("ij,kl->ikjl", a[c, :, :, p], b[c, :, :, q])
    np.testing.assert_allclose(kernel.multiply(), expected.reshape(12, 10), atol=1e-5)
    inputs = draw(1, 6, 12)
    for contract in (kernel.contract, jax.jit(kernel.contract, static_argnums=1)):
        np.testing.assert_allclose(
            contract(inputs, None), np.asarray(inputs) @ expected.reshape(12, 10), atol=1e-4
        )
    assert sizes.numbers(kernel) == block_term.count(((3, 2), (4, 5)), 2, 3) == 3 * (2 * 26 + 4)
    assert kernel.multiply_adds > 0


def test_random_kernels_have_the_variance_that_was_asked_for():
    modes = ((16, 16), (16, 16))
    block = block_term.random_block_term(jax.random.key(0), modes, rank=4, blocks=8)
    train = tensors.random_train(jax.random.key(0), modes, bond=16)
    # The entries are not independent: their factors are shared.
    assert np.var(block.multiply()) == pytest.approx(2 / 256, rel=0.4)
    assert np.var(train.multiply()) == pytest.approx(1 / 256, rel=0.4)


@pytest.mark.parametrize(("cell", "gates"), [(networks.JointLSTM, 4), (networks.JointGRU, 3)])
def test_cells_compute_their_formulas(cell, gates):
    x, h, c = draw(0, 2, 5), draw(1, 2, 3), draw(2, 2, 3)
    w, u, b = draw(3, 5, 3 * gates), draw(4, 3, 3 * gates), draw(5, 3 * gates)
    params = {"of_inputs": {"kernel": w, "bias": b}, "of_state": {"kernel": u}}
    carry = (c, h) if gates == 4 else h
    _, found = cell(3).apply({"params": params}, carry, x)
    x, h, c, w, u, b = (np.asarray(a, np.float64) for a in (x, h, c, w, u, b))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    of_inputs, of_state = np.split(x @ w + b, gates, 1), np.split(h @ u, gates, 1)
    if gates == 4:
        i, f, g, o = (one + other for one, other in zip(of_inputs, of_state, strict=True))
        expected = sigmoid(o) * np.tanh(sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g))
    else:
        (r, z, n), (hr, hz, hn) = of_inputs, of_state
        new = np.tanh(n + sigmoid(r + hr) * hn)
        expected = (1 - sigmoid(z + hz)) * new + sigmoid(z + hz) * h
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_spike_has_the_derivative_of_a_fast_sigmoid():
    potential = jnp.array([-0.1, 0.0, 0.02])
    value, slope = jax.jvp(networks.spike, (potential,), (jnp.ones(3),))
    assert value.tolist() == [0, 0, 1]
    np.testing.assert_allclose(slope, [1 / 3.5**2, 1, 1 / 1.5**2], rtol=1e-5)


def test_a_spiking_layer_spikes_as_its_recurrence_says():
    module = networks.Spiking(width=4, outputs=2, steps=3)
    x = 4 * draw(0, 3, 5)
    params = module.init(jax.random.key(0), x, False)["params"]
    found = module.apply({"params": params}, x, False)
    potentials, total = [np.zeros((3, 4)) for _ in range(3)] + [np.zeros((3, 2))], 0
    spikes = [np.zeros((3, 4)) for _ in range(3)]
    for _ in range(3):
        signal = np.asarray(x)
        for i in range(4):
            layer = params[f"Dense_{i}"]
            current = signal @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
            potentials[i] = 0.9 * potentials[i] + current - (spikes[i] if i < 3 else 0)
            if i < 3:
                spikes[i] = signal = (potentials[i] > 1).astype(float)
        total = total + potentials[3]
    np.testing.assert_allclose(found, total / 3, atol=1e-5)


# Sizes.


@pytest.mark.parametrize("track", SIZED.values(), ids=SIZED)
def test_what_is_chosen_for_a_level_is_within_it(track):
    whole = sizes.dense_size(track)
    cost = {path: sum(pair) for path, pair in sizes.shapes(track).items()}
    for level in track.levels:
        values = {path: np.linspace(2, 0, min(pair)) for path, pair in sizes.shapes(track).items()}
        ranked = sizes.ranked(track, level, values)
        left = sizes.budget(track, level) - sum(ranked[path] * cost[path] for path in cost)
        assert 0 <= left < max(cost.values())
        bits = sizes.best_bits(track, level)
        thin = sizes.Thin(trainer.Training(tracks.dense(track.module, track).shapes), bits=bits)
        assert sizes.size_of(thin, track).bytes <= level * whole.bytes


@pytest.mark.parametrize("track", SIZED.values(), ids=SIZED)
def test_the_narrow_network_is_within_the_level(track):
    for level in track.levels:
        narrow = tracks.dense(sizes.narrow(track, level), track).shapes
        share = sizes.numbers(narrow) / sizes.dense_size(track).parameters
        assert 0.7 * level < share <= level


def test_a_sparse_kernel_counts_its_entries_and_their_places():
    track = tracks.TRACKS["a"]
    params = jax.tree.map(lambda s: np.ones(s.shape), tracks.dense(track.module, track).shapes)
    params["Dense_1"]["kernel"][:, 1:] = 0
    thin = sizes.Thin(trainer.Training(params), sparse=True)
    dense, found = sizes.dense_size(track), sizes.size_of(thin, track)
    assert dense.parameters - found.parameters == 256 * 255
    assert dense.multiply_adds - found.multiply_adds == 256 * 255
    places = 10_240 // 8 + 256 * 2 + 65_536 // 8
    assert found.bytes == 4 * found.parameters + places


def test_trials_are_as_many_for_each_arm_and_share_the_shared_numbers():
    for trial in range(len(arms.TRIALS)):
        for arm in arms.ALL:
            drawn, fixed = arm.draw(trial), dict(arm.fixed)
            assert drawn == arm.draw(trial)
            for name, value in zip(arms.SHARED, arms.TRIALS[trial], strict=True):
                assert drawn[name] == fixed.get(name, value)
            for name, values in arm.knobs:
                assert drawn[name] in values


def test_a_better_order_of_channels_keeps_what_a_network_computes():
    track = tracks.TRACKS["e"].short()
    params = tracks.initial(track.module, track, 0)
    ordered = grouped.ordered(params, track, (2, 4))
    x = trainer.on_device(track, "test")[0][:5]
    run = lambda params: track.module.apply({"params": params}, x, False)
    np.testing.assert_allclose(run(ordered), run(params), atol=1e-5)  # sums in another order
    for _, after in track.feeds:
        where = f"{after}/kernel"
        masks = [rmtjax.patterns.nm_mask(tree, (2, 4), where=where) for tree in (params, ordered)]
        pairs = zip((params, ordered), masks, strict=True)
        kept = [np.abs(t[after]["kernel"][m[after]["kernel"]]).sum() for t, m in pairs]
        assert kept[1] > kept[0]


def test_arms_of_patterns_have_one_level():
    by_name = {arm.name: arm for arm in arms.on_track("d")}
    track = tracks.TRACKS["d"]
    assert by_name["2:4"].levels_of(track) == (0.5,)
    assert by_name["2:4"].tuned_at(track) == 0.5
    assert by_name["SER"].tuned_at(track) == track.tuned_at == 0.4
    assert by_name["dense"].tuned_at(track) == 1
    assert sizes.share(track, 0.4) == pytest.approx(0.4, abs=1e-4)  # a whole number of entries


def test_the_best_trial_is_the_first_of_the_best_on_validation():
    record = lambda trial, value: {"validation": value, "settings": {"trial": trial}}
    assert runs.best_trial([record(0, 1.0), record(1, 3.0), record(2, 3.0)]) == 1


# Runs.


@pytest.mark.slow
def test_a_sweep_finds_the_bonds_that_were_planted():
    edge, error, eps, worse = claims.sweep_bonds()
    assert edge == (sweep.PLANTED, sweep.PLANTED)
    assert eps == (16, 16)
    # Least squares with as many numbers as were planted, and with 12 times as many.
    assert error < 0.05 < worse


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*finds no kernel")
@pytest.mark.parametrize(("letter", "name"), ARMS)
def test_every_arm_trains_in_short(letter, name):
    track = tracks.TRACKS[letter].short()
    arm = next(arm for arm in arms.ALL if arm.name == name)
    level = arm.levels_of(track)[-1]
    thin = arm.run(trainer.Setting(track, level, 0, arm.draw(0)))
    module = thin.module or track.module
    assert 0 <= trainer.accuracy(module, thin.training.params, track, "test") <= 100
    found, whole = sizes.size_of(thin, track), sizes.dense_size(track)
    if track.of_kernels:  # the entries that are left, exactly or one less
        kernels = sum(m * n for m, n in sizes.shapes(track).values())
        left = found.parameters - (whole.parameters - kernels)
        assert 0 <= level * kernels - left <= 1e-3 * kernels
        return
    share = found.bytes / whole.bytes if thin.bits else found.parameters / whole.parameters
    # A spiking network of full size has leaks beside the weights.
    assert 0.6 * level < share <= level * (1.03 if name == "spiking" else 1)
    assert thin.training.seconds > 0
    leaves = jax.tree.leaves(thin.training.params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


@pytest.mark.slow
def test_the_command_runs_shows_draws_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    options = ["--track", "a", "--short", "--seeds", "1", "--trials", "1"]
    options += ["--folder", str(tmp_path), "--arms", "narrow", "truncated SVD"]
    assert command.main([*options, "--figure"]) == 0
    found = json.loads((tmp_path / "track_a_short.json").read_text())["runs"]
    levels = [record["settings"]["level"] for record in found]
    assert levels == [0.1, 0.1, 0.05, 0.1, 0.25, 0.05, 0.1, 0.25]
    assert (tmp_path / "neighbours.png").exists()
    shown = capsys.readouterr().out
    assert "track a: MNIST-1D" in shown

    def trained(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "perform", trained)
    assert command.main(options) == 0
    assert command.main([*options, "--show-only"]) == 0


def test_an_arm_that_a_track_has_not_is_named_with_those_that_it_has(tmp_path, capsys):
    options = ["--track", "b", "--arms", "spiking", "--folder", str(tmp_path)]
    assert command.main(options) == 2
    assert "`--arms` has 'spiking', which is not on track b" in capsys.readouterr().out


def test_ranks_come_from_the_tuning_seed():
    assert allocation.TUNING_SEED == runs.TUNING_SEED
    assert allocation.TUNING_SEED not in range(5)


# The page.


def test_the_page_has_the_tables_of_the_committed_results(capsys):
    assert command.main(["--show-only"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    missing = [line for line in lines if line not in PAGE.read_text()]
    assert not missing


@pytest.mark.slow
def test_the_page_has_the_claims(capsys):
    assert command.main(["--claims"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(lines) in PAGE.read_text()
