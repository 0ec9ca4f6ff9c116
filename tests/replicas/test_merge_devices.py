"""Replicas on several devices, in one process and in two: each device makes its own folds."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers.virtual_devices import environment, run_on_devices

TESTS = str(Path(__file__).parents[1])
CHECKS = ["same", "broken", "same", "broken", "divided"]


def start(kind, devices, processes=1, number=0, port=0):
    job = ["-m", "helpers.replicas_job", kind, *map(str, (processes, number, port))]
    paths = [TESTS, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = environment(devices) | {"PYTHONPATH": os.pathsep.join(paths)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *job], env=variables, text=True, **pipes)


def finish(jobs):
    """What each has printed; none outlives the test."""
    try:
        found = [job.communicate(timeout=400) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * len(jobs), found
    return [[line for line in out.splitlines() if line in CHECKS] for out, _ in found]


EXPLICIT = pytest.mark.skipif(not hasattr(jax.sharding, "auto_axes"), reason="came with jax 0.7")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", pytest.param("Explicit", marks=EXPLICIT)])
def test_replicas_on_eight_devices_are_merged_as_on_one(kind):
    assert finish([start(kind, 8)]) == [CHECKS]


@pytest.mark.slow
def test_replicas_on_the_devices_of_two_processes_are_merged_as_on_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [start("Auto", 2, 2, number, port) for number in range(2)]
    assert finish(jobs) == [CHECKS] * 2


SUMS = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rmtjax.spectra._select import _compiled_folds

mesh = Mesh(np.array(jax.devices()), "replica")
placed = NamedSharding(mesh, P("replica"))
changes = jax.ShapeDtypeStruct((4, 1, 96, 64), jnp.float32, sharding=placed)
text = _compiled_folds.lower(changes, mesh=mesh, names=("replica",)).compile().as_text()
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
