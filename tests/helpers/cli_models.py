"""Files of tensors that tests of the command line read, and what they look at afterwards."""

import numpy as np
import pytest

from rmtjax import cli
from rmtjax.checkpoint._open import open_tensors
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensors import Entry


def spiked(seed):
    noise = np.random.default_rng(seed).standard_normal((80, 60)).astype(np.float32)
    noise[:, :2] += 4
    return noise


def save(folder, **tensors):
    entries = {name: Entry.of(array) for name, array in tensors.items()}
    path = folder / "model.safetensors"
    write_tensors(path, entries, tensors.items(), {})
    return str(path)


def save_model(folder):
    """Two kernels with a bias."""
    return save(folder, **{"a.weight": spiked(0), "b.weight": spiked(1), "b.bias": np.ones(60)})


def names_of(path):
    with open_tensors(path) as tensors:
        return set(tensors.entries)


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err
