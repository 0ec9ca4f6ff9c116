"""Stacks of matrices, decomposed one by one on CPU."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmtjax import Factors
from rmtjax.spectra._factors import svd
from rmtjax.spectra._spectrum import each

PRUNE = """
import jax, rmtjax
axes = lambda path, leaf: rmtjax.KernelAxes((1,), (2,), (0,))
draw = lambda seed: jax.random.normal(jax.random.key(seed), (2, 64, 64))
params = {f"layer_{seed}": {"kernel": draw(seed)} for seed in range(7)}
prune = rmtjax.prune_spectrum(1, rule=rmtjax.ranks.fixed(8), axes=axes)
state, step = prune.init(params), jax.jit(prune.update)
for _ in range(60):
    updates, state = step(params, state, params)
    jax.block_until_ready(updates)
print(*(int(rank) for rank in state.ranks.values()))
"""


def test_several_stacks_in_a_program_do_not_wait_for_one_another():
    # Decomposed at once they hang within some ten steps, on two cores and jax 0.10.2.
    command = [sys.executable, "-c", PRUNE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.split() == ["8"] * 7


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_each_matrix_is_decomposed_as_alone(size, compiled):
    stack = jax.random.normal(jax.random.key(0), (size, 6, 4))
    run = jax.jit(svd) if compiled else svd
    for found, matrix in zip(run(stack)[1], stack, strict=True):
        wanted = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)  # float32


def test_each_takes_trees_and_has_a_gradient():
    stack = Factors(jnp.ones((3, 6, 2)), jnp.ones((3, 2, 4)))
    product = lambda stack: each(lambda one: one.left @ one.right, stack)
    np.testing.assert_array_equal(product(stack), np.full((3, 6, 4), 2.0))
    gradient = jax.grad(lambda stack: product(stack).sum())(stack)
    np.testing.assert_array_equal(gradient.left, np.full((3, 6, 2), 4.0))
