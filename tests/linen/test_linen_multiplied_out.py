"""Modules that run with their factors multiplied out, with a warning."""

import flax.linen as nn
import jax
import pytest
from helpers.linen_checks import assert_close, draw, EACH, grads, INPUTS, make_thin, TRAIN

import rmtjax
from rmtjax import KernelAxes, linen

MERGED = "runs with its factors multiplied out"


class Compact(nn.Module):
    """A layer of a user's own, with other layers in it."""

    @nn.compact
    def __call__(self, inputs, *, train=False, scale=1.0):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (30, 24))
        hidden = nn.BatchNorm(use_running_average=not train)(inputs @ kernel)
        hidden = nn.Dropout(0.5, deterministic=not train)(scale * hidden)
        self.sow("intermediates", "hidden", hidden)
        return nn.Dense(20)(hidden)


class Setup(nn.Module):
    """The same, written the other way."""

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (30, 24))
        self.norm = nn.BatchNorm()
        self.dropout = nn.Dropout(0.5)
        self.dense = nn.Dense(20)

    def __call__(self, inputs, *, train=False, scale=1.0):
        hidden = self.norm(inputs @ self.kernel, use_running_average=not train)
        hidden = self.dropout(scale * hidden, deterministic=not train)
        self.sow("intermediates", "hidden", hidden)
        return self.dense(hidden)


class Inside(nn.Module):
    """A layer of a user's own inside another module."""

    layer: type

    @nn.compact
    def __call__(self, inputs, **kwargs):
        return self.layer()(nn.Dense(30)(inputs), **kwargs)


class Twice(nn.Module):
    """One layer of a user's own, called twice in a call."""

    @nn.compact
    def __call__(self, inputs, **kwargs):
        layer = Compact()
        return layer(inputs, **kwargs) + layer(inputs, **kwargs)


MODULES = [Compact(), Setup(), Inside(Compact), Inside(Setup), Twice()]


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_a_layer_of_ones_own_runs_merged_and_warns(module):
    kwargs = TRAIN | {"scale": 2.0}
    thin, dense, plan = make_thin(module, INPUTS, **kwargs)
    assert {row.action for row in plan.values()} == {"factorize"}
    with pytest.warns(
        UserWarning, match=rf"(Compact|Setup) ('.+'|\(the root\)) {MERGED}"
    ) as warned:
        outputs = linen.apply(module, thin, INPUTS, **kwargs)
    assert len(warned) == 1
    # Float32; BatchNorm divides by a spread of 5 examples.
    assert_close(outputs, module.apply(dense, INPUTS, **kwargs))


def test_another_method_than_call_runs_merged_too():
    class Coder(nn.Module):
        def setup(self):
            self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (30, 24))

        def __call__(self, inputs):
            return self.decode(self.encode(inputs))

        def encode(self, inputs):
            return inputs @ self.kernel

        def decode(self, hidden):
            return hidden @ self.kernel.T

    thin, dense, _ = make_thin(Coder(), INPUTS)
    for method in ("__call__", "encode"):
        with pytest.warns(UserWarning, match=MERGED):
            outputs = linen.apply(Coder(), thin, INPUTS, method=method)
        assert_close(outputs, Coder().apply(dense, INPUTS, method=method))


def test_a_layer_of_ones_own_runs_merged_in_a_scan_with_its_gradient():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            return carry @ self.param("kernel", nn.initializers.normal(), (24, 24)), None

    module, args = nn.scan(Step, **EACH, length=4)(), (draw(5, 24), None)
    stack = lambda path, leaf: KernelAxes((1,), (2,), (0,))
    thin, dense, _ = make_thin(module, *args, axes=stack)
    with pytest.warns(UserWarning, match=MERGED):
        params, inputs, outputs = grads(linen.factorized()(module.apply), thin, args)
    wanted, wanted_inputs, wanted_outputs = grads(module.apply, dense, args)
    assert_close((inputs, outputs), (wanted_inputs, wanted_outputs))
    _, pull = jax.vjp(rmtjax.merge, thin["params"])
    assert_close(params, *pull(wanted))


def test_a_subclass_of_a_layer_is_a_layer_of_ones_own():
    class Scaled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    thin, dense, _ = make_thin(Scaled(24), INPUTS)
    with pytest.warns(UserWarning, match="Scaled"):
        outputs = linen.apply(Scaled(24), thin, INPUTS)
    assert_close(outputs, Scaled(24).apply(dense, INPUTS))


def test_a_kernel_used_the_other_way_round_is_not_factorized():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return inputs @ self.param("kernel", nn.initializers.normal(), (30, 30)).T

    axes = lambda path, leaf: KernelAxes((1,), (0,))
    thin, dense, plan = make_thin(Turned(), INPUTS, axes=axes)
    assert plan["kernel"].action == "truncate"
    assert_close(linen.apply(Turned(), thin, INPUTS), Turned().apply(dense, INPUTS))


GUESS = lambda path, leaf: KernelAxes((0, 1), (2,))  # of a plan without `axes`


def test_axes_that_were_guessed_wrong_are_merged_with_a_warning():
    module = nn.DenseGeneral((4, 6))
    thin, dense, plan = make_thin(module, INPUTS, axes=GUESS)
    assert plan["kernel"].action == "factorize"
    with pytest.warns(UserWarning, match=rf"DenseGeneral \(the root\) {MERGED}"):
        outputs = linen.apply(module, thin, INPUTS)
    assert_close(outputs, module.apply(dense, INPUTS))


def test_a_grouped_convolution_planned_by_a_guess_is_merged_with_a_warning():
    module, images = nn.Conv(24, (3,), feature_group_count=2), draw(2, 9, 16)
    thin, dense, plan = make_thin(module, images, axes=GUESS)
    assert plan["kernel"].action == "factorize"
    with pytest.warns(UserWarning, match=MERGED):
        outputs = linen.apply(module, thin, images)
    assert_close(outputs, module.apply(dense, images))
