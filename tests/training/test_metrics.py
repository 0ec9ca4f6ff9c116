"""Metrics of the pruning transform: right numbers, wherever its state lies."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.nnx_checks import update
from helpers.slow import slow_except

import rmtjax

PAGE = (Path(__file__).parents[2] / "docs" / "training_live.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
KINDS = set(re.findall(r"`(\w+)/PATH`", PAGE.partition("rmtjax.agree")[0]))


noise = lambda seed, shape=(60, 90): np.random.default_rng(seed).standard_normal(shape, np.float32)


def spiked(seed, count):
    """Noise with so many directions of signal."""
    return jnp.asarray(noise(seed) + noise(seed + 50, (60, count)) @ noise(seed + 70, (count, 90)))


PARAMS = {"a": {"kernel": spiked(0, 2)}, "b": {"kernel": spiked(1, 5)}, "bias": jnp.zeros(3)}
PRUNE = rmtjax.prune_spectrum(every=1, max_removed=1.0)


def after_a_step(optimizer, params=PARAMS):
    """The state after an update by nothing, so that the kernels land where they are."""
    return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[1]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_numbers_are_those_of_a_fit_of_the_kernel():
    found = rmtjax.metrics(after_a_step(PRUNE))
    assert len(found) == 20
    for path, count in (("a/kernel", 2), ("b/kernel", 5)):
        assert found[f"rank/{path}"] == found[f"signal/{path}"] == count
        fit = rmtjax.fit_bema(rmtjax.spectrum(PARAMS[path[0]]["kernel"]))
        # The transform's spectrum is by a singular value decomposition.
        np.testing.assert_allclose(found[f"threshold/{path}"], fit.threshold, rtol=1e-5)
        np.testing.assert_allclose(found[f"distance/{path}"], fit.distance, atol=1e-4)


def test_before_the_first_step_ranks_are_full_and_nothing_else_is_known():
    found = rmtjax.metrics(PRUNE.init(PARAMS))
    assert found["rank/a/kernel"] == 60
    assert found["signal/a/kernel"] == 0
    assert found["threshold/a/kernel"] == 0
    assert found["distance/a/kernel"] == 1


def by_layer(params):
    return {name: jax.tree.map(lambda _, name=name: name, params[name]) for name in params}


NESTED = {
    "chain": optax.chain(optax.adam(0.1), optax.chain(optax.identity(), PRUNE)),
    "masked": optax.masked(PRUNE, {"a": True, "b": True, "bias": False}),
    "MultiSteps": optax.MultiSteps(PRUNE, 1).gradient_transformation(),
    "inject": optax.inject_hyperparams(
        rmtjax.prune_spectrum, static_args=("min_size", "rule", "where", "axes")
    )(every=1, max_removed=1.0),
    "partition": optax.partition(
        {"a": PRUNE, "b": optax.chain(optax.sgd(0.1), PRUNE), "bias": optax.sgd(0.1)}, by_layer
    ),
    "apply_if_finite": optax.apply_if_finite(PRUNE, 5),
}


@pytest.mark.parametrize("nesting", slow_except(("chain", "MultiSteps"), NESTED))
def test_the_state_is_found_wherever_it_lies(nesting):
    assert_same(rmtjax.metrics(after_a_step(NESTED[nesting])), rmtjax.metrics(after_a_step(PRUNE)))


LEFT = {
    "nothing": ({"kernel": noise(3)}, {}, 2, None),
    "unsettled": ({"kernel": spiked(1, 5)}, {"settled": 0.2}, 3, "its signal had not settled; "),
    "squares": ({"kernel": spiked(1, 5)}, {"max_removed": 0.01}, 4, "the cut takes too many "),
}


@pytest.mark.parametrize(("params", "options", "code", "words"), LEFT.values(), ids=LEFT)
def test_a_kernel_that_is_left_alone_says_why(params, options, code, words):
    state = after_a_step(rmtjax.prune_spectrum(every=1, **options), params)
    assert rmtjax.metrics(state)["reason/kernel"] == code
    plan = rmtjax.plan(params, fits=rmtjax.noise_levels(state))
    expected = "kept: no signal stands out of the noise"
    if words is not None:
        expected = f"kept: pruning left it alone while training: {words}"
    assert plan["kernel"].reason.startswith(expected)


@pytest.mark.slow
def test_works_under_jit_and_scan():
    state = after_a_step(PRUNE)
    assert_same(jax.jit(rmtjax.metrics)(state), rmtjax.metrics(state))

    def step(state, _):
        _, state = PRUNE.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
        return state, rmtjax.metrics(state)

    _, found = jax.lax.scan(step, PRUNE.init(PARAMS), length=3)
    assert found["rank/b/kernel"].tolist() == [5, 5, 5]


@pytest.mark.slow
def test_each_matrix_of_a_stack_has_its_own_fit():
    stack = {"layers": {"kernel": jnp.stack([PARAMS[name]["kernel"] for name in "ab"])}}
    axes = lambda path, leaf: rmtjax.KernelAxes((1,), (2,), batch=(0,))
    found = rmtjax.metrics(
        after_a_step(rmtjax.prune_spectrum(every=1, max_removed=1.0, axes=axes), stack)
    )
    assert found.pop("rank/layers/kernel") == 5  # one rank, that of the richest
    assert found.pop("signal/layers/kernel") == 5
    assert found.pop("refused/layers/kernel") == 0
    assert found.pop("cost/layers/kernel") == 0
    assert found.pop("landed/layers/kernel")
    assert found.pop("reason/layers/kernel") == 0
    # Of the sum of the squares of both, what lies beyond that rank.
    values = np.linalg.svd(np.asarray(stack["layers"]["kernel"]), compute_uv=False) ** 2
    lost = values[:, 5:].sum() / values.sum()
    np.testing.assert_allclose(found.pop("removed/layers/kernel"), lost, rtol=1e-4)
    np.testing.assert_allclose(found.pop("taken/layers/kernel"), lost, rtol=1e-4)
    alone = rmtjax.metrics(after_a_step(PRUNE))
    for index, path in enumerate(("a/kernel", "b/kernel")):
        for kind in ("threshold", "distance"):
            np.testing.assert_allclose(
                found.pop(f"{kind}/layers/kernel/{index}"), alone[f"{kind}/{path}"], atol=1e-4
            )
    assert not found


def test_optimizer_of_nnx():
    model = nnx.Linear(60, 90, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(jnp.asarray(spiked(0, 2)))
    optimizer = nnx.Optimizer(model, PRUNE, wrt=nnx.Param)
    update(optimizer, model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    found = rmtjax.metrics(optimizer.opt_state)
    assert {name.partition("/")[0] for name in found} == KINDS
    assert float(found["rank/kernel"]) == 2.0


def test_the_state_outlives_factors():
    optimizer = optax.chain(optax.trace(0.9), PRUNE)
    state = after_a_step(optimizer)
    thin = rmtjax.factorize(PARAMS, rmtjax.plan(PARAMS))
    assert_same(
        rmtjax.metrics(rmtjax.transfer_opt_state(state, PARAMS, thin)), rmtjax.metrics(state)
    )


@pytest.mark.filterwarnings("ignore:.*will never change a kernel")
def test_a_state_without_kernels_has_no_numbers():
    assert rmtjax.metrics(PRUNE.init({"bias": jnp.zeros(3)})) == {}


def test_what_is_no_state_or_two_of_one_path_is_refused():
    with pytest.raises(ValueError, match=r"`opt_state` has no state of `rmtjax.prune_spectrum`"):
        rmtjax.metrics(optax.adam(0.1).init(PARAMS))
    state = PRUNE.init(PARAMS)
    with pytest.raises(ValueError, match=r"`opt_state` has two states for 'a/kernel'"):
        rmtjax.metrics({"generator": state, "critic": state})


def test_a_model_of_linen_compiles_once():
    module = nn.Dense(60)
    params = module.init(jax.random.key(0), jnp.ones((1, 80)))["params"]
    optimizer = optax.chain(optax.adam(0.1), rmtjax.prune_spectrum(every=2, max_removed=1.0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state, rmtjax.metrics(state)

    for _ in range(4):
        params, state, found = step(params, state)
    assert found.keys() == {f"{kind}/kernel" for kind in KINDS}
    assert step._cache_size() == 1


def test_examples_print_what_stands_under_them(tmp_path, monkeypatch):
    """All in one folder: the later ones read the log that the first has written."""
    monkeypatch.chdir(tmp_path)
    for code, printed in EXAMPLES:
        with redirect_stdout(output := StringIO()):
            exec(compile(code, "training_live.md", "exec"), {})
        assert output.getvalue() == printed
    refuse = lambda constant: pytest.fail(f"{constant} is no JSON")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [record["step"] for record in records] == [25, 50, 75, 100, 125, 150]
    assert records[0]["rank/Dense_0/kernel"] == 60


def test_noise_levels_are_read_under_nnx_jit():
    kernel = 2.0 + jax.random.normal(jax.random.key(1), (80, 60))
    model = nnx.Linear(80, 60, rngs=nnx.Rngs(0), use_bias=False)
    model.kernel[...] = kernel
    optimizer = nnx.Optimizer(model, rmtjax.prune_spectrum(every=1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    levels = rmtjax.noise_levels(optimizer.opt_state)["kernel"]
    read = nnx.jit(lambda opt_state: rmtjax.noise_levels(opt_state)["kernel"].threshold)
    assert read(optimizer.opt_state) == levels.threshold > 0
