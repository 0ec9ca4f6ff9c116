"""Axes of the kernels of linen modules, under every lifting."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.linen_checks import (
    assert_close,
    Block,
    DENSE,
    draw,
    EACH,
    INPUTS,
    make_thin,
    make_variables,
)

from rmtjax import KernelAxes, linen

STACKS = {
    "scan": (nn.scan(Block, **EACH, length=4)(), (draw(5, 24), None), ((1,), (2,), (0,))),
    "scan, last axis": (
        nn.scan(Block, variable_axes={"params": -1}, split_rngs={"params": True}, length=4)(),
        (draw(5, 24), None),
        ((0,), (1,), (2,)),
    ),
    "vmap of scan": (
        nn.vmap(nn.scan(Block, **EACH, length=4), in_axes=(0, None), **EACH)(),
        (draw(3, 5, 24), None),
        ((2,), (3,), (0, 1)),
    ),
    "vmap, as many as inputs": (
        nn.vmap(nn.Dense, **EACH)(24),
        (draw(30, 5, 30),),
        ((1,), (2,), (0,)),
    ),
    "vmap, several outputs": (
        nn.vmap(nn.DenseGeneral, **EACH)((4, 6)),
        (draw(3, 5, 30),),
        ((1,), (2, 3), (0,)),
    ),
    "vmap, batch": (
        nn.vmap(nn.DenseGeneral, **EACH)(24, batch_dims=(0,)),
        (draw(3, 2, 5, 30),),
        ((2,), (3,), (0, 1)),
    ),
    "shared": (
        nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(24),
        (draw(3, 5, 30),),
        ((0,), (1,), ()),
    ),
    "remat": (nn.remat(nn.Dense)(24), (draw(5, 30),), ((0,), (1,), ())),
}


@pytest.mark.parametrize(("module", "args", "expected"), STACKS.values(), ids=STACKS.keys())
def test_the_axes_of_lifted_kernels_are_found_and_the_tree_runs(module, args, expected):
    thin, dense, plan = make_thin(module, *args)
    (row,) = plan.values()
    assert row.axes == KernelAxes(*expected)
    assert_close(linen.apply(module, thin, *args), module.apply(dense, *args))


def test_convolutions_that_are_no_matrix_are_kept_with_a_reason():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, images):
            hidden = nn.Conv(24, (3,), feature_group_count=2)(images)
            hidden = nn.Conv(24, (3,), mask=np.ones((3, 24, 24), np.float32))(hidden)
            return nn.ConvTranspose(8, (3,), transpose_kernel=True)(hidden)

    images = draw(2, 9, 8)
    thin, dense, plan = make_thin(Grouped(), images)
    assert {path: row.reason for path, row in plan.items()} == {
        "Conv_0/kernel": "kept: no matrix (shape (3, 4, 24)), unless `axes` says how it is one",
        "Conv_1/kernel": "kept: no matrix (shape (3, 24, 24)), unless `axes` says how it is one",
        "ConvTranspose_0/kernel": (
            "kept: no matrix (shape (3, 8, 24)), unless `axes` says how it is one"
        ),
    }
    assert all(row.axes is None for row in plan.values())
    np.testing.assert_array_equal(
        linen.apply(Grouped(), thin, images), Grouped().apply(dense, images)
    )


def test_kernel_axes_computes_nothing_and_guesses_what_it_does_not_know():
    calls = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            jax.debug.callback(lambda: calls.append("ran"))
            kernel = self.param("kernel", nn.initializers.normal(), (30, 4, 6))
            return nn.Dense(24)(jnp.tensordot(inputs, kernel, 1).reshape(5, 24))

    variables = make_variables(Counting(), INPUTS)
    axes = linen.kernel_axes(Counting(), variables, INPUTS)
    jax.effects_barrier()
    assert not calls
    params = variables["params"]
    assert axes("Dense_0/kernel", params["Dense_0"]["kernel"]) == KernelAxes((0,), (1,))
    assert axes("kernel", params["kernel"]) is None
    assert axes("elsewhere/query/kernel", params["kernel"]) is None  # it may be a stack


def test_kernel_axes_of_another_tree_are_refused():
    axes = linen.kernel_axes(DENSE, make_variables(DENSE, INPUTS), INPUTS)
    with pytest.raises(ValueError, match=r"no axes of \(29, 24\) can be taken away"):
        axes("kernel", np.ones((29, 24), np.float32))
