"""Bounds on changes of predictions, against what float64 measures: never violated."""

import functools
import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import expit, log_softmax

import rmtjax
from experiments import certificate as experiment, data, training
from rmtjax.certificate import certify, operator_norm

ACTIVATIONS = {  # ours, and NumPy's
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "tanh": (jnp.tanh, np.tanh),
    "sigmoid": (jax.nn.sigmoid, expit),
}
CHAINS = [  # of width 1 norms are attained
    ((1, 1, 1, 1), "relu"),
    ((6, 4), "relu"),
    ((5, 1, 3), "tanh"),
    ((7, 5, 4), "sigmoid"),
    ((40, 30, 20, 3), "relu"),
]


def make_chain(widths, rng, scale=1.0, dtype=jnp.float32):
    return {
        f"Dense_{depth}": {
            "kernel": jnp.asarray(scale * rng.normal(size=shape), dtype),
            "bias": jnp.asarray(scale * rng.normal(size=shape[1]), dtype),
        }
        for depth, shape in enumerate(itertools.pairwise(widths))
    }


def change_kernels(params, chosen, change):
    new = {
        layer: leaves
        | {"kernel": change(leaves["kernel"]) if layer in chosen else leaves["kernel"]}
        for layer, leaves in params.items()
    }
    return new


def run_in_float64(params, inputs, activation=ACTIVATIONS["relu"][1]):
    hidden = np.asarray(inputs, np.float64)
    for depth, leaves in enumerate(params.values()):
        hidden = activation(hidden) if depth else hidden
        hidden = hidden @ np.asarray(leaves["kernel"], np.float64)
        hidden = hidden + np.asarray(leaves["bias"], np.float64)
    return hidden


def cross_entropy(logits, labels):
    return -np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1).mean()


def squares(params):
    return sum((np.asarray(leaves["kernel"], np.float64) ** 2).sum() for leaves in params.values())


def check_bounds(found, before, after, inputs, labels=None, activation=ACTIVATIONS["relu"][1]):
    """No bound is violated; returns the measured change of the logits."""
    old, new = (run_in_float64(tree, inputs, activation) for tree in (before, after))
    own = 1e-14 * np.abs(old).max()  # rounding of float64, far below that of float32
    assert (np.abs(new - old) <= found.change + own).all()
    same = old.argmax(axis=1) == new.argmax(axis=1)
    assert same[np.asarray(found.unchanged)].all()
    some = [labels] if labels is not None else [old.argmax(axis=1), new.argmin(axis=1)]
    rises = [cross_entropy(new, classes) - cross_entropy(old, classes) for classes in some]
    assert max(rises) <= found.loss + own + 1e-14
    lost = squares(before) - squares(after)
    assert found.removed <= lost
    for l2 in (0.0, 1e-3, 1.0, 1e3):
        if found.lowers_loss(l2):
            assert max(rises) < np.float32(l2) * lost + own + 1e-14
    return np.abs(new - old)


@functools.cache
def compiled(depth, activation):
    layers = [f"Dense_{number}" for number in range(depth)]
    ours = ACTIVATIONS[activation][0]
    return jax.jit(functools.partial(certify, layers=layers, activation=ours))


