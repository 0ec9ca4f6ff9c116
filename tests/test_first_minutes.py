"""The first five minutes: progress, words, another rule, and the mistakes that people make."""

import inspect
import logging
import pickle
import warnings
from typing import Any

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from rmtjax import checkpoint, ranks
from rmtjax.planning import _measure

NOISE = np.random.default_rng(0).standard_normal((2, 60, 80), np.float32)
NOISE[:, :2] *= 20
PARAMS = {f"layers_{i}": {"kernel": NOISE[i]} for i in range(2)}


def test_progress_and_words_are_quiet_by_default_and_come_when_asked(capsys, caplog):
    plan = rmtjax.plan(PARAMS)
    rmtjax.factorize(PARAMS, plan)
    assert capsys.readouterr() == ("", "")
    seen = []
    with caplog.at_level(logging.INFO, "rmtjax"):
        rmtjax.plan(PARAMS, progress=lambda *step: seen.append(step))
        rmtjax.factorize(PARAMS, plan, progress=True)
    assert seen == [(0, 2, "layers_0/kernel")]  # small kernels are measured together
    assert "[2/2] layers_1/kernel" in capsys.readouterr().err
    words = [record.getMessage().partition(" took ")[0] for record in caplog.records]
    assert words == ["plan", "factorize"]


def test_another_rule_compiles_nothing_and_a_report_plans_again():
    report = rmtjax.analyze(PARAMS)
    judge: Any = _measure._judge
    compiled = judge._cache_size()
    for rule in (ranks.fixed(32), ranks.energy(0.9), ranks.bema(level=0.1), ranks.size(0.4)):
        assert report.replan(rule).rows == rmtjax.analyze(PARAMS, rule=rule).rows
    held = np.cumsum(np.linalg.svd(NOISE[0], compute_uv=False) ** 2)
    ranks_of = [report.replan(rule).rows[0].rank for rule in (ranks.fixed(32), ranks.energy(0.97))]
    assert ranks_of == [32, 1 + int((held < 0.97 * held[-1]).sum())]
    assert judge._cache_size() == compiled
    with pytest.raises(ValueError, match="`replan` needs the spectra of a report of `analyze`"):
        rmtjax.Report(report.plan).replan(ranks.fixed(2))


def test_dir_and_help_are_short():
    assert dir(rmtjax.linen) == ["KernelTable", "apply", "factorized", "kernel_axes", "moments"]
    assert dir(rmtjax) == sorted(rmtjax.__all__)
    for name in rmtjax.__all__:
        value = getattr(rmtjax, name)
        shown = str(inspect.signature(value)) if inspect.isfunction(value) else ""
        assert not [word for word in ("Union", "jaxtyping", "jaxlib", "rmtjax.") if word in shown]
    assert str(inspect.signature(rmtjax.truncate_matrix)) == (
        "(matrix: Array, rank: Array | int) -> Array"
    )


def public(module, name="rmtjax"):
    """Yields the dotted names of a module and of those in it, and what they name."""
    for part in module.__all__:
        value, path = getattr(module, part), f"{name}.{part}"
        if inspect.ismodule(value):
            yield from public(value, path)
        elif inspect.isclass(value) or inspect.isroutine(value):
            yield path, value


def test_every_public_name_has_an_example():
    names = dict(public(rmtjax))
    assert {"rmtjax.ranks.bema", "rmtjax.plots.esd", "rmtjax.linen.KernelTable"} <= names.keys()
    assert not [name for name, value in names.items() if ">>> " not in (value.__doc__ or "")]


def test_a_plan_under_jit_says_where_to_make_it():
    with pytest.raises(TypeError, match="make the plan outside `jit`"):
        jax.jit(rmtjax.plan)(PARAMS)


def test_moments_under_a_transformation_say_where_to_collect_them():
    x, model = jnp.ones((2, 60)), nnx.Linear(60, 80, use_bias=False, rngs=nnx.Rngs(0))
    moments = lambda x: rmtjax.linen.moments(DENSE, {"params": {"kernel": NOISE[0]}}, [x])
    runs = [jax.jit(moments), jax.vmap(moments)]
    for run in (*runs, jax.jit(lambda x: rmtjax.nnx.moments(model, [x]))):
        with pytest.raises(TypeError, match="collect them outside `jit`, `grad` and `vmap`"):
            run(x)


