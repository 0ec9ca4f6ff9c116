"""Optax's tests for contributed transforms, from the installed file, run over our transforms."""

import importlib.util
from pathlib import Path
from unittest import mock

import optax
import pytest
from absl.testing import parameterized

import rmtjax

# Some trees of these tests have no kernel that is long enough.
pytestmark = pytest.mark.filterwarnings("ignore:.*will never change a kernel")

Rate = optax.ScalarOrSchedule


# The names of the arguments, and the annotation of the rate, are what optax's tests look at.
def spectrum(learning_rate: Rate):
    """Chooses Flax's kernels. The trees of these tests have none and pass untouched."""
    return optax.chain(optax.adam(learning_rate), rmtjax.prune_spectrum(every=10))


def entries(learning_rate: Rate):
    return optax.chain(optax.adam(learning_rate), rmtjax.prune_entries(every=10, sparsity=0.5))


# All leaves are kernels, however small. Nothing is cut from them, so that the optimizers converge.
def spectrum_of_all(learning_rate: Rate):
    prune = rmtjax.prune_spectrum(every=1000, keep=1.0, where="*", min_size=1)
    return optax.chain(optax.adam(learning_rate), prune)


def entries_of_all(learning_rate: Rate):
    prune = rmtjax.prune_entries(every=1000, sparsity=0.0, where="*")
    return optax.chain(optax.adam(learning_rate), prune)


def halves(learning_rate: Rate):
    return optax.chain(optax.adam(learning_rate), rmtjax.agree(every=10))


# All changes are kept, so that the optimizers converge.
def halves_of_all(learning_rate: Rate):
    return optax.chain(optax.adam(learning_rate), rmtjax.agree(every=10, rest=1.0, where="*"))


# Steps of no length, so that the optimizers converge.
def tails_of_all(learning_rate: Rate):
    options = {"rule": rmtjax.ranks.fixed(1), "where": "*", "min_size": 1}
    shrink = rmtjax.lowrank.shrink_tail(every=10, strength=0.0, **options)
    return optax.chain(optax.adam(learning_rate), shrink)


def rounds(learning_rate: Rate):
    prune = rmtjax.prune_entries(0.5, every=10, restore=0.1, select=3)
    return optax.chain(optax.adam(learning_rate), prune)


def pull(learning_rate: Rate):
    return optax.chain(rmtjax.admm(half_precision), optax.adam(learning_rate))


# The target is what is pulled, so that the optimizers converge.
def pull_of_all(learning_rate: Rate):
    return optax.chain(rmtjax.admm(lambda kernel: kernel, where="*"), optax.adam(learning_rate))


def exchange(learning_rate: Rate):
    return rmtjax.drop_and_grow(optax.adam(learning_rate), every=10)


# All entries stay, so that the optimizers converge.
def exchange_of_all(learning_rate: Rate):
    return rmtjax.drop_and_grow(optax.adam(learning_rate), every=1000, density=1.0, where="*")


def mean(learning_rate: Rate):
    return optax.chain(optax.adam(learning_rate), rmtjax.average_params())


def looks(learning_rate: Rate):
    return optax.chain(rmtjax.monitor(every=10), optax.adam(learning_rate))


def looks_of_all(learning_rate: Rate):
    look = rmtjax.monitor(every=1000, columns=["spikes"], where="*", min_size=1)
    return optax.chain(optax.adam(learning_rate), look)


def half_precision(kernel):
    return kernel.astype("bfloat16")


OF_ALL = (spectrum_of_all, entries_of_all, halves_of_all, tails_of_all)
MAKERS = (spectrum, entries, halves, *OF_ALL, rounds, pull, exchange, mean, looks)
# Steps that do more than a comparison compile and run for longer.
LONG = (pull_of_all, exchange_of_all, looks_of_all)
FACTORIES = {make.__name__: make for make in (*MAKERS, *LONG)}
# The rate is that of optax's rows for this wrapper, which tunes it.
WRAPPED = [
    (name, 1.0, "mechanize", {"weight_decay": 0.0}) for name in ("spectrum", "entries", "halves")
]


def rows_of(makers, wrapped=()):
    """Rows as in optax's tables of optimizers."""
    keys = ("opt_name", "opt_kwargs", "wrapper_name", "wrapper_kwargs")
    plain = [(make.__name__, 1e-2, None, None) for make in makers]
    rows = [(name, {"learning_rate": rate}, *rest) for name, rate, *rest in (*plain, *wrapped)]
    return tuple(dict(zip(keys, row, strict=True)) for row in rows)


def load_tests_of_optax(rows):
    """The module of optax's tests, with our rows in place of its tables of optimizers."""
    product = parameterized.product

    def product_of_ours(*tables, **axes):
        assert all("opt_name" in row for table in tables for row in table)
        return product(*[rows for _ in tables], **axes)

    path = Path(optax.__file__).parent / "contrib" / "_common_test.py"
    spec = importlib.util.spec_from_file_location("optax_common_test", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(parameterized, "product", product_of_ours):
        spec.loader.exec_module(module)
    module._get_opt_factory = FACTORIES.__getitem__
    return module


class TestContrib(load_tests_of_optax(rows_of(MAKERS, WRAPPED)).ContribTest):
    """All cases of optax's class of tests."""


@pytest.mark.slow
class TestContribLong(load_tests_of_optax(rows_of(LONG)).ContribTest):
    """All cases of optax's class of tests, for transforms that take longer."""
