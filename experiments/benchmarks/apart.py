"""Rivals that run in an environment of their own: what they pin would break ours."""

import json
import subprocess
import tempfile
import venv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def run_apart(
    script: str, requirements: Iterable[str], arrays: Mapping[str, np.ndarray], *options: Any
) -> dict[str, Any]:
    """Installs requirements, runs a script of this folder, and removes the environment.

    The script is given the options and then the paths of the arrays, stored as .npy. The last line
    that it prints is a JSON object, which is returned.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        for requirement in requirements:  # one by one: what the first has chosen is kept
            subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
        paths = [folder / f"{number:04}.npy" for number in range(len(arrays))]
        for path, array in zip(paths, arrays.values(), strict=True):
            np.save(path, array)
        command = [python, Path(__file__).with_name(script), *map(str, options), *paths]
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(ran.stdout.splitlines()[-1])
