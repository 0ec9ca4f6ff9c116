"""Devices that a CPU feigns: a process must be told of them before it starts."""

import os
import subprocess
import sys


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
