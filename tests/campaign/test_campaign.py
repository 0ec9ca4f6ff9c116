"""A short part of the campaign, and a longer one among the slow tests."""

from functools import partial

import pytest
from helpers.slow import slow_except

from campaign import files, listed, names, training, trees, writers
from campaign.tally import Tally
from campaign.verbs import matrices, modules

SHORT = {
    "trees": (trees.run, 2),
    "verbs": (trees.run_verbs, 1),
    # The memory is measured by the longer one: its process of its own takes seconds to start.
    "safetensors": (partial(files.run_safetensors, memory=False), 200),
    "indexes": (files.run_indexes, 100),
    "training": (training.run, 2),
}
LONG = {
    "trees": (trees.run, 6),
    # Each verb of a matrix compiles for a second, and those of a tree for more: see the command.
    "verbs": (trees.run_verbs, 2),
    "matrices": (matrices.run, 1),
    "modules": (modules.run, 4),
    "large": (trees.run_large, 1),
    "files": (files.run, 1200),
    "writers": (writers.run, 20),
    "names": (names.run, 20),
    "training": (training.run, 3),
}


def without_faults(run, rounds, seed):
    tally = Tally()
    run(tally, rounds, seed)
    assert not tally.faults, str(tally)
    assert tally.tried.total() >= rounds


@pytest.mark.parametrize("part", slow_except(("safetensors", "indexes", "trees", "verbs"), SHORT))
def test_a_short_campaign_finds_nothing(part):
    run, rounds = SHORT[part]
    without_faults(run, rounds, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "rounds"), LONG.values(), ids=LONG)
def test_a_longer_campaign_finds_nothing(run, rounds):
    without_faults(run, rounds, seed=1)


def test_the_tally_tells_errors_of_the_package_from_others():
    tally = Tally()
    with tally.trial("ours", "x"):
        trees.rmtjax.ranks.fixed(0)
    with tally.trial("foreign", "y"):
        int("no number")
    with tally.trial("wrong", "z"):
        assert 1 == 2
    assert (tally.refused["ours"], len(tally.faults)) == (1, 2)
    assert "foreign: ValueError" in tally.faults[0]


def test_every_public_verb_is_tried_or_has_a_reason_why_not():
    paths, words = listed.tried()
    verbs = listed.public_verbs().keys()
    assert verbs - paths - listed.NOT_TRIED.keys() == set()
    assert listed.NOT_TRIED.keys() <= verbs - paths
    assert {
        name for name in listed.public_methods() if name.partition(".")[2] not in words
    } == set()