def test_a_module_in_the_place_of_its_parameters_says_what_to_give():
    for run in (rmtjax.plan, rmtjax.analyze):
        with pytest.raises(TypeError, match=r'got the model Dense: give .*variables\["params"\]'):
            run(DENSE)


def test_a_pickle_says_how_to_save_it(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    words = r"it is a pickle, .* `safetensors.torch.save_file`, .* `rmtjax.checkpoint.save`"
    with pytest.raises(ValueError, match=words):
        checkpoint.analyze_file(path)
    np.save(tmp_path / "x.npy", NOISE)
    with pytest.raises(ValueError, match=r"x.npy': it is an array in a .npy file, and has no nam"):
        checkpoint.load_moments(tmp_path / "x.npy")
    path.write_bytes(b"PK\x03\x04" + bytes(100) + b"\x00" * 8)
    with pytest.raises(ValueError, match=r"`torch.save` .* `safetensors.torch.save_file`"):
        checkpoint.restore(path)


THIN = {"kernel": rmtjax.factorize_matrix(NOISE[0], 4)}
DENSE = nn.Dense(80, use_bias=False)


def test_a_module_on_thin_parameters_is_right_and_says_how_to_save_time():
    inputs = jnp.ones((2, 60))
    expected = np.ones((2, 60)) @ np.asarray(THIN["kernel"].left, np.float64)
    expected = expected @ np.asarray(THIN["kernel"].right, np.float64)
    for run in (DENSE.apply, jax.jit(DENSE.apply)):
        with pytest.warns(UserWarning, match=r"saves no time. Call `rmtjax.linen.apply\(module"):
            outputs = run({"params": THIN}, inputs)
        # Rounding of a sum over 60 inputs and 4 directions in float32.
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rmtjax.linen.apply(DENSE, {"params": THIN}, inputs)


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_a_module_that_rewrites_factors_says_to_leave_them_out(wrapper):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            options = {"update_stats": False} if wrapper is nn.SpectralNorm else {}
            return wrapper(nn.Dense(80, use_bias=False))(inputs, **options)

    variables = Wrapped().init(jax.random.key(0), jnp.ones((2, 60)))
    variables = {**variables, "params": {**variables["params"], "Dense_0": THIN}}
    with pytest.raises(ValueError, match=r"'kernel' holds thin factors. Leave this kernel out"):
        rmtjax.linen.apply(Wrapped(), variables, jnp.ones((2, 60)))


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.MultiSteps(optax.lion(0.1), 2)])
def test_an_old_optimizer_state_names_the_remedy(optimizer):
    dense = {"kernel": jnp.asarray(NOISE[0])}
    for update in (optimizer.update, jax.jit(optimizer.update)):
        for old, new in ((dense, THIN), (THIN, dense)):
            words = (
                r"`rmtjax.transfer_opt_state\(opt_state, params, thin\)`, or call `optimizer.init"
            )
            with pytest.raises((ValueError, TypeError), match=words):
                update(new, optimizer.init(old), new)


def test_factors_take_no_arithmetic_of_tuples():
    factors = THIN["kernel"]
    for attempt in (
        lambda: factors * 2,
        lambda: factors + factors,
        lambda: jnp.ones((2, 60)) @ factors,
    ):
        with pytest.raises(TypeError, match="arithmetic needs arrays, got Factors"):
            attempt()


def test_functions_of_flax_on_boxes_take_thin_parameters():
    with pytest.warns(UserWarning, match="multiplied out"):
        assert nn.unbox(THIN)["kernel"].shape == (60, 80)
    replicated = jax.sharding.PartitionSpec()
    assert nn.get_partition_spec(THIN)["kernel"] == (replicated, replicated)
    mesh = jax.make_mesh((1,), ("model",))
    assert nn.get_sharding(THIN, mesh)["kernel"].left.mesh == mesh
