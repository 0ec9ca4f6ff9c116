"""Einsums, recurrent cells, boxed parameters and registered layers, factorized."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers.linen_checks import (
    assert_close,
    check,
    draw,
    Fixed,
    grads,
    KEY,
    make_thin,
    make_variables,
)
from helpers.slow import slow_except

import rmtjax
from rmtjax import Factors, KernelAxes, linen


class CalledWithEquation(nn.Module):
    """Gives its einsum the equation when it calls it."""

    @nn.compact
    def __call__(self, inputs):
        return nn.Einsum((30, 4, 6), None)(inputs, "...i,iho->...ho")


def run_of(cell):
    return nn.RNN(cell), draw(2, 3, 20)


CASES = {
    "Einsum": (nn.Einsum((30, 4, 6), "bi,iho->bho"), draw(5, 30)),
    "Einsum, two inputs": (nn.Einsum((6, 5, 24), "b t h i, h i o -> b t o"), draw(2, 3, 6, 5)),
    "Einsum, outputs first": (nn.Einsum((30, 24), "...i,io->o...", use_bias=False), draw(5, 30)),
    "Einsum, stack": (nn.Einsum((3, 30, 24), "bei,eio->beo"), draw(5, 3, 30)),
    "Einsum, equation in the call": (CalledWithEquation(), draw(5, 30)),
    "LSTM": run_of(nn.LSTMCell(24)),
    "LSTM, optimized": run_of(nn.OptimizedLSTMCell(24)),
    "GRU": run_of(nn.GRUCell(24)),
    "MGU": run_of(nn.MGUCell(24)),
    "ConvLSTM": (nn.RNN(nn.ConvLSTMCell(6, (3,)), return_carry=True), draw(2, 3, 7, 8)),
}


FAST = ("Einsum", "Einsum, stack", "LSTM, optimized")


@pytest.mark.parametrize("name", slow_except(FAST, CASES))
def test_outputs_and_gradients_are_those_of_the_truncated_tree(name):
    check(*CASES[name])


def test_the_axes_of_einsums_follow_their_equations():
    module = nn.Einsum((6, 24, 5), "bhi,hoi->bo")
    variables = make_variables(module, draw(2, 6, 5))
    axes = linen.kernel_axes(module, variables, draw(2, 6, 5))
    assert axes == {"kernel": KernelAxes((0, 2), (1,))}
    plan = rmtjax.plan(variables["params"], rule=Fixed(3), axes=axes, min_size=1, multiple=1)
    assert "another order" in plan["kernel"].reason  # truncated in place, not thinner


@pytest.mark.parametrize("equation", ["bi,ii->bi", "bi,ij->b"])
def test_einsums_that_are_no_product_are_left_alone(equation):
    module = nn.Einsum((30, 30), equation, use_bias=False)
    variables = make_variables(module, draw(5, 30))
    assert linen.kernel_axes(module, variables, draw(5, 30)) == {"kernel": None}


def test_a_local_convolution_is_left_alone():
    module, inputs = nn.ConvLocal(24, (3,)), draw(2, 9, 8)
    variables = make_variables(module, inputs)
    assert linen.kernel_axes(module, variables, inputs) == {"kernel": None}


class Mixer(nn.Module):
    """Two kernels under names of its own, one of them read both ways, and a thing or two more."""

    scale: float = 2.0

    @nn.compact
    def __call__(self, inputs, shift=0.0, *, sign=1):
        weight = self.param("weight", nn.initializers.normal(), (30, 24))
        gate = self.param("gate", nn.initializers.normal(), (30, 24))
        hidden = jax.nn.silu(inputs @ weight) * jnp.einsum("...i,io->...o", inputs, gate)
        return sign * self.scale * (hidden @ weight.T) + nn.Dense(30)(inputs) + shift


class Patches(nn.Module):
    """A convolution by hand."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("filter", nn.initializers.normal(), (3, 8, 24))
        dims = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(inputs, kernel, (2,), "SAME", dimension_numbers=dims)


