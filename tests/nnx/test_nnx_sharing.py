"""Trees that a model of `flax.nnx` takes and refuses, and what it holds twice."""

import contextlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from helpers.nnx_checks import rank_plan
from helpers.nnx_models import make_thin, net, X

import rmtjax
from rmtjax import nnx as rmt_nnx
from rmtjax.nnx._variables import read

OPTIONS = {"rule": rmtjax.ranks.fixed(4), "multiple": 1, "min_size": 2}


class Tied(nnx.Module):
    """Two layers with one kernel, and biases of their own."""

    def __init__(self, other=None):
        self.one, self.two = (nnx.Linear(20, 20, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        self.two.kernel = self.one.kernel
        if other is not None:
            self.other = self.one.kernel


def test_layers_that_share_a_kernel_share_its_factors():
    model = Tied()
    tree = rmt_nnx.params(model)
    assert "kernel" not in tree["two"]
    thin = make_thin(model)
    assert thin.one.left_factor.kernel is thin.two.left_factor.kernel
    assert thin.one.right_factor.kernel is thin.two.right_factor.kernel
    assert thin.one.bias is not thin.two.bias
    merged = rmt_nnx.merge(thin)
    assert merged.one.kernel is merged.two.kernel
    np.testing.assert_allclose(merged.two(X), thin.two(X), atol=1e-5)


def test_a_kernel_that_something_else_holds_too_is_refused():
    with pytest.raises(ValueError, match="Tied cannot run with them"):
        make_thin(Tied(other=True))


@pytest.mark.parametrize("hold", [lambda kernel: kernel, lambda kernel: nnx.Dict(it=kernel)])
def test_a_kernel_that_something_else_holds_too_is_planned_in_place(hold):
    model = Tied()
    model.other = hold(model.one.kernel)
    model.three = nnx.Linear(20, 20, rngs=nnx.Rngs(2))
    plan = rmt_nnx.plan(model, **OPTIONS)
    assert {row.action for row in plan.values()} == {"truncate", "factorize"}
    (path,) = (path for path, row in plan.items() if row.action == "truncate")
    assert path != "three/kernel"
    holder = "Tied" if hold(0) == 0 else "Dict"
    assert plan[path].reason.startswith(
        f"truncated: `{holder}` holds it too, and is not a known layer"
    )
    thin = rmt_nnx.factorize(model, plan)
    assert thin.one.kernel is thin.two.kernel
    np.testing.assert_array_equal(thin.one(X), rmt_nnx.truncate(model, plan).one(X))
    assert thin.three.left_factor.kernel.shape == (20, 4)


def test_kernels_that_are_normalized_at_each_call_are_planned_in_place():
    # Older Flax has none of these.
    wrappers = [name for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name)]
    make = lambda name, inner: getattr(nnx, name)(inner, rngs=nnx.Rngs(1))
    layer = lambda: nnx.Sequential(nnx.Linear(20, 24, rngs=nnx.Rngs(0)), jnp.tanh)
    models = {name: make(name, layer().layers[0]) for name in wrappers} | {None: layer()}
    for name, model in models.items():
        ((_, row),) = (plan := rmt_nnx.plan(model, **OPTIONS)).items()
        words = f"truncated: `{name}` rewrites it at each call" if name else "factorized"
        assert row.reason.startswith(words)
        thin, truncated = rmt_nnx.factorize(model, plan), rmt_nnx.truncate(model, plan)
        np.testing.assert_allclose(thin(X), truncated(X), atol=1e-5)  # some dozen roundings


@pytest.mark.parametrize("change", [rmt_nnx.truncate, rmt_nnx.factorize])
def test_what_is_no_plan_is_refused(change, monkeypatch):
    # As users have it: the type checker of the tests would speak first, in its own words.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match=r"`plan` must be a `rmtjax\.Plan`, .* got NoneType"):
        change(nnx.Linear(20, 24, rngs=nnx.Rngs(0)), None)


class Odd(nnx.Module):
    """Parameters that are no single array beside a layer, and in the place of its kernel."""

    def __init__(self):
        self.layer = nnx.Linear(20, 24, rngs=nnx.Rngs(0))
        self.odd = nnx.Linear(20, 24, rngs=nnx.Rngs(0))
        self.odd.kernel = nnx.Param({"halves": [jnp.ones((20, 12)), jnp.zeros((20, 12))]})
        self.pair, self.none = nnx.Param({"a": jnp.ones(3), "b": jnp.zeros(2)}), nnx.Param(None)


def test_parameters_that_are_no_single_array_stay_out_of_the_tree_and_as_they_are():
    model = Odd()
    tree = rmt_nnx.params(model)
    assert {name: set(part) for name, part in tree.items()} == {
        "layer": {"kernel", "bias"},
        "odd": {"bias"},
    }
    plan = rmt_nnx.plan(model, **OPTIONS)
    assert plan.keys() == {"layer/kernel"}
    thin = rmt_nnx.factorize(model, plan)
    assert thin.layer.left_factor.kernel.shape == (20, 4)
    for other in (thin, rmt_nnx.merge(thin), rmt_nnx.replace(model, tree)):
        assert read(other.none) is None
        for find in (lambda model: model.pair, lambda model: model.odd.kernel):
            leaves = zip(*(jax.tree.leaves(read(find(one))) for one in (other, model)), strict=True)
            assert all(one is another for one, another in leaves)


class Own(nnx.Module):
    """A layer that nobody has registered."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.eye(20))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: {}, "lacks 'bias' of the model"),
        (lambda tree: tree | {"scale": 1.0}, "has 'scale', not in the model"),
        (lambda tree: tree | {"kernel": jnp.ones((20, 5))}, r"shape \(20, 5\) for 'kernel'"),
        (
            lambda tree: tree | {"kernel": rmtjax.Factors(jnp.ones((20, 1)), jnp.ones((1, 5)))},
            r"shape \(20, 5\) for 'kernel'",
        ),
    ],
    ids=["missing", "extra", "shape", "shape of factors"],
)
def test_a_tree_of_another_model_is_refused(change, words):
    model = nnx.Linear(20, 24, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=words):
        rmt_nnx.replace(model, change(rmt_nnx.params(model)))


def test_factors_for_what_is_no_layer_known_are_refused():
    factors = {"kernel": rmtjax.Factors(jnp.ones((20, 1)), jnp.ones((1, 20)))}
    with pytest.raises(ValueError, match=r"for 'kernel', and Own cannot run .* `where`.*register"):
        rmt_nnx.replace(Own(), factors)


def test_what_is_no_model_or_no_option_is_refused():
    with pytest.raises(TypeError, match="model"):
        rmt_nnx.params({"kernel": jnp.ones((3, 3))})
    with pytest.raises((ValueError, TypeError), match="gates"):
        rmt_nnx.params(net(), gates="all")
    plan = rank_plan(nnx.Linear(20, 24, rngs=nnx.Rngs(0)), 4)
    with pytest.raises(ValueError, match="`plan` is for another tree"):
        rmt_nnx.factorize(nnx.Linear(24, 20, rngs=nnx.Rngs(0)), plan)
    with pytest.raises(ValueError, match="`plan` is for another tree"):
        rmt_nnx.truncate(net(), plan)


def test_names_of_axes_for_sharding_go_to_the_factors():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", "columns"))
    # Newer Flax would shard at once, and want a mesh.
    lazily = getattr(nnx, "use_eager_sharding", lambda _: contextlib.nullcontext())
    with lazily(False):
        model = nnx.Linear(20, 24, kernel_init=init, rngs=nnx.Rngs(0))
    thin = make_thin(model)
    keys = ("out_sharding", "sharding")
    names = lambda kernel: tuple(next(filter(None, map(kernel.get_metadata().get, keys))))
    assert names(thin.left_factor.kernel) == ("rows", None)
    assert names(thin.right_factor.kernel) == (None, "columns")
    assert names(rmt_nnx.merge(thin).kernel) == names(model.kernel) == ("rows", "columns")
