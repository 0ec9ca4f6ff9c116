"""The table of `docs/layers.md`: each cell is a test in this file, and each test is a cell."""

import functools
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.layer_apis import assert_close, by_path, CAPABILITIES, Linen, Nnx
from helpers.layer_cases import CASES
from helpers.linen_checks import RANK
from helpers.slow import slow_except

from rmtjax import checkpoint, Factors, KernelAxes
from rmtjax._axes import is_factors

PAGE = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()


# One layer of each outcome. The others have fast tests of their outputs and gradients elsewhere.
FAST = (
    "linen-Conv",
    "linen-own layer, registered",
    "linen-own layer, not registered",
    "nnx-Linear",
    "nnx-Conv, grouped",
    "nnx-Einsum, inputs behind outputs",
)
each_layer = pytest.mark.parametrize("name", slow_except(FAST, CASES), scope="module")


@functools.cache
def layer(name):
    return {"linen": Linen, "nnx": Nnx}[name.partition("-")[0]](CASES[name])


def table(name):
    """A table of the page, by the first cell of its head: the other heads, and the rows."""
    pattern = rf"^\| {name} (\|.*)\n\|[-|]+\n((?:\|.*\n)+)"
    ((head, rows),) = re.findall(pattern, PAGE, re.MULTILINE)
    cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
    return cells(head), list(map(cells, rows.splitlines()))


@functools.cache
def lines_of(layer):
    """What the page says of the kernels of a layer: the names of each, and its axes."""
    named = lambda cell: [name.strip() for name in cell.split(",") if name.strip()]
    found = []
    for layers, kernels, axes, *groups in table("layer")[1]:
        if layer in [part.partition(" (")[0] for part in layers.split("; ")]:
            place = named(axes).index
            on_page = KernelAxes(*(tuple(map(place, named(group))) for group in groups))
            found.append((set(re.findall("`(.*?)`", kernels)), on_page))
    return found


def axes_on_page(name, path):
    """What the page says of the axes of a kernel: nothing where it is no matrix."""
    lines = lines_of(name.partition("-")[2])
    (axes,) = [axes for names, axes in lines if names & set(path.split("/"))] or [None]
    return axes


def to_matrices(kernel, axes):
    """A kernel as a stack of matrices in float64, by hand."""
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    shape = [np.prod([np.shape(kernel)[axis] for axis in group], dtype=int) for group in axes]
    stack = np.transpose(np.asarray(kernel, np.float64), order)
    return stack.reshape(shape[2], shape[0], shape[1])


@each_layer
def test_analyze(name):
    found, kernels = layer(name), by_path(layer(name).tree(layer(name).model))
    report = found.analyze()
    assert report.rows
    for path, row in report.plan.items():
        axes = axes_on_page(name, path)
        assert (row.axes, row.shape) == (axes, np.shape(kernels[path]))
        if found.cells["analyze"] == "left alone":
            assert "no matrix" in row.reason
            continue
        assert row.rank == RANK
        values = np.linalg.svd(to_matrices(kernels[path], axes), compute_uv=False) ** 2
        expected = values / max(to_matrices(kernels[path], axes).shape[1:])
        seen = np.reshape(row.spectrum.eigenvalues, expected.shape)
        # Float32, relative to the largest.
        np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-5 * expected.max())


@each_layer
def test_truncate(name):
    found = layer(name)
    before, after = by_path(found.tree(found.model)), by_path(found.tree(found.truncated))
    assert before.keys() == after.keys()
    for path in before:
        if path not in found.plan or found.cells["truncate"] == "left alone":
            np.testing.assert_array_equal(after[path], before[path])
            continue
        u, s, vt = np.linalg.svd(to_matrices(before[path], found.plan[path].axes))
        nearest = (u[:, :, :RANK] * s[:, None, :RANK]) @ vt[:, :RANK]
        seen = to_matrices(after[path], found.plan[path].axes)
        np.testing.assert_allclose(seen, nearest, rtol=0, atol=1e-5 * s.max())


