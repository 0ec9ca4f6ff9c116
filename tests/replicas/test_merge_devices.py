"""Replicas on several devices, in one process and in two: each device makes its own folds."""

import pytest
from helpers.virtual_devices import KINDS, run_job, run_on_devices, run_two_jobs

CHECKS = ["same", "broken", "same", "broken", "divided"]
JOB = "helpers.replicas_job"


@pytest.mark.slow
def test_replicas_on_eight_devices_are_merged_as_on_one():
    assert run_job(JOB, "+".join(KINDS), 8, CHECKS) == CHECKS * len(KINDS)


@pytest.mark.slow
def test_replicas_on_the_devices_of_two_processes_are_merged_as_on_one():
    assert run_two_jobs(JOB, 2, CHECKS) == [CHECKS] * 2


SUMS = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rmtjax.spectra._fold import compiled_folds

mesh = Mesh(np.array(jax.devices()), "replica")
placed = NamedSharding(mesh, P("replica"))
changes = jax.ShapeDtypeStruct((4, 1, 96, 64), jnp.float32, sharding=placed)
text = compiled_folds.lower(changes, mesh=mesh, names=("replica",)).compile().as_text()
assert not re.search(r"all-gather|all-to-all|collective-permute", text)
moved = 0
for shapes in re.findall(r"= (.*) all-reduce(?:-start)?\\(", text):
    for sides in re.findall(r"f32\\[([\\d,]*)\\]", shapes):
        moved += np.prod([int(side) for side in sides.split(",") if side])
# The sum of the changes, the sum of the folds, and one effective rank.
assert moved == 2 * 96 * 64 + 1, moved
print("sums")
"""


def test_two_sums_of_the_size_of_a_kernel_are_all_that_is_communicated():
    assert run_on_devices(4, SUMS) == "sums"
