"""The moments of the inputs of every layer, and the change of outputs that a plan tells."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from helpers.layer_apis import OPTIONS
from helpers.layer_cases import CASES, COLUMNS, HEADS, SEQUENCE, SQUARE, X
from helpers.layer_models import ROWS
from helpers.linen_checks import draw, make_variables, RANK
from helpers.nnx_checks import make_random
from helpers.slow import slow_except

import rmtjax
from rmtjax._axes import to_matrices

# Layers whose outputs are those of the model, so that their change is measured from outside.
ALONE = [
    *(f"linen-{name}" for name in ("Dense", "remat")),
    *(f"nnx-{name}" for name in ("Linear", "LinearGeneral", "LoRALinear")),
    *(f"{api}-{name}" for api in ("linen", "nnx") for name in ("Einsum", "Conv", "ConvTranspose")),
    *(f"{api}-Conv, strides, padding, dilation" for api in ("linen", "nnx")),
    *(f"{api}-{name}" for api in ("linen", "nnx") for name in ("vmap", "Conv, 1x1")),
    *(f"{api}-Einsum, inputs behind outputs" for api in ("linen", "nnx")),
    "linen-DenseGeneral",
]
FAST = ("linen-Dense", "linen-Conv, strides, padding, dilation", "nnx-LinearGeneral", "linen-vmap")


class Measured:
    """A case with its moments, its plan, and its outputs before and after."""

    def __init__(self, name):
        self.case, self.linen = CASES[name], name.startswith("linen")
        if self.linen:
            self.module = self.case.make()
            self.variables = make_variables(self.module, *self.case.inputs)
        else:
            self.model = make_random(self.case.make)

    @functools.cached_property
    def moments(self):
        if self.linen:
            return rmtjax.linen.moments(self.module, self.variables, [self.case.inputs])
        return rmtjax.nnx.moments(self.model, [self.case.inputs])

    @functools.cached_property
    def plan(self):
        options = {"moments": self.moments, **OPTIONS}
        if not self.linen:
            return rmtjax.nnx.analyze(self.model, **options).plan
        axes = rmtjax.linen.kernel_axes(self.module, self.variables, *self.case.inputs)
        return rmtjax.analyze(self.variables["params"], axes=axes, **options).plan

    def outputs(self, change):
        """Of the model as `rmtjax.truncate` or `rmtjax.factorize` leaves it, or as it is."""
        if not self.linen:
            model = self.model
            if change:
                model = getattr(rmtjax.nnx, change)(model, self.plan, moments=self.moments)
            return np.asarray(model(*self.case.inputs), np.float64)
        params = self.variables["params"]
        if change:
            params = getattr(rmtjax, change)(params, self.plan, moments=self.moments)
        run = jax.jit(functools.partial(rmtjax.linen.apply, self.module))
        return np.asarray(run({"params": params}, *self.case.inputs), np.float64)


measured = functools.cache(Measured)


@pytest.mark.parametrize("name", slow_except(FAST, ALONE))
def test_the_outputs_change_by_what_the_plan_says(name):
    found = measured(name)
    ((path, row),) = found.plan.items()
    assert row.rank == RANK
    count = np.prod([row.shape[axis] for axis in row.axes.outputs], dtype=int)
    stack = len(found.moments[path].rows)
    # A stack is told as the sum over its matrices, each with its rows.
    said = np.sum(row.loss.outputs[..., RANK])
    for change in ("truncate", "factorize"):
        moved = found.outputs(change) - found.outputs(None)
        seen = np.sum(moved**2) / (moved.size / count / stack)
        # The float32 of outputs: what is lost is over a hundredth of them.
        np.testing.assert_allclose(seen, said, rtol=1e-4)
    matrices = to_matrices(np.asarray(kernel_of(found, path), np.float64), row.axes)
    lost = np.sum(row.loss.squares[..., 0])
    np.testing.assert_allclose(lost, np.sum(matrices**2), rtol=1e-5)


def kernel_of(found, path):
    tree = found.variables["params"] if found.linen else rmtjax.nnx.params(found.model)
    for key in path.split("/"):
        tree = tree[key]
    return tree


def second(moments, path):
    return np.asarray(moments[path].second) / np.asarray(moments[path].rows).reshape(-1, 1, 1)


def assert_moment(moments, path, *stack):
    """The moment of a kernel against that of its rows, one array for each matrix of a stack."""
    expected = [rows.reshape(-1, rows.shape[-1]).astype(np.float64) for rows in stack]
    expected = np.stack([rows.T @ rows / len(rows) for rows in expected])
    # Sums of float32 in another order.
    np.testing.assert_allclose(second(moments, path), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_window_of_one_pixel_has_the_pixels_that_it_meets_for_rows(padding):
    x = np.random.default_rng(0).normal(size=(2, 4, 5, ROWS)).astype(np.float32)
    module = nn.Conv(COLUMNS, (1, 1), strides=(2, 3), padding=padding)
    moments = rmtjax.linen.moments(module, make_variables(module, x), [x])
    sides = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    assert_moment(moments, "kernel", np.pad(x, sides)[:, ::2, ::3])


ATTENTION = {
    "linen-MultiHeadDotProductAttention": lambda path: path,
    "nnx-MultiHeadAttention": lambda path: path,
}


@pytest.mark.parametrize("name", ATTENTION)
def test_query_key_and_value_share_one_matrix(name):
    moments = measured(name).moments
    paths = [f"{kind}/kernel" for kind in ("query", "key", "value")]
    assert len({dict(moments.names)[path] for path in paths}) == 1
    assert set(moments) == {*paths, "out/kernel"}
    for path in paths:
        assert_moment(moments, path, SEQUENCE[0])


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_an_embedding_has_the_frequencies_of_its_rows(api):
    ids = np.array([[0, 3, 3], [7, 3, 0]])
    if api == "linen":
        module = nn.Embed(ROWS, COLUMNS)
        moments = rmtjax.linen.moments(module, module.init(jax.random.key(0), ids), [ids, ids])
    else:
        moments = rmtjax.nnx.moments(nnx.Embed(ROWS, COLUMNS, rngs=nnx.Rngs(0)), [ids, ids])
    (moment,) = moments.values()
    assert moment.is_diagonal
    np.testing.assert_array_equal(moment.second[0], 2 * np.bincount(ids.ravel(), minlength=ROWS))
    assert moment.rows[0] == 12


def scanned(tree):
    """The inputs of each of the four layers that a scan applies one after another."""
    kernel, bias, x, rows = *tree, SQUARE[0], []
    for one in range(4):
        rows.append(x)
        x = np.tanh(x @ np.asarray(kernel)[one] + np.asarray(bias)[one])
    return rows


@pytest.mark.parametrize("name", ["linen-scan", "nnx-scan"])
def test_each_layer_of_a_scan_has_its_moment(name):
    found = measured(name)
    (path,) = found.moments
    layer = path.rpartition("/")[0]
    tree = [kernel_of(found, f"{layer}/{leaf}") for leaf in ("kernel", "bias")]
    assert_moment(found.moments, path, *scanned(tree))


@pytest.mark.parametrize("name", ["linen-shared", "nnx-shared"])
def test_a_kernel_that_is_used_twice_has_the_sum(name):
    found = measured(name)
    (path,) = found.moments
    layer = path.rpartition("/")[0]
    kernel, bias = (np.asarray(kernel_of(found, f"{layer}/{leaf}")) for leaf in ("kernel", "bias"))
    (x,) = SQUARE
    assert_moment(found.moments, path, np.concatenate([x, np.tanh(x @ kernel + bias)]))
    assert found.moments[path].rows[0] == 2 * len(x)


@pytest.mark.parametrize("name", ["linen-experts", "nnx-experts"])
def test_each_expert_has_its_own_rows(name):
    found = measured(name)
    gate = [np.asarray(kernel_of(found, f"gate/{leaf}")) for leaf in ("kernel", "bias")]
    (x,) = X
    shares = np.asarray(jax.nn.softmax(x @ gate[0] + gate[1]))
    assert_moment(found.moments, "gate/kernel", x)
    assert_moment(found.moments, "experts/kernel", *(shares[:, [k]] * x for k in range(4)))


@pytest.mark.parametrize(
    "name", ["linen-own layer, not registered", "nnx-own layer, not registered"]
)
def test_layers_of_users_are_seen(name):
    (path,) = measured(name).moments
    assert_moment(measured(name).moments, path, X[0])


CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell")


@pytest.mark.parametrize(
    "name",
    slow_except(["linen-LSTMCell"], [f"{api}-{c}" for api in ("linen", "nnx") for c in CELLS]),
)
def test_cells_have_the_inputs_of_all_steps(name):
    found = measured(name)
    of_inputs = [path for path, m in found.moments.items() if m.size == ROWS]
    assert set(found.moments) == set(found.plan)
    assert of_inputs
    for path in of_inputs:
        assert_moment(found.moments, path, SEQUENCE[0])


def test_thin_models_have_the_moments_of_their_left_factors():
    for name in ("linen-DenseGeneral", "nnx-LinearGeneral"):
        found = measured(name)
        if found.linen:
            thin = rmtjax.factorize(found.variables["params"], found.plan, moments=found.moments)
            again = rmtjax.linen.moments(found.module, {"params": thin}, [found.case.inputs])
        else:
            thin = rmtjax.nnx.factorize(found.model, found.plan, moments=found.moments)
            again = rmtjax.nnx.moments(thin, [found.case.inputs])
        assert again.keys() == found.moments.keys()
        (path,) = again
        assert_moment(again, path, HEADS[0].reshape(5, -1))


def test_thin_models_are_cut_again_by_output():
    for name in ("linen-Dense", "nnx-Linear"):
        found = measured(name)
        options = {"min_size": 1, "multiple": 1, "rule": rmtjax.ranks.fixed(1)}
        if found.linen:
            thin = rmtjax.factorize(found.variables["params"], found.plan, moments=found.moments)
            plan = rmtjax.plan(thin, moments=found.moments, **options)
            params = rmtjax.factorize(thin, plan, moments=found.moments)
            kernels = [rmtjax.merge(tree)["kernel"] for tree in (thin, params)]
        else:
            thin = rmtjax.nnx.factorize(found.model, found.plan, moments=found.moments)
            plan = rmtjax.nnx.plan(thin, moments=found.moments, **options)
            model = rmtjax.nnx.factorize(thin, plan, moments=found.moments)
            assert model.left_factor.kernel.shape == (ROWS, 1)
            kernels = [rmtjax.nnx.merge(one).kernel[...] for one in (thin, model)]
        moved = np.asarray(X[0] @ (kernels[0] - kernels[1]), np.float64)
        said = plan["kernel"].loss.outputs[1]
        np.testing.assert_allclose(np.sum(moved**2) / len(moved), said, rtol=1e-4)  # float32


def test_batches_of_tuples_keywords_and_mutable_state_are_as_those_of_apply():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, scale, *, train):
            x = nn.BatchNorm(use_running_average=not train)(x * scale)
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(COLUMNS)(x))

    x, module = draw(6, ROWS), Block()
    variables = module.init(jax.random.key(0), x, 2.0, train=False)
    batches = ((part, jnp.float32(2.0)) for part in (x[:3], x[3:]))
    steps = []
    moments = rmtjax.linen.moments(
        module, variables, batches, train=False, progress=lambda *step: steps.append(step)
    )
    # The statistics are those of the start, 0 and 1, so that only epsilon is between.
    assert_moment(moments, "Dense_0/kernel", 2 * x / np.sqrt(np.float32(1 + 1e-5)))
    assert steps == [(0, -1, "moments"), (1, -1, "moments")]


def test_a_model_of_nnx_is_called_as_the_user_says_and_stays_as_it_is():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dropout, self.dense = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(ROWS, 4, rngs=rngs)

        def __call__(self, x, *, scale):
            return self.dense(self.dropout(scale * x))

    model, (x,) = Block(nnx.Rngs(0)), X
    moments = rmtjax.nnx.moments(model, [x], call=lambda model, batch: model(batch, scale=3.0))
    assert_moment(moments, "dense/kernel", 3 * x)
    assert not model.dropout.deterministic


class Turned(nn.Module):
    """Multiplies as Torch does, by weights whose names say nothing of it."""

    @nn.compact
    def __call__(self, x):
        draw = lambda name, *shape: self.param(name, nn.initializers.normal(0.1), shape)
        x = x @ draw("patch_embed.weight", 5, 4).T
        x = jax.lax.conv(x[:, :, None, None], draw("a.weight", 6, 5, 1, 1), (1, 1), "SAME")
        return x[:, :, 0, 0] @ draw("embed.weight", 7, 6).T @ draw("b.weight", 7, 3)


def test_products_with_the_transpose_count_whatever_the_name():
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    variables = Turned().init(jax.random.key(0), x)
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in variables["params"].items()}
    axes = {name: ((1,), (0,)) for name in ("patch_embed.weight", "embed.weight")}
    axes |= {"a.weight": ((1, 2, 3), (0,)), "b.weight": ((0,), (1,))}
    found = rmtjax.linen.moments(Turned(), variables, [x], key=jax.random.key(1))
    assert {path: (one.inputs, one.outputs) for path, one in found.axes} == axes
    rows = {"patch_embed.weight": x}
    rows["a.weight"] = x @ weights["patch_embed.weight"].T
    rows["embed.weight"] = rows["a.weight"] @ weights["a.weight"][:, :, 0, 0].T
    rows["b.weight"] = rows["embed.weight"] @ weights["embed.weight"].T
    for path, one in rows.items():
        # Float32, sums over 20 rows.
        np.testing.assert_allclose(found[path].second[0], one.T @ one, rtol=1e-4, atol=1e-5)
    sides = {path: found.gradients[path].second.shape[-1] for path in axes}
    assert sides == {"patch_embed.weight": 5, "a.weight": 6, "embed.weight": 7, "b.weight": 3}
    assert all(np.any(one.second) for one in found.gradients.values())