def chain_rule(grad, factors, axes):
    """The gradients of the factors, from that of their product."""
    grad, rank = to_matrices(grad, axes), factors.left.shape[-1]
    left = np.reshape(factors.left, (*grad.shape[:2], rank))
    right = np.reshape(factors.right, (len(grad), rank, grad.shape[2]))
    of_left, of_right = grad @ np.swapaxes(right, 1, 2), np.swapaxes(left, 1, 2) @ grad
    return Factors(*map(np.reshape, (of_left, of_right), map(np.shape, factors)))


def assert_same_gradients(found, which, dense):
    """Outputs and gradients of factors against those of a dense model."""
    _, outputs, grads, of_inputs = found.gradients(which)
    _, wanted, of_dense, wanted_of_inputs = found.gradients(dense)
    assert_close(outputs, wanted)
    assert_close(of_inputs, wanted_of_inputs)
    expected = by_path(of_dense)
    for path, leaf in by_path(found.tree(getattr(found, which))).items():
        if is_factors(leaf):
            expected[path] = chain_rule(expected[path], leaf, found.plan[path].axes)
    assert_close(by_path(grads), expected)


@each_layer
def test_factorize(name):
    found = layer(name)
    cell, leaves = found.cells["factorize"], by_path(found.tree(found.thin))
    factorized = {path for path, leaf in leaves.items() if is_factors(leaf)}
    if cell == "left alone":
        jax.tree.map(np.testing.assert_array_equal, leaves, by_path(found.tree(found.model)))
        return
    assert factorized == (set() if cell == "in place" else found.plan.keys())
    assert_same_gradients(found, "thin", "truncated")
    assert_same_gradients(found, "full", "model")
    assert all("multiplied out" in words for words in found.words)
    assert bool(found.words) == (cell == "merged")


@each_layer
def test_train_on(name):
    found = layer(name)
    trained = found.step()
    before, after = by_path(found.tree(found.thin)), by_path(found.tree(trained))
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    adapter = found.case.wrt is nnx.LoRAParam
    for path in before:
        pairs = zip(jax.tree.leaves(before[path]), jax.tree.leaves(after[path]), strict=True)
        moved = [bool(np.any(one != other)) for one, other in pairs]
        if path != "key/bias":  # from which the softmax takes all effect
            assert moved == [not adapter or "lora_" in path] * len(moved), path
    assert found.gradient(trained)[0] < found.gradients("thin")[0]


@each_layer
def test_save(name, tmp_path):
    found, tree = layer(name), layer(name).tree(layer(name).thin)
    path = tmp_path / ("orbax" if list(CASES).index(name) % 2 else "thin.safetensors")
    checkpoint.save(path, tree, found.plan)
    restored = checkpoint.restore(path)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    decided = lambda plan: {path: (row.action, row.rank) for path, row in plan.items()}
    assert decided(checkpoint.load_plan(path)) == decided(found.plan)
    wanted = found.gradients("thin")[1]
    jax.tree.map(np.testing.assert_array_equal, found.gradient(found.refill(restored))[1], wanted)


def test_each_cell_of_the_page_is_a_test_and_each_test_a_cell():
    on_page, tested = {}, {}
    for api in ("linen", "nnx"):
        heads, rows = table(api)
        for name, *cells in rows:
            on_page |= {
                (head, f"{api}-{name}"): cell for head, cell in zip(heads, cells, strict=True)
            }
    for column, head in enumerate(CAPABILITIES):
        (mark,) = globals()[f"test_{head.replace(' ', '_')}"].pytestmark
        names = [name for param in mark.args[1] for name in param.values]
        tested |= {(head, name): CASES[name].cells[column] for name in names}
    assert on_page == tested


@pytest.mark.slow  # plans all models
def test_each_line_on_axes_is_of_a_kernel_of_a_layer():
    names = {name.partition("-")[2] for name in CASES}
    on_page = {
        part.partition(" (")[0] for line in table("layer")[1] for part in line[0].split("; ")
    }
    assert on_page == {name for name in names if lines_of(name)}
    for name, case in CASES.items():
        lines, places = lines_of(name.partition("-")[2]), {*"/".join(layer(name).plan).split("/")}
        assert all(names <= places for names, _ in lines)
        assert bool(lines) == (case.cells[0] == "yes")


EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_print_the_output_below_them(code, printed):
    output = StringIO()
    with redirect_stdout(output):
        exec(compile(code, "layers.md", "exec"), {"__name__": "layers"})
    assert output.getvalue() == printed
