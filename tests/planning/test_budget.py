"""Plans for a size: they land on it, share it well, and never waste it."""

import itertools

import numpy as np
import pytest
from helpers.plan_cases import Count, planted

import rmtjax
from rmtjax import Budget, Factors, KernelAxes
from rmtjax.planning._budget import allocate, Choices

OPTIONS = {"rule": Count(1), "min_size": 1}


def random_tree(seed):
    """A few kernels of different sides and spectra, a stack, factors, and one that is too small."""
    draw = np.random.default_rng(seed)
    params = {}
    for place in range(draw.integers(1, 5)):
        m, n = draw.choice([24, 40, 56, 96], 2)
        scales = np.arange(1, n + 1.0) ** -draw.uniform(0, 1.5)
        params[f"{place}"] = {"kernel": (draw.normal(size=(m, n)) * scales).astype(np.float32)}
    if draw.integers(2):
        params["stack"] = {"kernel": draw.normal(size=(3, 40, 24)).astype(np.float32)}
    if draw.integers(2):
        thin = (draw.normal(size=shape).astype(np.float32) for shape in ((40, 24), (24, 56)))
        params["thin"] = {"kernel": Factors(*thin)}
    if draw.integers(2):
        params["small"] = {"kernel": np.ones((2, 3), np.float32)}
    return params


STACK = {"stack/kernel": KernelAxes((1,), (2,), (0,))}


def axes_of(params):
    return {path: axes for path, axes in STACK.items() if "stack" in params}


def size(params):
    """The numbers in the kernels of a tree."""
    leaves = (leaf["kernel"] for leaf in params.values())
    parts = ([leaf] if isinstance(leaf, np.ndarray) else [*leaf] for leaf in leaves)
    return sum(part.size for part in itertools.chain(*parts))


