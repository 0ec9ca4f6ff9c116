"""Moments of kernels that a model multiplies by both ways, as the table of a tied output layer."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.linalg import logm

import rmtjax
from rmtjax.spectra import _outputs

ROWS, COLUMNS, RANK = 80, 60, 20
IDS = np.random.default_rng(0).zipf(1.3, (4, 50)) % ROWS  # few letters are frequent


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(ROWS, COLUMNS)
        hidden = jnp.tanh(nn.Dense(COLUMNS)(table(ids)))
        return hidden, table.attend(hidden)


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(ROWS, COLUMNS, rngs=rngs)
        self.dense = nnx.Linear(COLUMNS, COLUMNS, rngs=rngs)

    def __call__(self, ids):
        hidden = jnp.tanh(self.dense(self.table(ids)))
        return hidden, self.table.attend(hidden)


class Coder(nn.Module):
    """An encoder whose decoder is its transpose."""

    @nn.compact
    def __call__(self, ids):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (ROWS, COLUMNS))
        hidden = jnp.tanh(jax.nn.one_hot(ids, ROWS) @ kernel)
        return hidden, hidden @ kernel.T


def collect(name):
    """The tree, the moments over two batches, the path of the table, and the hidden rows."""
    if name == "nnx":
        model = NnxTied(nnx.Rngs(0))
        params, path = rmtjax.nnx.params(model), "table/embedding"
        moments, hidden = rmtjax.nnx.moments(model, [IDS[:2], IDS[2:]]), model(IDS)[0]
    else:
        module = {"linen": Tied, "coder": Coder}[name]()
        variables = module.init(jax.random.key(0), IDS)
        params, path = variables["params"], {"linen": "Embed_0/embedding", "coder": "kernel"}[name]
        moments = rmtjax.linen.moments(module, variables, [IDS[:2], IDS[2:]])
        hidden = module.apply(variables, IDS)[0]
    return params, moments, path, np.asarray(hidden, np.float64).reshape(-1, COLUMNS)


def leaf_of(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree, np.float64)


def changes(table, lower, hidden):
    """What changes of the lookups and of the logits, each over its energy."""
    ids, moved = IDS.ravel(), table - lower
    lookups = np.sum(moved[ids] ** 2) / np.sum(table[ids] ** 2)
    return lookups + np.sum((hidden @ moved.T) ** 2) / np.sum((hidden @ table.T) ** 2)


@pytest.fixture(scope="module", params=["linen", "nnx", "coder"])
def tied(request):
    return collect(request.param)


def test_both_uses_have_sums(tied):
    _, moments, path, hidden = tied
    counts = np.bincount(IDS.ravel(), minlength=ROWS)
    second = moments[path].second[0]
    np.testing.assert_array_equal(second if second.ndim == 1 else np.diag(second), counts)
    other = moments.transposed[path]
    assert other.rows[0] == moments[path].rows[0] == IDS.size
    np.testing.assert_allclose(other.second[0], hidden.T @ hidden, rtol=1e-4, atol=1e-4)  # float32


@pytest.mark.parametrize("act", [rmtjax.truncate, rmtjax.factorize])
def test_a_plan_says_what_changes_of_both_uses(tied, act):
    params, moments, path, hidden = tied
    options = {"where": path, "moments": moments}
    plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(RANK), multiple=1, **options)
    after = act(params, plan, moments=moments)
    table, lower = leaf_of(params, path), leaf_of(rmtjax.merge(after), path)
    measured = changes(table, lower, hidden)
    loss = plan[path].loss
    assert loss.outputs[0] == pytest.approx(2)
    # An identity, but for sums and a cut in float32.
    assert loss.outputs[plan[path].rank] == pytest.approx(measured, rel=1e-3)
    found = rmtjax.certificate.output_changes(params, after, moments, where=path)[path]
    assert found.change == pytest.approx(measured, rel=1e-3)
    assert found.energy == pytest.approx(2)
    assert np.all(np.diff(loss.weighted) <= 0)


def test_a_cut_for_both_uses_is_better_than_one_for_either(tied):
    params, moments, path, hidden = tied
    table = leaf_of(params, path)
    one = replace(moments, transposed={})
    # The other use alone: its rows meet the transpose.
    other = hidden.T @ hidden
    root = np.linalg.cholesky(other + 1e-9 * np.trace(other) * np.eye(COLUMNS))
    u, s, vt = np.linalg.svd(table @ root, full_matrices=False)
    of_logits = (u[:, :RANK] * s[:RANK]) @ vt[:RANK] @ np.linalg.inv(root)
    lost = {"logits": changes(table, of_logits, hidden)}
    for name, known in {"both": moments, "lookups": one, "weights": None}.items():
        options = {"where": path, "moments": known}
        plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(RANK), multiple=1, **options)
        lower = rmtjax.truncate(params, plan, moments=known)
        lost[name] = changes(table, leaf_of(lower, path), hidden)
    # A hundredth more: where one use decides, a cut for it alone is as good.
    assert lost["both"] < 1.01 * min(lost["lookups"], lost["logits"], lost["weights"])
    if path != "kernel":
        assert lost["both"] < 0.7 * min(lost["lookups"], lost["logits"])


@pytest.mark.parametrize("diagonal", [True, False])
def test_weights_are_the_geometric_means_of_those_of_both_uses(diagonal):
    rng = np.random.default_rng(1)
    a, b = (x @ x.T for x in (rng.normal(size=(6, 6)), rng.normal(size=(4, 4))))
    a = np.diag(np.diag(a)) if diagonal else a
    matrix = rng.normal(size=(6, 4))
    first, last = _outputs._for_both(np.diag(a) if diagonal else a, b, matrix)
    first = np.diag(first) if diagonal else first
    energies = np.trace(matrix.T @ a @ matrix), np.trace(matrix @ b @ matrix.T)
    whole = np.kron(a / energies[0], np.eye(4)) + np.kron(np.eye(6), b / energies[1])
    # The logarithm of the product is the nearest to that of the sum among such products: the
    # difference has no part that is a sum over one side alone.
    difference = logm(whole) - logm(np.kron(first, last))
    parts = difference.reshape(6, 4, 6, 4)
    np.testing.assert_allclose(np.einsum("iaja->ij", parts), 0, atol=1e-9)
    np.testing.assert_allclose(np.einsum("iaib->ab", parts), 0, atol=1e-9)


def test_equal_moments_and_a_table_of_zeros_are_cut_too():
    unit, zeros = np.ones(6), np.zeros((6, 4))
    first, last = _outputs._for_both(unit, np.eye(4), np.ones((6, 4)))
    np.testing.assert_allclose(np.kron(np.diag(first), last), np.eye(24) / 12, atol=1e-12)
    assert _outputs._for_both(unit, np.eye(4), zeros)[1] is None


def test_they_are_added_chosen_saved_and_refused(tied, tmp_path):
    params, moments, path, hidden = tied
    rmtjax.checkpoint.save_moments(tmp_path / "m.safetensors", moments)
    loaded = rmtjax.checkpoint.load_moments(tmp_path / "m.safetensors")
    twice = (moments + loaded).of([path])
    assert [*twice.transposed] == [path]
    np.testing.assert_allclose(
        twice.transposed[path].second[0], 2 * hidden.T @ hidden, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="other inputs, or none"):
        _ = moments + replace(moments, transposed={})
    plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(RANK), where=path, moments=moments)
    cut = lambda tree: rmtjax.truncate(tree, plan, moments=moments)
    with pytest.raises(TypeError, match="outside `jit`"):
        jax.jit(cut)(params)
    wrong = jax.tree.map(lambda array: array[..., :50], moments.transposed)
    wrong[path] = replace(wrong[path], second=moments.transposed[path].second[:, :50, :50])
    with pytest.raises(ValueError, match="50 entries"):
        rmtjax.plan(params, where=path, moments=replace(moments, transposed=wrong))
    # Least squares for one use would harm the other.
    thin = rmtjax.factorize(params, plan, moments=moments)
    assert jax.tree.all(jax.tree.map(np.array_equal, thin, rmtjax.refit(params, thin, moments)))


def test_gradients_do_not_weigh_what_is_used_both_ways():
    module, variables = Tied(), Tied().init(jax.random.key(0), IDS)
    moments = rmtjax.linen.moments(module, variables, [IDS], key=jax.random.key(1))
    assert [*moments.gradients] == ["Dense_0/kernel"]
    plan = rmtjax.plan(variables["params"], moments=moments, budget=0.6)
    assert plan.cost.parameters_after <= 0.6 * plan.cost.parameters


def test_factors_that_are_used_both_ways_have_no_moments():
    module, variables = Tied(), Tied().init(jax.random.key(0), IDS)
    plan = rmtjax.plan(variables["params"], rule=rmtjax.ranks.fixed(RANK), multiple=1)
    thin = rmtjax.factorize(variables["params"], plan)
    moments = rmtjax.linen.moments(module, {"params": thin}, [IDS])
    assert [*moments] == ["Dense_0/kernel"]
    assert not moments.transposed
