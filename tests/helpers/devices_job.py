"""What `test_sharded` runs in processes of their own: a tree on a mesh, beside the same tree on
one device.

The arguments are the types of the mesh's axes, one after another, the number of processes, the
number of this one, and the port on which they meet. Every line printed is a check that held.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P

import rmtjax
from helpers.devices_trees import (
    assert_close,
    assert_placed,
    AXES,
    CUTS,
    gather,
    make_params,
    MATRIX,
    planted,
    put,
    RULE,
    SPECS,
)
from helpers.virtual_devices import for_each_kind
from rmtjax._axes import MatrixView
from rmtjax.planning import leaves_by_path
from rmtjax.spectra import _select, _svd, spectra
from rmtjax.spectra._sharded import _x64


def check_reports(params, placed):
    wanted, found = (rmtjax.analyze(tree, rule=RULE, axes=AXES) for tree in (params, placed))
    for one, other in zip(wanted.rows, found.rows, strict=True):
        assert one[:4] == other[:4]
        np.testing.assert_allclose(other.threshold, one.threshold, rtol=1e-5)
    for path, row in wanted.plan.items():
        own = found.plan[path].spectrum
        np.testing.assert_allclose(own.eigenvalues, row.spectrum.eigenvalues, rtol=1e-4, atol=1e-5)
    assert {row.action for row in found.rows} == {"factorize"}
    print("reports")
    return found.plan


def check_truncation(params, placed, plan):
    lower = rmtjax.truncate(placed, plan)
    assert_close(lower, rmtjax.truncate(params, plan))
    assert_placed(lower, placed)
    thin, wanted = rmtjax.factorize(placed, plan), rmtjax.factorize(params, plan)
    # Factors have signs of their own.
    assert_close(rmtjax.merge(thin), rmtjax.merge(wanted))
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, thin)
    assert specs["Dense_0"]["kernel"] == rmtjax.Factors(P("data", None), P(None, "model"))
    assert specs["stack"]["kernel"].left == P("model", "data", None)
    fits = {path: row.fit for path, row in plan.items()}
    again = rmtjax.plan(thin, rule=RULE, fits=fits)
    assert {int(np.max(row.fit.num_spikes)) for row in again.values()} == {1}
    check_saving(thin)
    print("truncation")


def check_cuts(place):
    """Kernels of all kinds of axes, by the functions that never gather them."""
    params = {name: {"kernel": planted(*shape)} for name, (shape, *_) in CUTS.items()}
    half = params["heads"]["kernel"].astype(jnp.bfloat16)
    params["half"], kinds = {"kernel": half}, CUTS | {"half": CUTS["heads"]}
    placed = {name: {"kernel": place(params[name]["kernel"], kinds[name][1])} for name in params}
    named = {f"{name}/kernel": axes for name, (*_, axes) in kinds.items()}
    fixed = {"axes": named, "rule": rmtjax.ranks.fixed(4), "min_size": 20}
    for shrink in (None, rmtjax.shrinkage.frobenius):
        plan = rmtjax.plan(params, shrink=shrink, **fixed)
        actions = {row.action for row in plan.values()}
        assert actions == {"truncate", "factorize"}, str(plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_select, "_vectors_of_one", None)  # which gathers
            lower, thin = (change(placed, plan) for change in (rmtjax.truncate, rmtjax.factorize))
        assert_placed(lower, placed)
        assert_close(lower, rmtjax.truncate(params, plan))
        merged = rmtjax.merge(rmtjax.factorize(params, plan))
        assert_close(rmtjax.merge(thin), merged)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, thin)
    assert specs["conv"]["kernel"] == (P(None, None, "data", None), P(None, "model"))
    assert specs["heads"]["kernel"] == (P("data", None), P(None, None, "model"))
    print("cuts")


def check_saving(thin):
    """Several processes would write one file."""
    if jax.process_count() > 1:
        with pytest.raises(ValueError, match="is on devices of several processes"):
            rmtjax.checkpoint.save("nowhere.safetensors", thin)


def check_training(params, placed):
    chosen = lambda tree: {name: tree[name] for name in ("up", "down", "stack")}
    params, placed = chosen(params), chosen(placed)
    chain = optax.sgd(0.1), rmtjax.prune_spectrum(every=2, keep=0.1, axes=AXES)
    optimizer = optax.chain(*chain)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    def run(params):
        state = optimizer.init(params)
        for _ in range(2):
            params, state = step(params, state)
        return params, state[1]

    (wanted, one), (found, other) = run(jax.tree.map(jnp.asarray, params)), run(placed)
    assert_close(found, wanted)
    assert_placed(found, placed)
    assert_close(other, one)
    devices = found["up"]["kernel"].devices()
    assert all(leaf.devices() == devices for leaf in jax.tree.leaves(other))
    fits = rmtjax.noise_levels(other)
    wanted = rmtjax.plan(params, fits=rmtjax.noise_levels(one), axes=AXES)
    assert str(rmtjax.plan(placed, fits=fits, axes=AXES)) == str(wanted)
    print("training")


def check_shares(place):
    """Kernels that are whole on each device, where the host is not to decompose them."""
    params = {f"Dense_{i}": {"kernel": planted(96, 60 + i // 5)} for i in range(6)}
    params |= {"stack": {"kernel": planted(11, 64, 56)}}
    placed = jax.tree.map(lambda leaf: place(leaf, P()), params)
    dense = {f"{name}/kernel": MATRIX for name in params if name != "stack"}
    axes = AXES | dense
    views = lambda tree: {
        path: MatrixView(path, leaf, axes[path]) for path, leaf in leaves_by_path(tree).items()
    }
    wanted, sizes, each = spectra(views(params)), [], _svd.each
    spy = lambda function, stack: (sizes.append(len(stack)), each(function, stack))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_svd, "each", spy)
        results = _svd.compiled_spectra(views(placed))
    for path, values in wanted.items():
        expected = values.spectrum.eigenvalues
        np.testing.assert_allclose(results[path][0].eigenvalues, expected, rtol=1e-4, atol=1e-5)
    # Of five that are alike, of one, and of a stack of eleven: each device has so many.
    assert sorted(sizes) == sorted(-(-count // jax.device_count()) for count in (1, 5, 11))
    print("shares")


def check_certificate(place):
    """The last kernel is changed, so that rounding alone is between the two."""
    rng = np.random.default_rng(2)
    inputs, labels = rng.standard_normal((16, 96)).astype(np.float32), np.arange(16) % 8
    before = {"a": {"kernel": planted(96, 64)}, "b": {"kernel": planted(64, 8)}}
    after = before | {"b": {"kernel": before["b"]["kernel"] * np.float32(0.999)}}
    layers = ("a", "b")
    wanted = rmtjax.certificate.certify(before, after, inputs, layers=layers, labels=labels)
    lie = lambda leaf: place(leaf, P("data", "model") if leaf.ndim == 2 else P("data"))
    trees = jax.tree.map(lie, (before, after, inputs))
    for certify in (
        rmtjax.certificate.certify,
        jax.jit(rmtjax.certificate.certify, static_argnames=("layers", "activation")),
    ):
        found = certify(*trees, layers=layers, labels=lie(labels))
        assert_close(found._replace(unchanged=found.unchanged * 1), wanted)
    slope = [0.5]  # of an activation that changes
    find = partial(rmtjax.certificate.certify, *trees, layers=layers)
    low = gather(find(activation=(ramp := lambda x: slope[0] * x)).change)
    slope[0] = 1.0
    assert (gather(find(activation=ramp).change) > low).all()
    print("certificate")


def check_broken(place):
    """What is not finite, and what float64 alone can tell."""
    broken = planted(64, 96)
    broken[3, 4] = np.nan
    with _x64(True):
        rng = np.random.default_rng(1)
        loud = 1e10 * np.outer(rng.normal(size=96), rng.normal(size=64))
        params = {"broken": {"kernel": broken}, "loud": {"kernel": loud + planted(96, 64)}}
        placed = jax.tree.map(lambda leaf: place(leaf, P("data", "model")), params)
        wanted, found = rmtjax.plan(params), rmtjax.plan(placed)
    assert str(found) == str(wanted)
    assert found["broken/kernel"].reason == "kept: not finite"
    assert found["loud/kernel"].action == "factorize"
    # By the plan of a kernel that was not broken.
    whole = {"broken": {"kernel": planted(64, 96)}}
    plan = rmtjax.plan(whole)
    assert plan["broken/kernel"].action == "factorize"
    cut = rmtjax.truncate({"broken": placed["broken"]}, plan)
    assert np.isnan(gather(cut)["broken"]["kernel"]).all()
    quiet = place(whole["broken"]["kernel"] * np.float32(1e-25), P("data", "model"))
    cut = rmtjax.truncate({"broken": {"kernel": quiet}}, plan)  # whose squares are 0 in float32
    assert_close(jax.tree.map(lambda leaf: leaf * 1e25, cut), rmtjax.truncate(whole, plan))
    print("broken")


def check_large(place):
    """The estimate, whose products the compiler divides."""
    noise = np.random.default_rng(0).standard_normal((3072, 2944), np.float32)
    kernel = noise + planted(*noise.shape)
    rows = [
        rmtjax.analyze(tree, exact_below=2944).rows[0]
        for tree in ({"kernel": kernel}, {"kernel": place(kernel, P("data", "model"))})
    ]
    assert all(row.reason.endswith("(spectrum estimated)") for row in rows)
    assert rows[0].rank == rows[1].rank
    np.testing.assert_allclose(rows[1].threshold, rows[0].threshold, rtol=1e-4)
    print("large")


def check_own_meshes(kind):
    """A mesh of the devices of one process, about which no other is asked."""
    axis_types = (getattr(AxisType, kind),)
    mesh = Mesh(np.array(jax.local_devices()), "x", axis_types=axis_types)
    kernel = planted(96, 64) * (1 + jax.process_index())
    placed = put(kernel, mesh, P("x"))
    plan = rmtjax.plan({"kernel": kernel})
    wanted, found = plan["kernel"], rmtjax.plan({"kernel": placed})["kernel"]
    np.testing.assert_allclose(found.fit.variance, wanted.fit.variance, rtol=1e-4)
    lower = rmtjax.truncate({"kernel": kernel}, plan)["kernel"]
    check = lambda cut: np.testing.assert_allclose(cut["kernel"], lower, rtol=1e-4, atol=1e-4)
    check(rmtjax.truncate({"kernel": placed}, plan))
    if hasattr(jax, "set_mesh"):  # one that is in force
        with jax.set_mesh(mesh):
            assert rmtjax.plan({"kernel": placed})["kernel"].reason == wanted.reason
            assert rmtjax.analyze({"kernel": placed}).rows[0].spikes == wanted.fit.num_spikes
            check(rmtjax.truncate({"kernel": placed}, plan))
    print("meshes")


def check_mesh(kind):
    """All checks, on a mesh with axes of one type."""
    axis_types = (getattr(AxisType, kind),) * 2
    mesh = jax.make_mesh((jax.device_count() // 2, 2), ("data", "model"), axis_types=axis_types)
    place = lambda leaf, spec: put(leaf, mesh, spec)
    params = make_params()
    placed = jax.tree.map(place, params, SPECS)
    plan = check_reports(params, placed)
    check_truncation(params, placed, plan)
    check_cuts(place)
    check_training(params, placed)
    check_shares(place)
    check_certificate(place)
    check_broken(place)
    check_own_meshes(kind)
    check_large(place)


if __name__ == "__main__":
    for_each_kind(check_mesh)