class Noisy(nn.Module):
    """Writes what it has seen, and draws."""

    @nn.compact
    def __call__(self, inputs, train=False):
        outputs = inputs @ self.param("weight", nn.initializers.normal(), (30, 24))
        outputs = nn.BatchNorm(use_running_average=not train)(outputs)
        self.sow("seen", "outputs", outputs)
        return nn.Dropout(0.5, deterministic=not train)(outputs)


class Squared(nn.Module):
    """Does more with its kernel than to multiply by it."""

    @nn.compact
    def __call__(self, inputs):
        return inputs @ self.param("weight", nn.initializers.normal(), (30, 24)) ** 2


AXES = KernelAxes((0,), (1,))
rmtjax.register_layer(Mixer, {"weight": AXES, "gate": AXES})
rmtjax.register_layer(Patches, {"filter": KernelAxes((0, 1), (2,))})
rmtjax.register_layer(Noisy, {"weight": AXES})
rmtjax.register_layer(Squared, {"weight": AXES})


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Mixer(), draw(5, 30)),
        (nn.Sequential([nn.Dense(30), Mixer(), nn.tanh]), draw(2, 5, 20)),
        (Patches(), draw(2, 9, 8)),
        (Noisy(), draw(5, 30)),
    ],
    ids=["itself", "inside", "convolution", "state"],
)
def test_a_registered_layer_runs_thin(module, inputs):
    check(module, inputs)


def test_a_registered_layer_is_cheaper_and_takes_all_arguments():
    module, inputs = Mixer(), draw(64, 30)
    thin, dense, _ = make_thin(module, inputs)
    cost = lambda variables: (
        jax.jit(lambda v, x: linen.apply(module, v, x))
        .lower(variables, inputs)
        .compile()
        .cost_analysis()["flops"]
    )
    assert cost(thin) < 0.5 * cost(dense)
    outputs = linen.apply(module, thin, inputs, 3.0, sign=-1)
    assert_close(outputs, module.apply(dense, inputs, 3.0, sign=-1))


class Inside(nn.Module):
    """Calls a registered layer twice, and holds what it says besides."""

    @nn.compact
    def __call__(self, inputs, train=False):
        layer = Noisy()
        outputs = layer(inputs, train=train) + 2 * layer(inputs, train=train)
        return nn.Dense(20)(outputs), "as it is"