@pytest.mark.parametrize("multiple", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.slow
def test_fifty_random_models_land_within_one_step_of_the_target(multiple):
    for seed in range(25):
        params, draw = random_tree(seed), np.random.default_rng(seed)
        share = draw.uniform(0.45, 1)
        options = {"axes": axes_of(params), "multiple": multiple, **OPTIONS}
        plan = rmtjax.plan(params, budget=share, **options)
        cost = rmtjax.Report(plan).totals
        target = share * size(params)
        assert cost.parameters == size(params)
        steps = [
            multiple * sum(row.shape[-2:]) * np.prod(row.shape[:-2], dtype=int)
            for row in plan.values()
        ]
        # One step of a rank of the kernel that was cut last, and of no more than one.
        if cost.parameters_after < cost.parameters:
            assert target - max(steps) < cost.parameters_after <= target
        for path, row in plan.items():
            assert row.rank is None or row.action == "keep" or row.rank % multiple == 0
            # Never above the rank at which factors save nothing.
            assert row.action != "truncate"
            if row.action == "factorize":
                assert row.cost.parameters_after < row.cost.parameters, path
        assert size(jax_free(rmtjax.factorize(params, plan))) == cost.parameters_after


def jax_free(params):
    as_numpy = lambda leaf: Factors(*map(np.asarray, leaf)) if isinstance(leaf, Factors) else leaf
    return {name: {"kernel": as_numpy(layer["kernel"])} for name, layer in params.items()}


def brute_force(choices, limit):
    """The least loss of all combinations within a limit."""
    places = itertools.product(*(range(len(one.sizes)) for one in choices.values()))
    best = np.inf
    for chosen in places:
        picked = list(zip(choices.values(), chosen, strict=True))
        if sum(one.sizes[place] for one, place in picked) <= limit:
            best = min(best, sum(one.losses[place] for one, place in picked))
    return best


def test_the_allocation_is_near_the_best_of_all():
    draw = np.random.default_rng(0)
    for _ in range(40):
        choices = {}
        for name in "abc":
            sizes = np.sort(draw.choice(np.arange(5, 60), 6, replace=False))
            losses = np.append(np.sort(draw.uniform(0, 1, 5))[::-1], 0)
            choices[name] = Choices((1, 2, 3, 4, 5, None), sizes, losses)
        whole, least = (sum(one.sizes[place] for one in choices.values()) for place in (-1, 0))
        limit = int(draw.integers(least, whole + 1))
        ranks = allocate(choices, 0, limit)
        places = {name: one.ranks.index(ranks[name]) for name, one in choices.items()}
        used = sum(choices[name].sizes[place] for name, place in places.items())
        loss = sum(choices[name].losses[place] for name, place in places.items())
        best = brute_force(choices, limit)
        assert used <= limit
        # Greedy in steps as long as a third of a kernel: at most one of them is lost.
        assert loss <= best + max(np.max(-np.diff(one.losses)) for one in choices.values())


def test_a_kernel_that_needs_its_directions_keeps_them():
    draw = np.random.default_rng(0)
    flat = np.linalg.qr(draw.normal(size=(64, 64)))[0].astype(np.float32)
    steep = (flat * 2.0 ** -np.arange(64)) @ flat
    plan = rmtjax.plan({"a": {"kernel": flat}, "b": {"kernel": steep}}, budget=0.75, **OPTIONS)
    assert plan["a/kernel"].reason == "kept: whole under the budget"
    assert plan["b/kernel"].reason == "factorized: rank 16 of 64 under the budget"


def test_a_budget_of_everything_changes_nothing():
    plan = rmtjax.plan({"a": {"kernel": planted((60, 80))}}, budget=1.0, **OPTIONS)
    assert not plan.changes


def test_each_size_may_be_the_budget():
    params = {"a": {"kernel": planted((60, 80))}, "b": {"embedding": planted((60, 80), seed=4)}}
    for field, target in (("parameters", 7_000), ("multiply_adds", 3_000)):
        plan = rmtjax.plan(params, budget=Budget(**{field: target}), **OPTIONS)
        after = getattr(rmtjax.Report(plan).totals, f"{field}_after")
        assert target - 8 * 140 < after <= target
        # A lookup multiplies nothing, so that factors of a table would only cost.
        assert (plan["b/embedding"].action == "keep") == (field == "multiply_adds")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (0.0, "`share` of a `Budget` must be a number above 0, got 0.0"),
        (1.5, r"`budget` must be in \(0, 1\], got 1.5: .*; that is more than the whole"),
        (75.0, r"`budget` must be in \(0, 1\], got 75.0: .*; 75 % is 0.75"),
        ("75%", "budget"),  # in our words, where types are not checked before
        (True, "budget"),
        (
            0.001,
            "`budget` allows 4 parameters, and the smallest plan has 1,120 parameters: of these",
        ),
    ],
)
def test_wrong_budgets_are_refused(budget, words):
    with pytest.raises((ValueError, TypeError), match=words):
        rmtjax.plan({"kernel": planted((60, 80))}, budget=budget, **OPTIONS)


def test_a_budget_has_one_size_and_no_other_say():
    with pytest.raises(ValueError, match=r"`Budget` must have one of .*'parameters'.*got none"):
        Budget()
    with pytest.raises(ValueError, match="`Budget` must have one of"):
        Budget(share=0.5, parameters=10)
    with pytest.raises((ValueError, TypeError), match="parameters"):
        Budget(parameters=0.5)
    others = {"rule": rmtjax.ranks.size(0.5), "keep": 0.1, "shrink": rmtjax.shrinkage.frobenius}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"`{name}` must be left out with `budget`"):
            rmtjax.plan({"kernel": planted((60, 80))}, budget=0.5, **{name: value})


def test_broken_kernels_stay_and_count():
    params = {"a": {"kernel": planted((60, 80)) * np.nan}, "b": {"kernel": planted((60, 80))}}
    plan = rmtjax.plan(params, budget=0.75, **OPTIONS)
    assert plan["a/kernel"].reason == "kept: not finite"
    assert plan["b/kernel"].cost.parameters_after <= 2_400
