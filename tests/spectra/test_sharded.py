"""Trees on several devices, in one process and in two; devices must be there from the start."""

import json

import numpy as np
import pytest
from helpers.virtual_devices import KINDS, run_job, run_on_devices, run_two_jobs

CHECKS = [
    "reports",
    "truncation",
    "cuts",
    "training",
    "shares",
    "certificate",
    "broken",
    "meshes",
    "large",
]
JOB = "helpers.devices_job"


@pytest.mark.slow
def test_a_tree_on_several_devices_is_as_on_one():
    assert run_job(JOB, "+".join(KINDS), 8, CHECKS) == CHECKS * len(KINDS)


@pytest.mark.slow
def test_a_tree_on_the_devices_of_two_processes_is_as_on_one():
    assert run_two_jobs(JOB, 2, CHECKS) == [CHECKS] * 2


QUICK = """
import jax, numpy as np, rmtjax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.reshape(jax.devices(), (2, 2)), ("data", "model"))
kernel = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
kernel[:, :2] += 3
placed = jax.device_put(kernel, NamedSharding(mesh, P("data", "model")))
wanted, divided = (rmtjax.plan({"kernel": leaf}, multiple=1) for leaf in (kernel, placed))
assert str(divided) == str(wanted)
assert divided["kernel"].action == "factorize"
lower = rmtjax.truncate({"kernel": placed}, wanted)["kernel"]
assert lower.sharding == placed.sharding
expected = rmtjax.truncate({"kernel": kernel}, wanted)["kernel"]
# Vectors are found in float64 in both ways and multiplied in float32.
np.testing.assert_allclose(lower, expected, rtol=0, atol=1e-4)
print("divided")
"""


def test_a_divided_kernel_is_planned_and_truncated_as_a_complete_one():
    assert run_on_devices(4, QUICK) == "divided"


ROOM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rmtjax import KernelAxes
from rmtjax.spectra._sharded import _gram, _x64

mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("data", "model"))
dense, conv = KernelAxes((0,), (1,)), KernelAxes((0, 1, 2), (3,))
stack, heads = KernelAxes((1,), (2,), (0,)), KernelAxes((0,), (1, 2))
stacks = KernelAxes((2,), (3,), (0, 1))
for axes, shape, spec in (
    (dense, (8192, 256), P(("data", "model"))),
    (dense, (8192, 256), P(None, "model")),
    (dense, (8188, 256), P(None, "model")),
    (dense, (252, 8190), P("model", "data")),
    (heads, (8190, 4, 60), P("data", "model")),
    (heads, (8188, 6, 60), P(None, None, "model")),
    (stack, (8, 2046, 252), P(None, "data", "model")),
    (stacks, (4, 8, 2048, 128), P("model")),
    (stacks, (4, 8, 2048, 128), P(None, "model")),
    (stacks, (4, 8, 2048, 128), P("model", "data")),
    (conv, (3, 3, 1024, 256), P(None, None, "model")),
    (conv, (3, 3, 1024, 256), P(None, None, "data", "model")),
    (stack, (8, 2048, 256), P("data", None, "model")),
):
    sharding = NamedSharding(mesh, spec)
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    with _x64(True):
        needed = _gram.lower(kernel, axes, sharding).compile().memory_analysis()
    room = needed.temp_size_in_bytes + needed.output_size_in_bytes
    whole = 4 * np.prod(shape)
    # Beside Gram matrices a part of the kernel laid out anew, and one in float64.
    assert room < whole, (shape, spec, room / whole)
print("divided")
"""


@pytest.mark.slow
def test_no_device_holds_a_whole_kernel_to_find_its_spectrum():
    assert run_on_devices(8, ROOM) == "divided"


CUT_ROOM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rmtjax import KernelAxes
from rmtjax import Factors
from rmtjax.spectra._factors import contract
from rmtjax.spectra._sharded import _longer

mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("data", "model"))
dense, conv = KernelAxes((0,), (1,)), KernelAxes((0, 1, 2), (3,))
stack = KernelAxes((1,), (2,), (0,))
for axes, shape, spec in (
    (dense, (8192, 256), P(("data", "model"), None)),
    (dense, (256, 8192), P("data", "model")),
    (conv, (3, 3, 1024, 256), P(None, None, "data", "model")),
    (stack, (8, 2048, 256), P("data", None, "model")),
    (stack, (8, 2048, 256), P(None, None, "model")),
):
    def lie(*axes):
        sizes = [16 if axis is None else shape[axis] for axis in axes]
        own = P(*(None if axis is None else spec[axis] for axis in axes))
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, own))

    kernel = lie(*range(len(shape)))
    left, right = lie(*axes.batch, *axes.inputs, None), lie(*axes.batch, None, *axes.outputs)
    tall = shape[-1] == 256
    short = lie(*axes.batch, *(axes.outputs if tall else axes.inputs), None)
    programs = (
        _longer.lower(kernel, short, axes, kernel.sharding),
        contract.lower(
            Factors(left, right), axes=axes, dtype=jnp.dtype("float32"), sharding=kernel.sharding
        ),
    )
    for program in programs:
        needed = program.compile().memory_analysis()
        room = needed.temp_size_in_bytes + needed.output_size_in_bytes
        whole = 4 * np.prod(shape)
        # A part of the kernel, of four or eight, and what is thin.
        assert room < 0.3 * whole, (shape, spec, room / whole)
print("divided")
"""


@pytest.mark.slow
def test_no_device_holds_a_whole_kernel_to_cut_it():
    assert run_on_devices(8, CUT_ROOM) == "divided"


MNIST = """
import json, pathlib, tempfile
from experiments import data, mnist, output

sizes = {"epochs": 2, "prune_start": 1, "fine_tune_epochs": 1, "widths": (96,)}
dataset = data.load("fashion_mnist", source="sample")
console = output.console()
console.quiet = True
found = []
for devices in (1, 4):
    with tempfile.TemporaryDirectory() as out:
        config = mnist.Config(devices=devices, out=pathlib.Path(out), **sizes)
        history = mnist.run(config, dataset, console).seeds[0].history
        found.append([[entry["loss"], entry["ranks"]] for entry in history])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_main_job_on_four_devices_is_that_on_one():
    one, four = json.loads(run_on_devices(4, MNIST))
    assert [ranks for _, ranks in one] == [ranks for _, ranks in four]
    # Sums over parts of a batch round otherwise, and ninety steps go their own ways from there.
    np.testing.assert_allclose([loss for loss, _ in four], [loss for loss, _ in one], rtol=1e-3)
