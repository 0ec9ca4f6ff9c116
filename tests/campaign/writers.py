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

# Writes one file over and over, and says so before the first write.
WRITER = """
import sys, numpy as np, rmtjax
path, count = sys.argv[1], 0
trees = [{"a": {"kernel": np.full((300, 400), value, np.float32)}} for value in range(10)]
print("ready", flush=True)
while True:
    rmtjax.checkpoint.save(path, trees[count % 10])
    count += 1
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
        path = Path(root, "a.safetensors")
        command = [sys.executable, "-c", WRITER, str(path)]
        done = 0
        while done < rounds:
            rmtjax.checkpoint.save(path, {"a": {"kernel": np.zeros((300, 400), np.float32)}})
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
                process.stdout.readline()
                # The writer is stopped to look at what is there, as often as a kill would be.
                for _ in range(20):
                    time.sleep(rng.random() * 0.01)
                    os.kill(process.pid, signal.SIGSTOP)
                    done += 1
                    with tally.trial("stopped writer", f"seed {seed}, {done}"):
                        check_whole(path)
                    os.kill(process.pid, signal.SIGCONT)
                time.sleep(rng.random() * 0.01)
                process.kill()
            with tally.trial("killed writer", f"seed {seed}, {done}"):
                check_whole(path)
            for left in Path(root).glob(".a.safetensors.*"):  # a kill leaves its temporary file
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
    """Stops and kills so many writers, and tries each of the others once."""
    run_killed(tally, rounds, seed)
    run_two(tally, max(rounds // 10, 5))
    run_full(tally)
    run_read_only(tally)
