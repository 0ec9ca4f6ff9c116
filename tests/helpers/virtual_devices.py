"""Devices that a CPU feigns: a process must be told of them before it starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

TESTS = str(Path(__file__).parents[1])
# Types of axes. One process tests all, and compiles once what runs on one device.
KINDS = ["Auto", "Explicit"] if hasattr(jax.sharding, "auto_axes") else ["Auto"]
EXPLICIT = pytest.mark.skipif(not hasattr(jax.sharding, "auto_axes"), reason="came with jax 0.7")


def environment(devices):
    """The environment of a process that sees so many devices of the CPU."""
    flags = os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def run_on_devices(devices, code, *arguments):
    """What a program prints that sees so many devices."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _start(module, kind, devices, *place):
    job = ["-m", module, kind, *map(str, place or (1, 0, 0))]
    paths = [TESTS, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = environment(devices) | {"PYTHONPATH": os.pathsep.join(paths)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *job], env=variables, text=True, **pipes)


def _finish(jobs, checks):
    """Which of the checks each has printed, in order; none outlives the test."""
    try:
        found = [job.communicate(timeout=400) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * len(jobs), found
    # Between them are words of the library by which processes speak.
    return [[line for line in out.splitlines() if line in checks] for out, _ in found]


def for_each_kind(check_mesh):
    """The main function of a job: joins the processes, and checks a mesh of each type of axes."""
    kinds, processes, number, port = sys.argv[1], *map(int, sys.argv[2:])
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
    for kind in kinds.split("+"):
        check_mesh(kind)


def run_job(module, kind, devices, checks):
    """Which of the checks a job prints that sees so many devices."""
    return _finish([_start(module, kind, devices)], checks)[0]


def run_two_jobs(module, devices, checks):
    """The same of two processes that speak over loopback, with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [_start(module, "Auto", devices, 2, number, port) for number in range(2)]
    return _finish(jobs, checks)