@pytest.mark.parametrize("module", [Noisy(), Inside()], ids=["itself", "inside, twice"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_registered_layer_draws_and_writes_as_it_would_dense(module, compiled):
    thin, dense, _ = make_thin(module, draw(5, 30))
    how = {"train": True, "mutable": ["batch_stats", "seen"], "rngs": {"dropout": KEY}}
    words = []

    def run(apply, variables):
        outputs, written = apply(variables, draw(5, 30), **how)
        outputs, *said = outputs if isinstance(outputs, tuple) else (outputs,)
        words.append(said)
        return outputs, written

    thinly = lambda variables: run(lambda *a, **k: linen.apply(module, *a, **k), variables)
    found = (jax.jit(thinly) if compiled else thinly)(thin)
    assert "seen" in found[1]
    # BatchNorm divides by a spread of 5 examples.
    assert_close(found, run(module.apply, dense), 1e-4)
    assert words[0] == words[1]


def test_a_kernel_stored_the_other_way_round_joins_too():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return inputs @ self.param("weight", nn.initializers.normal(), (24, 30)).T

    rmtjax.register_layer(Turned, {"weight": KernelAxes((1,), (0,))})
    check(Turned(), draw(5, 30))


def test_a_registered_layer_that_does_more_with_its_kernel_warns():
    thin, dense, _ = make_thin(Squared(), draw(5, 30))
    with pytest.warns(
        UserWarning, match=r"Squared \(the root\) runs with its factors multiplied out"
    ):
        outputs = linen.apply(Squared(), thin, draw(5, 30))
    assert_close(outputs, Squared().apply(dense, draw(5, 30)))


def test_a_subclass_of_a_registered_layer_is_another():
    class Other(Mixer):
        pass

    variables = make_variables(Other(), draw(5, 30))
    assert set(linen.kernel_axes(Other(), variables, draw(5, 30))) == {"Dense_0/kernel"}


@pytest.mark.parametrize(
    ("layer", "kernels", "message"),
    [
        (Mixer(), {"weight": AXES}, "`?layer"),
        (Mixer, {}, "`kernels` must name at least one"),
        (Mixer, {"weight": ((0,), (1,))}, "kernels.*weight"),
        (Mixer, {"weight": KernelAxes((0,), (0,))}, "name each axis of 'weight' once"),
        (Mixer, {"weight": KernelAxes((0, 1), ())}, "have inputs and outputs"),
    ],
)
def test_register_layer_refuses(layer, kernels, message):
    # Under the type checker of the tests its message comes first.
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        rmtjax.register_layer(layer, kernels)


@pytest.mark.parametrize("kernels", [AXES, "weight", None])
def test_register_layer_wants_names(kernels, monkeypatch):
    # As users have it: the type checker of the tests would speak first, in its own words.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="`kernels` must map names of parameters to their"):
        rmtjax.register_layer(Mixer, kernels)


def test_a_misspelt_name_raises_when_the_layer_is_met():
    class Misspelt(Mixer):
        pass

    rmtjax.register_layer(Misspelt, {"wieght": AXES, "gate": AXES})
    module = nn.Sequential([nn.Dense(30), Misspelt()])
    variables = make_variables(module, draw(5, 20))
    words = r"a kernel 'wieght' for `Misspelt`, whose parameters are 'gate', 'weight'\. Register"
    with pytest.raises(ValueError, match=words):
        linen.kernel_axes(module, variables, draw(5, 20))


@pytest.mark.parametrize(
    ("layer", "names", "inputs"),
    [(nn.Dense, ("x", "y"), draw(5, 30)), (nn.Conv, (None, "x", "y"), draw(2, 9, 8))],
    ids=["Dense", "Conv"],
)
def test_boxed_parameters_are_found_truncated_factorized_and_run(layer, names, inputs):
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:1], (1, 1)), ("x", "y"))
    box = nn.with_partitioning(nn.initializers.normal(), names, mesh=mesh)
    window = {} if layer is nn.Dense else {"kernel_size": (3,)}
    module = nn.Sequential([layer(24, kernel_init=box, **window), nn.Dense(20)])
    variables = make_variables(module, inputs)
    axes = linen.kernel_axes(module, variables, inputs)
    plan = rmtjax.plan(variables["params"], rule=Fixed(3), axes=axes, min_size=1, multiple=1)
    assert set(plan) == {"layers_0/kernel", "layers_1/kernel"}
    lower = {"params": rmtjax.truncate(variables["params"], plan)}
    assert isinstance(lower["params"]["layers_0"]["kernel"], nn.Partitioned)
    thin = {"params": rmtjax.factorize(variables["params"], plan)}
    # What its names tell of the axes of a kernel is not true of two factors.
    assert isinstance(thin["params"]["layers_0"]["kernel"], Factors)
    jax.device_put(thin, nn.get_sharding(thin, mesh))
    outputs = jax.jit(lambda v: linen.apply(module, v, inputs))(thin)
    assert_close(outputs, module.apply(lower, inputs))


def test_axes_by_path_choose_and_name_kernels():
    params = {"a": {"weight": draw(30, 24)}, "b": {"kernel": draw(30, 20)}, "c": draw(30, 10)}
    plan = rmtjax.plan(params, rule=Fixed(3), axes={"a/weight": AXES}, min_size=1, multiple=1)
    assert set(plan) == {"a/weight", "b/kernel", "c"}
    assert plan["c"].action == "keep"  # it may be a kernel, and nothing says so
    assert plan["a/weight"].axes == plan["b/kernel"].axes == AXES
    only = rmtjax.plan(params, rule=Fixed(3), axes={"c": AXES}, where=lambda p, _: p == "c")
    assert set(only) == {"c"}


def test_a_gradient_flows_through_the_factors_of_a_registered_layer():
    thin, _, _ = make_thin(Mixer(), draw(5, 30))
    params, _, _ = grads(linen.factorized()(Mixer().apply), thin, (draw(5, 30),))
    assert isinstance(params["weight"], Factors)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(params))
