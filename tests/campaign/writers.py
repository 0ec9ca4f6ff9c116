"""Writers that are killed, full disks, read-only folders and two writers at once.

The file at a path is the old one or the new one, and never a mixture or a part.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import rmtjax

# For each line that it reads, starts a writer of one file over and over, and says who it is. A fork
# starts at once: a new program would take seconds to import the package.
WRITERS = """
import os, sys, warnings, numpy as np, rmtjax
warnings.simplefilter("ignore")  # JAX warns of forks, but nothing is computed here
trees = [{"a": {"kernel": np.full((300, 400), value, np.float32)}} for value in range(10)]
for line in sys.stdin:
    writer, count = os.fork(), 0
    while writer == 0:
        rmtjax.checkpoint.save(sys.argv[1], trees[count % 10])
        count += 1
    print(writer, flush=True)
    os.waitpid(writer, 0)
    print("gone", flush=True)
"""
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def check_whole(path):
    """The file is one that was written in full: all its numbers are equal."""
    kernel = np.asarray(rmtjax.checkpoint.restore(path)["a"]["kernel"])
    assert kernel.shape == (300, 400)
    assert (kernel == kernel[0, 0]).all(), "a mixture"


def run_killed(tally, rounds, seed):
    """Kills so many writers at random moments."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        path, pipe = Path(root, "a.safetensors"), subprocess.PIPE
        rmtjax.checkpoint.save(path, {"a": {"kernel": np.zeros((300, 400), np.float32)}})
        command = [sys.executable, "-c", WRITERS, str(path)]
        options = {"stdin": pipe, "stdout": pipe, "env": ENVIRONMENT, "text": True, "bufsize": 1}
        with subprocess.Popen(command, **options) as process:
            for index in range(rounds):
                process.stdin.write("\n")
                writer = int(process.stdout.readline())
                time.sleep(rng.random() * 0.03)  # some writes
                os.kill(writer, signal.SIGKILL)
                process.stdout.readline()
                tally.tried["killed while writing"] += any(Path(root).glob(".a.safetensors.*"))
                with tally.trial("killed writer", f"seed {seed}, {index}"):
                    check_whole(path)
                for left in Path(root).glob(".a.safetensors.*"):  # what a kill leaves
                    left.unlink()


def run_two(tally, rounds):
    """Lets two threads write one path."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "a.safetensors")
        tree = lambda value: {"a": {"kernel": np.full((300, 400), value, np.float32)}}

        def write(value):
            for _ in range(rounds):
                rmtjax.checkpoint.save(path, tree(value))

        rmtjax.checkpoint.save(path, tree(0))
        threads = [threading.Thread(target=write, args=(value,)) for value in (1, 2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with tally.trial("two writers", path):
                check_whole(path)
        for thread in threads:
            thread.join()
        with tally.trial("two writers", path):
            assert [*Path(root).iterdir()] == [path]


def run_full(tally):
    """Writes where there is no room: on a device that is full, if there is one."""
    with tempfile.TemporaryDirectory() as root:
        disk = Path(root, "disk")
        disk.mkdir()
        options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
            return
        try:
            path = disk / "a.safetensors"
            # Orbax would compress equal numbers.
            large = np.random.default_rng(0).normal(size=(300, 400))
            small = {"a": {"kernel": np.zeros((10, 10), np.float32)}}
            rmtjax.checkpoint.save(path, small)
            for target in (path, disk / "b.safetensors", disk / "folder"):
                with tally.trial("full disk", target, expected=OSError):
                    rmtjax.checkpoint.save(target, {"a": {"kernel": large}})
                    raise AssertionError("there was room")
                with tally.trial("after a full disk", target):
                    assert (np.asarray(rmtjax.checkpoint.restore(path)["a"]["kernel"]) == 0).all()
                    assert [*disk.iterdir()] == [path], [*disk.iterdir()]
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def run_read_only(tally):
    """Writes into a folder without the right to; root has it everywhere."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "folder")
        folder.mkdir()
        folder.chmod(0o500)
        tree = {"a": {"kernel": np.ones((2, 2), np.float32)}}
        for target in (folder / "a.safetensors", folder / "b", Path("/proc/none/a.safetensors")):
            with tally.trial("read-only", target, expected=(OSError,)):
                rmtjax.checkpoint.save(target, tree)
        folder.chmod(0o700)


def run(tally, rounds, seed):
    """Kills so many writers, and tries each of the others once."""
    run_killed(tally, rounds, seed)
    run_two(tally, max(rounds // 10, 5))
    run_full(tally)
    run_read_only(tally)
