"""Tensor trains against a TT-SVD in NumPy and float64, their bounds, counts and products."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import KernelAxes, ranks
from rmtjax.lowrank import (
    balanced_modes,
    bond_entropies,
    bond_spectra,
    operator_modes,
    state_modes,
    tensor_train,
    TensorTrain,
    to_factors,
    to_trains,
    train_size,
)

# Some successive products and decompositions in float32, relative to the largest entry.
EXACT = 2e-5
STACK, CONV = KernelAxes((1,), (2,), (0,)), KernelAxes((0, 1, 2), (3,))


def draw(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def close(actual, expected, tolerance=EXACT):
    expected = np.asarray(expected, np.float64)
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


def reference(matrix, modes, rank_of):
    """TT-SVD as Oseledets has it: the product of the cores, the values and ranks of each bond."""
    rows, columns = zip(*modes, strict=True)
    d = len(modes)
    tensor = np.asarray(matrix, np.float64).reshape(*rows, *columns)
    carry = tensor.transpose([axis for k in range(d) for axis in (k, d + k)]).reshape(1, -1)
    cores, values = [], []
    for n, m in modes[:-1]:
        u, s, vt = np.linalg.svd(carry.reshape(len(carry) * n * m, -1), full_matrices=False)
        rank = rank_of(s)
        cores.append(u[:, :rank].reshape(len(carry), n, m, rank))
        values.append(s)
        carry = s[:rank, None] * vt[:rank]
    cores.append(carry.reshape(len(carry), *modes[-1], 1))
    return expand(cores), values, [core.shape[-1] for core in cores[:-1]]


def expand(cores):
    """The matrix of a train in float64: one tensor of all modes, then its axes in order."""
    tensor = np.ones(1)
    for core in cores:
        tensor = np.tensordot(tensor, np.asarray(core, np.float64), 1)
    d, sizes = len(cores), tensor.shape[:-1]
    ordered = tensor[..., 0].transpose([2 * k + side for side in (0, 1) for k in range(d)])
    return ordered.reshape(math.prod(sizes[::2]), -1)


OPERATOR, STATE = operator_modes((4, 3, 2), (2, 3, 4)), state_modes((4, 3, 2), (6, 4))


@pytest.mark.parametrize("modes", [OPERATOR, STATE], ids=["operator", "state"])
@pytest.mark.parametrize("bond", [2, 5, 100])
def test_it_is_the_train_of_numpy(modes, bond):
    matrix = draw(24, 24)
    product, values, bonds = reference(matrix, modes, lambda s: min(bond, len(s)))
    fit = tensor_train(matrix, modes, rule=ranks.fixed(bond))
    assert fit.train.bonds == tuple(bonds) == tuple(found.rank for found in fit.bonds)
    assert fit.train.modes == modes
    close(fit.train.multiply(), product)
    close(expand(fit.train.cores), product)
    for found, s in zip(fit.bonds, values, strict=True):
        close(found.values, s)
        assert found.size == len(s)
        # The difference of squares of float32 around 100.
        np.testing.assert_allclose(found.lost, np.linalg.norm(s[found.rank :]), atol=1e-4)
    error = np.linalg.norm(np.asarray(matrix, np.float64) - product)
    np.testing.assert_allclose(fit.error, error, rtol=1e-4, atol=1e-4)


@settings(max_examples=10)
@given(tolerance=st.floats(0.0, 0.95), seed=st.integers(0, 1000))
def test_the_error_is_within_the_bound_and_the_bound_within_the_tolerance(tolerance, seed):
    rng = np.random.default_rng(seed)
    # Values that fall, so that tolerances cut at other places.
    matrix = rng.normal(size=(24, 24)) * 0.8 ** np.arange(24)
    matrix = jnp.asarray(matrix, jnp.float32)
    norm = float(np.linalg.norm(matrix))
    for modes in (OPERATOR, STATE):
        fit = tensor_train(matrix, modes, tolerance=tolerance)
        error = np.linalg.norm(np.asarray(matrix, np.float64) - expand(fit.train.cores))
        rounding = 1e-5 * norm
        assert error <= fit.error + rounding
        assert fit.error <= tolerance * norm + rounding
        # A bond that is smaller by one would lose more than its share.
        share = tolerance * norm / math.sqrt(len(modes) - 1)
        for bond in fit.bonds:
            assert np.linalg.norm(bond.values[bond.rank - 1 :]) > share - rounding or bond.rank == 1


def test_without_a_choice_nothing_is_cut():
    matrix = draw(24, 24)
    for modes in (OPERATOR, STATE):
        fit = tensor_train(matrix, modes)
        close(fit.train.multiply(), matrix)
        assert fit.error == 0
        assert {bond.reason for bond in fit.bonds} == {"kept: neither rule nor tolerance"}


def test_the_bond_in_the_middle_of_a_state_is_the_rank_and_operators_have_none():
    """A matrix of rank 5 of side 64, and an operator of bond 2 with 256 numbers and full rank."""
    matrix = draw(64, 5) @ draw(64, 5).T
    halves = state_modes((8, 8), (8, 8))
    state = tensor_train(matrix, halves, tolerance=1e-5).train
    assert state.bonds == (8, 5, 8)
    assert state.rank == 5
    operator = tensor_train(matrix, operator_modes((8, 8), (8, 8)), tolerance=1e-5).train
    assert operator.bonds[0] > 5
    assert operator.rank is None
    three = operator_modes((4, 4, 4), (4, 4, 4))
    assert tensor_train(draw(64, 64), three, rule=ranks.fixed(16)).train.bonds == (16, 16)
    kron = tensor_train(draw(64, 64), operator_modes((8, 8), (8, 8)), rule=ranks.fixed(2)).train
    assert sum(core.size for core in kron.cores) == 256
    assert np.linalg.matrix_rank(np.asarray(kron.multiply(), np.float64), tol=1e-4) == 64


def test_the_counts_of_the_papers():
    """Of 2010.04196 (LSTM of 256 units on 28 or 1 inputs) and 2006.05442 (512 x 512)."""

    def joint(inputs, bond, gates):
        outputs = balanced_modes(256 * gates, 2)
        size = lambda rows: train_size(operator_modes(balanced_modes(rows, 2), outputs), bond)
        return size(inputs) + size(256)

    assert [joint(28, bond, 4) for bond in (2, 4, 8)] == [2752, 5504, 11008]
    # Of one input, a core of 1 x 32 has a bond of 2 that the paper counts in full: 2 x 64 numbers.
    assert [joint(1, bond, 4) for bond in (2, 4, 8)] == [2176, 4352, 8704]
    assert (28 + 256) * 4 * 256 == 290816
    assert [round(290816 / size) for size in (2752, 5504, 11008)] == [106, 53, 26]
    # A train for each gate costs twice as much: outputs of 16 x 16 four times, and not 32 x 32.
    assert [4 * joint(28, bond, 1) for bond in (2, 4, 8)] == [5504, 11008, 22016]
    thirds = (8, 8, 8)
    state, operator = state_modes(thirds, thirds), operator_modes(thirds, thirds)
    assert 16 * (512 + 512) == 16384
    assert train_size(state, 16, attainable=False) == 8448
    assert train_size(state, 16) == 6272
    assert train_size(operator, 16) == 18432


def test_a_train_has_the_size_that_was_counted():
    matrix = draw(64, 64)
    for modes in (state_modes((4, 4, 4), (8, 8)), operator_modes((4, 4, 4), (8, 8))):
        cores = tensor_train(matrix, modes, rule=ranks.fixed(6)).train.cores
        assert sum(core.size for core in cores) == train_size(modes, 6)


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(256, 2, (16, 16)), (1024, 2, (32, 32)), (28, 2, (4, 7)), (60, 3, (3, 4, 5)), (7, 2, (1, 7))],
)
def test_balanced_modes(size, count, expected):
    assert balanced_modes(size, count) == expected


def planted(shape, modes, bond, noise=0.02, seed=1):
    """A train of known bonds, and noise far below it."""
    rng = np.random.default_rng(seed)
    bonds = [1, *[bond] * (len(modes) - 1), 1]
    cores = [rng.normal(size=(bonds[k], n, m, bonds[k + 1])) for k, (n, m) in enumerate(modes)]
    matrix = np.asarray(
        TensorTrain(tuple(map(jnp.asarray, cores)), *((s,) for s in shape)).multiply()
    )
    return jnp.asarray(matrix / matrix.std() + noise * rng.normal(size=shape), jnp.float32)


def test_the_edge_of_each_unfolding_finds_the_planted_bonds():
    modes = operator_modes((12, 12), (10, 10))
    fit = tensor_train(planted((144, 100), modes, 3), modes, rule=ranks.bema())
    assert fit.train.bonds == (3,)
    assert fit.bonds[0].reason == "3 of 120 are signal"
    # Noise of 0.02 outside of three directions of 120.
    assert 0.9 < fit.error / (0.02 * math.sqrt(14400)) < 1.0


def test_unfoldings_that_a_rule_cannot_judge_are_not_cut():
    modes = operator_modes((8, 8), (8, 8))
    small = tensor_train(draw(64, 64), state_modes((8, 8), (8, 8)), rule=ranks.bema())
    words = [bond.reason for bond in small.bonds]
    assert words == [
        "kept: short side 8 under 50",
        "kept: no signal stands out of the noise",
        "kept: short side 8 under 50",
    ]
    heavy = np.random.default_rng(0).standard_t(1, size=(64, 64))
    heavy = tensor_train(jnp.asarray(heavy, jnp.float32), modes, rule=ranks.bema())
    assert heavy.bonds[0].reason == "kept: the rule does not accept the spectrum"
    broken = tensor_train(draw(64, 64).at[0, 0].set(jnp.nan), modes, rule=ranks.fixed(2))
    assert broken.bonds[0].reason == "kept: not finite"
    assert math.isnan(broken.error)


def test_factors_are_compressed_without_their_product():
    factors = rmtjax.factorize_matrix(draw(96, 72), 12)
    modes = state_modes((4, 4, 6), (8, 9))
    dense = np.asarray(factors.left, np.float64) @ np.asarray(factors.right, np.float64)
    product, values, bonds = reference(dense, modes, lambda s: min(5, len(s)))
    fit = tensor_train(factors, modes, rule=ranks.fixed(5))
    assert fit.train.bonds == tuple(bonds)
    close(fit.train.multiply(), product)
    close(fit.bonds[2].values[:5], values[2][:5])
    np.testing.assert_allclose(fit.error, np.linalg.norm(dense - product), rtol=1e-4)
    exact = tensor_train(factors, modes, tolerance=1e-6)
    close(exact.train.multiply(), dense)
    assert exact.train.bonds == (4, 16, 12, 9)
    noisy = tensor_train(factors, modes, rule=ranks.gavish_donoho(), min_size=20)
    assert noisy.bonds[2].reason == "kept: the rank of the factors"
    assert noisy.train.rank == 12
    # An operator has no half for each factor.
    operator = operator_modes((8, 12), (8, 9))
    mixed = tensor_train(factors, operator, rule=ranks.fixed(7)).train
    close(mixed.multiply(), reference(dense, operator, lambda s: 7)[0])


def test_the_first_error_of_a_tolerance_on_factors_is_that_of_their_product():
    factors = rmtjax.factorize_matrix(draw(96, 72), 12)
    dense = np.asarray(factors.left, np.float64) @ np.asarray(factors.right, np.float64)
    fit = tensor_train(factors, state_modes((8, 12), (8, 9)), tolerance=0.6)
    error = np.linalg.norm(dense - np.asarray(fit.train.multiply(), np.float64))
    assert 0 < error <= 0.6 * np.linalg.norm(dense)
    np.testing.assert_allclose(fit.error, error, rtol=1e-4)


def test_stacks_have_one_bond_for_all_and_convolutions_a_core_for_the_window():
    stack = draw(3, 24, 24)
    fit = tensor_train(stack, OPERATOR, rule=ranks.fixed(4), axes=STACK)
    assert fit.train.shape == (3, 24, 24)
    assert fit.bonds[0].values.shape == (3, 8)
    products = [reference(member, OPERATOR, lambda s: min(4, len(s)))[0] for member in stack]
    close(fit.train.multiply(), products)
    np.testing.assert_allclose(fit.error, np.linalg.norm(np.asarray(stack) - products), rtol=1e-4)
    kernel = draw(3, 2, 8, 12)
    modes = operator_modes((2, 4), (4, 3))
    fit = tensor_train(kernel, modes, rule=ranks.fixed(5), axes=CONV)
    assert fit.train.modes == ((6, 1), *modes)
    product = reference(kernel.reshape(48, 12), fit.train.modes, lambda s: min(5, len(s)))[0]
    close(fit.train.multiply().reshape(48, 12), product)
    assert (fit.train.inputs, fit.train.outputs) == ((3, 2, 8), (12,))


@pytest.mark.parametrize("modes", [OPERATOR, STATE], ids=["operator", "state"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_products_go_through_the_cores(modes, transposed):
    train = tensor_train(draw(24, 24), modes, rule=ranks.fixed(3)).train
    inputs = draw(5, 2, 24)
    dot = lambda lhs, rhs, axes: jax.lax.dot_general(lhs, rhs, (axes, ((), ())))
    run = jax.jit(lambda train, inputs: train.contract(inputs, dot, transposed=transposed))
    matrix = expand(train.cores)
    close(run(train, inputs), np.asarray(inputs, np.float64) @ (matrix.T if transposed else matrix))
    largest = max(
        math.prod(var.aval.shape)
        for equation in jax.make_jaxpr(run)(train, inputs).jaxpr.eqns[0].params["jaxpr"].eqns
        for var in equation.outvars
    )
    assert largest < 24 * 24 * 10  # neither the matrix nor more than a hidden activation
    flops = jax.jit(run).lower(train, inputs).compile().cost_analysis()
    flops = (flops[0] if isinstance(flops, list) else flops)["flops"]
    if not transposed and train.rank is None:
        assert flops == 2 * 10 * train.multiply_adds


@pytest.mark.slow  # compiles decompositions of five shapes
def test_spectra_and_entropies_are_those_of_the_unfoldings():
    matrix = draw(24, 24)
    for modes in (OPERATOR, state_modes((4, 6), (24,))):
        train = tensor_train(matrix, modes, rule=ranks.fixed(6)).train
        # Cores of another gauge, as training leaves them.
        gauge = np.random.default_rng(1).normal(size=(train.bonds[0],) * 2)
        first = jnp.einsum("rnma,ab->rnmb", train.cores[0], jnp.asarray(gauge, jnp.float32))
        second = jnp.einsum(
            "ab,bnmr->anmr", jnp.asarray(np.linalg.inv(gauge), jnp.float32), train.cores[1]
        )
        train = TensorTrain((first, second, *train.cores[2:]), train.inputs, train.outputs)
        found = jax.jit(bond_spectra)(train)
        rows, columns = zip(*modes, strict=True)
        d = len(modes)
        tensor = expand(train.cores).reshape(*rows, *columns)
        tensor = tensor.transpose([axis for k in range(d) for axis in (k, d + k)])
        entropies = bond_entropies(train)
        for k, s in enumerate(found):
            left = math.prod(math.prod(pair) for pair in modes[: k + 1])
            expected = np.linalg.svd(tensor.reshape(left, -1), compute_uv=False)
            # The gauge has a condition of a few hundred.
            close(s, expected[: len(s)], 1e-4)
            p = expected[: train.bonds[k]] ** 2 / np.sum(expected**2)
            np.testing.assert_allclose(entropies[k], -np.sum(p * np.log(p)), atol=1e-3)


def test_entropies_of_stacks_products_and_maximally_entangled_matrices():
    modes = state_modes((24,), (24,))
    identity = tensor_train(jnp.eye(24), modes).train
    np.testing.assert_allclose(bond_entropies(identity), [math.log(24)], rtol=1e-5)
    product = tensor_train(jnp.outer(draw(24), draw(24)), modes, tolerance=1e-5).train
    np.testing.assert_allclose(bond_entropies(product), [0.0], atol=1e-6)
    stack = tensor_train(draw(3, 24, 24), modes, axes=STACK).train
    assert bond_entropies(stack).shape == (3, 1)
    s = np.linalg.svd(np.asarray(draw(3, 24, 24), np.float64), compute_uv=False)
    close(bond_spectra(stack)[0], s)


def test_a_tree_is_replaced_by_path():
    params = {
        "Dense_0": {"kernel": draw(24, 24), "bias": jnp.ones(24)},
        "Dense_1": {"kernel": rmtjax.factorize_matrix(draw(24, 24), 6)},
        "Dense_2": {"kernel": draw(24, 24)},
    }
    modes = {"Dense_0/kernel": OPERATOR, "Dense_1/kernel": STATE}
    trains = to_trains(params, modes, rule=ranks.fixed(3))
    assert {*trains.fits} == {*modes}
    for name in ("Dense_0", "Dense_1"):
        assert isinstance(trains.params[name]["kernel"], TensorTrain)
    assert trains.params["Dense_2"]["kernel"] is params["Dense_2"]["kernel"]
    merged = rmtjax.merge(trains.params)
    close(merged["Dense_0"]["kernel"], trains.fits["Dense_0/kernel"].train.multiply())
    pairs = to_factors(trains.params)
    assert isinstance(pairs["Dense_0"]["kernel"], TensorTrain)  # an operator
    close(rmtjax.merge(pairs)["Dense_1"]["kernel"], merged["Dense_1"]["kernel"])
    plan = rmtjax.plan(trains.params, rule=ranks.fixed(2), min_size=1)
    assert plan["Dense_0/kernel"].reason == "kept: held as TensorTrain (rank 8 of 24)"
    assert plan["Dense_0/kernel"].cost.parameters == train_size(OPERATOR, 3)
    s = np.linalg.svd(np.asarray(merged["Dense_0"]["kernel"], np.float64), compute_uv=False)
    close(plan["Dense_0/kernel"].spectrum.eigenvalues, s**2 / 24)


UNCHECKED = inspect.unwrap(tensor_train)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modes": ((4, 4), (5, 6))}, "`modes` must be two pairs or more that multiply to 24 rows"),
        ({"modes": ((24, 24),)}, "`modes` must be two pairs or more"),
        ({"tolerance": 1.0}, r"`tolerance` must be in \[0, 1\), got 1.0"),
        ({"tolerance": 0.1, "rule": ranks.fixed(2)}, "give `rule` or `tolerance`, and not both"),
        ({"min_size": 0}, "`min_size` must be an integer of at least 1, got 0"),
        ({"axes": KernelAxes((1,), (0,))}, "`axes` must be in the order batch, inputs, outputs"),
        ({"kernel": jnp.ones((2, 3, 4))}, r"`tensor_train` needs `axes` for a kernel of shape"),
        ({"kernel": jnp.ones((0, 4))}, r"`kernel` must have entries, got shape \(0, 4\)"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    options = {"kernel": jnp.ones((24, 24)), "modes": OPERATOR, **options}
    with pytest.raises(ValueError, match=f"^{words}"):
        UNCHECKED(options.pop("kernel"), options.pop("modes"), **options)


def test_other_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"^`rule` must be a rank rule"):
        UNCHECKED(jnp.ones((24, 24)), OPERATOR, rule="bema")
    with pytest.raises(TypeError, match=r"^`train` must be a TensorTrain, got"):
        inspect.unwrap(bond_spectra)(jnp.ones((24, 24)))
    params = {"Dense_0": {"kernel": jnp.ones((24, 24))}}
    with pytest.raises(ValueError, match=r"^`modes` has 'other', which is not in `params`"):
        to_trains(params, {"other": OPERATOR})
    with pytest.raises(ValueError, match=r"^`size` must be an integer of at least 1, got 0"):
        balanced_modes(0, 2)