CHANGES = {
    "truncate": lambda kernel, size: rmtjax.truncate_matrix(kernel, min(kernel.shape) // 2),
    "shift": lambda kernel, size: kernel + size * jnp.abs(kernel),
    "scale": lambda kernel, size: kernel * (1 - size),
    "zero": lambda kernel, size: 0 * kernel,
}


@pytest.mark.parametrize(("widths", "name"), CHAINS, ids=str)
@settings(max_examples=60)
@given(data=st.data())
def test_no_bound_is_ever_violated(widths, name, data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    params = make_chain(widths, rng, 10 ** draw(st.floats(-3, 2)))
    chosen = draw(st.sets(st.sampled_from(sorted(params)), min_size=1))
    change = CHANGES[draw(st.sampled_from(sorted(CHANGES)))]
    size = 10 ** draw(st.floats(-9, 0))
    after = change_kernels(params, chosen, lambda kernel: change(kernel, size))
    inputs = jnp.asarray(10 ** draw(st.floats(-3, 2)) * rng.normal(size=(9, widths[0])), "float32")
    labels = rng.integers(0, widths[-1], 9) if draw(st.booleans()) else None
    found = compiled(len(params), name)(params, after, inputs, labels=labels)
    assert np.isfinite(found.change).all()
    check_bounds(found, params, after, inputs, labels, ACTIVATIONS[name][1])


def make_case(seed=0, widths=(60, 50, 40, 10), samples=200):
    """A chain of common scale, inputs and their labels."""
    rng = np.random.default_rng(seed)
    params = make_chain(widths, rng)
    params = jax.tree.map(lambda a: a / len(a) ** 0.5, params)
    return params, jnp.asarray(rng.normal(size=(samples, widths[0])), jnp.float32)


LAYERS = ("Dense_0", "Dense_1", "Dense_2")
halve = lambda kernel: rmtjax.truncate_matrix(kernel, min(kernel.shape) // 2)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_of_the_last_layer_it_is_exact(wrap):
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_2"}, halve)
    old, new = (run_in_float64(tree, inputs) for tree in (params, after))
    labels = old.argmax(axis=1)
    found = wrap(functools.partial(certify, layers=LAYERS))(params, after, inputs, labels=labels)
    change = check_bounds(found, params, after, inputs, labels)
    # Roundings of three products of up to 60 terms, summed up at their worst.
    np.testing.assert_allclose(found.change, change, atol=2e-3)
    rise = cross_entropy(new, labels) - cross_entropy(old, labels)
    np.testing.assert_allclose(found.loss, rise, atol=2e-3)
    margins = np.diff(np.sort(new, axis=1)[:, -2:], axis=1)[:, 0]
    clear = (labels == new.argmax(axis=1)) & (margins > 0.01)
    assert found.unchanged[clear].all()
    assert 0.1 < np.mean(found.unchanged) < 0.9


def test_layers_before_it_are_bounded_by_products_of_norms():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_0"}, halve)
    found = compiled(3, "relu")(params, after, inputs)
    kernels = [np.asarray(params[layer]["kernel"], np.float64) for layer in LAYERS]
    removed = kernels[0] - np.asarray(after["Dense_0"]["kernel"], np.float64)
    distance = np.linalg.norm(np.asarray(inputs, np.float64) @ removed, axis=1)
    distance *= np.linalg.norm(kernels[1], 2)
    columns = np.linalg.norm(kernels[2], axis=0)
    np.testing.assert_allclose(found.change, distance[:, None] * columns, rtol=1e-3)


def test_of_several_layers_the_bounds_add_up():
    params, inputs = make_case()
    trees = [params]  # the layers are cut one by one, the last first
    for layer in LAYERS[::-1]:
        trees.append(change_kernels(trees[-1], {layer}, halve))
    steps = [
        compiled(3, "relu")(before, after, inputs) for before, after in itertools.pairwise(trees)
    ]
    whole = compiled(3, "relu")(params, trees[-1], inputs)
    check_bounds(whole, params, trees[-1], inputs)
    np.testing.assert_allclose(whole.change, sum(step.change for step in steps), rtol=1e-3)
    np.testing.assert_allclose(whole.removed, sum(step.removed for step in steps), rtol=1e-3)


def test_the_tail_of_a_network_by_its_captured_inputs():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_1"}, halve)
    first = params["Dense_0"]
    captured = jnp.matmul(inputs, first["kernel"], precision="highest") + first["bias"][None]
    captured = jax.nn.relu(captured)
    tail = certify(params, after, captured, layers=LAYERS[1:])
    whole = certify(params, after, inputs, layers=LAYERS)
    np.testing.assert_allclose(tail.change, whole.change, rtol=1e-3)
    assert (tail.change <= whole.change).all()  # which knows its inputs up to rounding only


def test_what_is_not_changed_does_not_change():
    params, inputs = make_case()
    found = compiled(3, "relu")(params, params, inputs, labels=jnp.zeros(200, jnp.int32))
    assert not found.change.any()
    assert found.loss == found.removed == 0
    assert np.mean(found.unchanged) > 0.98  # but for near ties


def test_removed_is_the_sum_of_squared_singular_values():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_1"}, halve)
    values = np.linalg.svd(np.asarray(params["Dense_1"]["kernel"], np.float64), compute_uv=False)
    found = compiled(3, "relu")(params, after, inputs)
    np.testing.assert_allclose(found.removed, (values[20:] ** 2).sum(), rtol=1e-3)


def test_noise_that_no_input_meets_certainly_lowers_the_loss():
    params, inputs = make_case()
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[0].set(1.0)
    after = change_kernels(params, {"Dense_0"}, lambda kernel: kernel.at[0].set(0.0))
    inputs = inputs.at[:, 0].set(1e-3)
    labels = jnp.zeros(200, jnp.int32)
    found = compiled(3, "relu")(params, after, inputs, labels=labels)
    check_bounds(found, params, after, inputs, np.asarray(labels))
    assert found.lowers_loss(1e-3)
    assert not found.lowers_loss(0.0)
    any_labels = compiled(3, "relu")(params, after, inputs)
    assert any_labels.lowers_loss(1e-2)
    assert any_labels.loss > found.loss


def test_biases_and_missing_biases():
    params, inputs = make_case()
    after = change_kernels(params, set(), halve)
    after["Dense_2"] = after["Dense_2"] | {"bias": after["Dense_2"]["bias"] + 1.0}
    found = compiled(3, "relu")(params, after, inputs)
    np.testing.assert_allclose(found.change, 1, rtol=1e-3)
    bare = {layer: {"kernel": leaves["kernel"]} for layer, leaves in params.items()}
    zero = jax.tree.map(jnp.zeros_like, params)
    zero = {layer: leaves | {"bias": zero[layer]["bias"]} for layer, leaves in params.items()}
    cut = change_kernels(bare, {"Dense_1"}, halve)
    found = compiled(3, "relu")(bare, cut, inputs)
    check_bounds(found, zero, change_kernels(zero, {"Dense_1"}, halve), inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_few_bits_are_lifted(dtype):
    params, inputs = make_case()
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    after = change_kernels(params, {"Dense_0"}, halve)
    found = certify(params, after, inputs.astype(dtype), layers=LAYERS)
    assert found.change.dtype == found.loss.dtype == jnp.float32
    check_bounds(found, params, after, inputs.astype(dtype))


def test_mixed_dtypes_are_computed_in_the_widest():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_2"}, lambda kernel: kernel * 1.001)
    with jax.enable_x64(True):
        wide = jnp.asarray(inputs, jnp.float64)
        found = certify(params, after, wide, layers=LAYERS)
        assert found.change.dtype == jnp.float64
        change = check_bounds(found, params, after, wide)
        np.testing.assert_allclose(found.change, change, atol=1e-11)


def test_what_is_not_finite_certifies_nothing():
    params, inputs = make_case()
    broken = change_kernels(params, {"Dense_1"}, lambda kernel: kernel.at[0, 0].set(jnp.nan))
    found = compiled(3, "relu")(params, broken, inputs)
    assert not found.unchanged.any()
    assert not found.lowers_loss(1e9)
    for label in (-1, 10):
        labels = jnp.full(200, label)
        assert not compiled(3, "relu")(params, params, inputs, labels=labels).lowers_loss(1e9)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (60, 200), (300, 50)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e15])
def test_operator_norms_are_those_of_numpy_and_no_less(wrap, shape, scale):
    matrix = jnp.asarray(scale * np.random.default_rng(0).normal(size=shape), jnp.float32)
    norm = np.linalg.norm(np.asarray(matrix, np.float64), 2)
    actual = wrap(operator_norm)(matrix)
    assert norm <= actual <= norm * (1 + 4 * max(shape) * 1.2e-7)
    assert wrap(operator_norm)(0 * matrix) == 0
    assert jnp.isnan(wrap(operator_norm)(matrix.at[0, 0].set(jnp.nan)))


def spoil(tree, layer, name, leaf):
    return tree | {layer: tree[layer] | {name: leaf}}


PARAMS, INPUTS = make_case(samples=3)
FACTORS = rmtjax.factorize_matrix(PARAMS["Dense_0"]["kernel"], 2)
WRONG = {  # arguments in place of the right ones, and what is said
    "layer": ({"layers": ["Dense_7"]}, r"`layers` must be dense layers of `before`.*'Dense_7'"),
    "none": ({"layers": []}, "`layers` must name at least one"),
    "order": ({"layers": LAYERS[::-1]}, r"`layers\[0\]` takes 40 inputs, but is given 60"),
    "shape": (
        {"after": spoil(PARAMS, "Dense_1", "kernel", jnp.ones((50, 41)))},
        r"`after` must have the shapes of `before`.*`layers\[1\]`",
    ),
    "bias": ({"after": spoil(PARAMS, "Dense_1", "bias", jnp.ones(1))}, "`after` must have the sha"),
    "factors": ({"after": spoil(PARAMS, "Dense_0", "kernel", FACTORS)}, r"rmtjax.merge\(after\)"),
    "matrix": ({"before": spoil(PARAMS, "Dense_0", "kernel", jnp.ones((3, 3, 2, 8)))}, "matrix"),
    "dtype": (
        {"before": spoil(PARAMS, "Dense_0", "kernel", jnp.ones((60, 50), jnp.int32))},
        "matrix",
    ),
    "vector": ({"inputs": INPUTS[0]}, "inputs"),
    "no samples": ({"inputs": INPUTS[:0]}, "`inputs` must have shape"),
    "bytes": ({"inputs": INPUTS.astype(jnp.uint8)}, "inputs"),
    "labels": ({"labels": jnp.zeros(4, jnp.int32)}, "labels"),
    "one-hot": ({"labels": jnp.zeros((3, 10), jnp.int32)}, "labels"),
    "steep far out": (
        {"activation": lambda x: jnp.where(jnp.abs(x) > 9, 10 * x, x)},
        r"slopes .* got 10\.0",
    ),
    "oscillating": ({"activation": lambda x: jnp.sin(128 * jnp.pi * x)}, "slopes"),
    "not elementwise": ({"activation": jax.nn.softmax}, "by itself, which softmax does not"),
    "steep": ({"activation": jax.nn.gelu}, r"`activation` must have slopes .* got 1\.129"),
}


@pytest.mark.parametrize(("wrong", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(wrong, words):
    right = {"before": PARAMS, "after": PARAMS, "inputs": INPUTS, "layers": LAYERS}
    with pytest.raises((ValueError, TypeError), match=words):
        certify(**(right | wrong))


def test_a_steep_activation_divided_by_its_slope():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_0"}, halve)
    gentle = lambda x: jax.nn.gelu(x) / 1.13
    assert certify(params, after, inputs, layers=LAYERS, activation=gentle).change.all()


def test_a_layer_that_comes_twice_is_removed_once():
    params = {"D": {"kernel": jnp.diag(jnp.array([1.0, 0.5]))}}
    after = {"D": {"kernel": jnp.diag(jnp.array([1.0, 0.0]))}}
    found = certify(params, after, jnp.ones((3, 2)), layers=["D", "D"])
    np.testing.assert_allclose(found.removed, 0.25, rtol=1e-5)


# Real data, and the experiment


@pytest.fixture(scope="module")
def mnist():
    """A network of two layers trained on MNIST, and its test images."""
    try:
        dataset = data.load("mnist", source="idx", data_dir=os.environ.get("RMTJAX_DATA_DIR"))
    except FileNotFoundError as error:
        if os.environ.get("RMTJAX_REQUIRE_DATA") == "1":
            raise
        pytest.skip(str(error))
    train, test = training.to_device(dataset, label_noise=0.0, seed=0)
    module, optimizer = training.MLP((256,)), optax.sgd(0.08, momentum=0.9)
    params = module.init(jax.random.key(0), train.images[:1])["params"]
    opt_state, epoch = optimizer.init(params), training.make_epoch(module, optimizer)
    for number in range(2):
        order = training.batches(jax.random.key(number), train.labels.size, 128)
        params, opt_state, _ = epoch(params, opt_state, train, *order)
    assert training.accuracy(module, params, test) > 95
    inputs = test.images.reshape(len(test.images), -1).astype(jnp.float32) / 255
    return params, inputs, np.asarray(test.labels)


@pytest.mark.parametrize(
    ("ranks", "least"),
    [
        ({"Dense_0": 20}, 0), ({"Dense_0": 100}, 40), ({"Dense_0": 250}, 95),
        ({"Dense_1": 5}, 50), ({"Dense_1": 9}, 95), ({"Dense_0": 250, "Dense_1": 9}, 90),
    ],
    ids=str,
)  # fmt: skip
def test_no_bound_is_violated_on_mnist(mnist, ranks, least):
    params, inputs, labels = mnist
    after = params
    for layer, rank in ranks.items():
        after = training.truncate_at(after, f"{layer}/kernel", rank)
    found = compiled(2, "relu")(params, after, inputs, labels=labels)
    change = check_bounds(found, params, after, inputs, labels)
    assert 100 * np.mean(found.unchanged) >= least
    if "Dense_0" not in ranks:
        tightness = np.median(found.change.max(axis=1)) / np.median(change.max(axis=1))
        assert tightness < 1.05


def test_the_experiment_finds_no_violation(tmp_path, capsys):
    out = tmp_path / "found.json"
    options = ["--dataset", "fashion_mnist", "--source", "sample", "--widths", "64"]
    options += ["--epochs", "1", "--ranks", "3", "30", "--out", str(out)]
    assert experiment.main(options) == 0
    found = json.loads(out.read_text())
    assert [row["kernel"] for row in found["rows"]].count("Dense_1/kernel") == 1
    assert found["rows"][-1]["kernel"] == "all"
    assert all(row["violations"] == 0 for row in found["rows"])
    assert all(row["certified"] <= row["same"] for row in found["rows"])
    assert " Dense_0 " in capsys.readouterr().out


def test_the_experiment_refuses_wrong_options():
    with pytest.raises(ValueError, match="`epochs` must be at least 1, got 0"):
        experiment.Config(epochs=0)
    with pytest.raises(ValueError, match="`ranks` must not be negative"):
        experiment.Config(ranks=(-1,))
