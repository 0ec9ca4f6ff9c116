"""A checkpoint is restored as it was saved, or not at all, and the error names the entry."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rmtjax
from rmtjax import checkpoint, Factorized, Factors, KernelAxes
from rmtjax.checkpoint import _manifest
from rmtjax.checkpoint._open import open_tensors
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensors import Entry

LEFT_RIGHT = ("a/left", "a/right")
THIN = {
    "Dense_0": {"kernel": Factors(jnp.ones((80, 8)), jnp.ones((8, 60))), "bias": jnp.zeros(60)},
    "Dense_1": {"kernel": jnp.ones((60, 80)), "bias": jnp.zeros(80)},
}
FIT = rmtjax.BulkFit(*np.float32([1.0, 2.0, 3.0, 0.1]), np.int32(4))
ROW = Factorized("factorized: 4 of 60", (80, 60), KernelAxes((0,), (1,)), 8, FIT)
PLAN = rmtjax.Plan({"Dense_0/kernel": ROW})


@pytest.fixture(params=["thin.safetensors", "thin"])
def path(request, tmp_path):
    return tmp_path / request.param


CHANGES = {
    "missing": (lambda tree: tree["Dense_0"].pop("bias"), "'Dense_0/bias' is not in `like`"),
    "extra": (lambda tree: tree.update(x=jnp.ones(1)), "'x' is missing"),
    "shape": (
        lambda tree: tree["Dense_0"].update(bias=jnp.ones(61)),
        "'Dense_0/bias' is float32 of shape (60,), and float32 of shape (61,) in `like`",
    ),
    "dtype": (
        lambda tree: tree["Dense_0"].update(bias=jnp.ones(60, jnp.bfloat16)),
        "and bfloat16 of shape (60,) in `like`",
    ),
    "dense": (
        lambda tree: tree["Dense_0"].update(kernel=jnp.ones((80, 60))),
        "'Dense_0/kernel' is missing; 'Dense_0/kernel/left' is not in `like`",
    ),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_like_is_filled_strictly(path, change, words):
    checkpoint.save(path, THIN)
    like = {name: dict(layer) for name, layer in THIN.items()}
    change(like)
    with pytest.raises(ValueError, match=r"cannot restore '.*thin") as caught:
        checkpoint.restore(path, like)
    assert words in str(caught.value)


DAMAGE = {
    "missing": (lambda arrays: arrays.pop("Dense_1/bias"), "'Dense_1/bias' is missing"),
    "half": (lambda arrays: arrays.pop("Dense_0/kernel/left"), "kernel/left' is missing"),
    "extra": (lambda arrays: arrays.update(x=np.ones(1)), "'x' is not in its manifest"),
    "shape": (
        lambda arrays: arrays.update({"Dense_1/bias": np.ones(3, np.float32)}),
        "float32 of shape (3,), and float32 of shape (80,) in its manifest",
    ),
    "dtype": (
        lambda arrays: arrays.update({"Dense_1/bias": np.ones(80)}),
        "float64 of shape (80,), and float32 of shape (80,) in its manifest",
    ),
}


@pytest.mark.parametrize(("change", "words"), DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("with_like", [False, True])
def test_what_was_saved_is_there_or_nothing_is_loaded(tmp_path, change, words, with_like):
    path = tmp_path / "thin.safetensors"
    checkpoint.save(path, THIN, PLAN)
    with open_tensors(path) as tensors:
        arrays = {name: tensors.read(name) for name in tensors.entries}
        metadata = dict(tensors.metadata)
    change(arrays)
    entries = {name: Entry.of(array) for name, array in arrays.items()}
    write_tensors(path, entries, arrays.items(), metadata)
    with pytest.raises(ValueError, match=r"cannot restore '.*thin\.safetensors'") as caught:
        checkpoint.restore(path, like=THIN if with_like else None)
    assert words in str(caught.value)


def write(path, manifest, **arrays):
    entries = {name: Entry.of(array) for name, array in arrays.items()}
    metadata = {} if manifest is None else {"rmtjax": manifest}
    write_tensors(path, entries, arrays.items(), metadata)


def test_a_plan_that_does_not_fit_its_tensors(tmp_path):
    path, text = tmp_path / "a.safetensors", _manifest.to_json(PLAN)
    halves = {"Dense_0/kernel/left": np.ones((80, 3)), "Dense_0/kernel/right": np.ones((3, 60))}
    more = {"Dense_0/kernel/left": np.ones((80, 9)), "Dense_0/kernel/right": np.ones((9, 60))}
    for arrays, words in (
        ({"x": np.ones(1)}, "for another tree: it has 'Dense_0/kernel' .* is not there"),
        ({"Dense_0/kernel": np.ones((80, 61))}, r"of shape \(80, 60\), which has shape \(80, 61\)"),
        (halves, "which is factorized with rank 3, and not 8"),
        (more, "which is factorized with rank 9, and not 8"),
        (halves | {"Dense_0/kernel/right": np.ones((4, 60))}, "the halves of 'Dense_0/kernel'"),
    ):
        write(path, text, **arrays)
        with pytest.raises(ValueError, match=words):
            checkpoint.restore(path)
    write(path, json.dumps({"format": 9}), x=np.ones(1))
    with pytest.raises(ValueError, match=r"cannot restore .*format 9, .* knows 3: upgrade it"):
        checkpoint.restore(path)


NO_FACTORS = {
    "vectors": (np.ones((), np.float32), np.ones(80, np.float32)),
    "ranks": (np.ones((100, 2), np.float32), np.ones((7, 80), np.float32)),
    "axes": (np.ones((7, 2), np.float32), np.ones((7, 2, 80), np.float32)),
    "nothing": (np.ones((100, 0), np.float32), np.ones((0, 80), np.float32)),
    "integers": (np.ones((100, 8), np.int32), np.ones((8, 80), np.int32)),
    "dtypes": (np.ones((100, 8), np.float16), np.ones((8, 80), np.float32)),
}


@pytest.mark.parametrize("pair", NO_FACTORS.values(), ids=NO_FACTORS.keys())
def test_halves_that_are_none_are_refused_everywhere(tmp_path, pair):
    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    write(path, _manifest.to_json(None, factors=["a"]), **dict(zip(LEFT_RIGHT, pair, strict=True)))
    for use in (
        checkpoint.restore,
        checkpoint.analyze_file,
        lambda path: checkpoint.compress_file(path, out),
        lambda path: checkpoint.save(out, {"a": Factors(*pair)}),
    ):
        with pytest.raises(ValueError, match=r"the halves of 'a' are .* one rank and one floating"):
            use(path)
    assert [*tmp_path.iterdir()] == [path]


def test_a_kernel_is_dense_or_factors(tmp_path):
    path, half = tmp_path / "a.safetensors", np.ones((60, 60), np.float32)
    write(path, _manifest.to_json(None, factors=["a"]), **dict.fromkeys(["a", *LEFT_RIGHT], half))
    for use in (checkpoint.restore, checkpoint.analyze_file):
        with pytest.raises(ValueError, match="'a' dense and as factors"):
            use(path)


def test_a_folder_does_not_lose_its_manifest_unnoticed(tmp_path):
    checkpoint.save(tmp_path / "thin", THIN, PLAN)
    told = tmp_path / "thin" / "_CHECKPOINT_METADATA"
    told.write_bytes(told.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cannot read '.*thin'"):
        checkpoint.restore(tmp_path / "thin")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, "two leaves have the path 'a/b'"),
        ({"a": "text"}, "a leaf of dtype str at 'a'"),
        ({"a": jax.random.key(0)}, "of dtype key<fry> at 'a', .*take `jax.random.key_data`"),
        ({"a": jnp.ones(1, jnp.int4)}, "of dtype int4 at 'a'"),
        (jnp.ones(1), "a name for each leaf"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(path, params, words):
    with pytest.raises(ValueError, match=words):
        checkpoint.save(path, params)
    assert [*path.parent.iterdir()] == []


def test_a_plan_of_another_tree_is_not_saved(path):
    with pytest.raises(
        ValueError, match=r"for another tree: it has 'Dense_0/kernel' .* is not there"
    ):
        checkpoint.save(path, {"a": jnp.ones(1)}, PLAN)
    with pytest.raises(TypeError, match="plan"):
        checkpoint.save(path, THIN, rmtjax.Report(PLAN))
    with pytest.raises(TypeError, match="rule"):
        checkpoint.save(path, THIN, PLAN, "bema")


def test_the_state_of_a_thin_nnx_model_is_refused_and_its_params_are_saved(path):
    linear = nnx.Sequential(nnx.Linear(80, 60, rngs=nnx.Rngs(0)))
    plan = rmtjax.nnx.plan(linear, rule=rmtjax.ranks.fixed(8))
    thin = rmtjax.nnx.factorize(linear, plan)
    for how in ([], [plan]):
        words = r"kernel', a single factor: of a thin .* save `rmtjax\.nnx\.params\(model\)`"
        with pytest.raises(ValueError, match=words):
            checkpoint.save(path, nnx.state(thin), *how)
    told = nnx.State({"layers": {0: {"kernel": {"left": jnp.ones(1), "right": jnp.ones(1)}}}})
    with pytest.raises(ValueError, match="'layers/0/kernel/left', a single factor"):
        checkpoint.save(path, told, plan)  # as a registered layer holds them
    assert [*path.parent.iterdir()] == []
    optimizer = nnx.Optimizer(thin, optax.adam(1e-3), wrt=nnx.Param)
    tree = {"params": rmtjax.nnx.params(thin), "opt_state": nnx.state(optimizer)["opt_state"]}
    checkpoint.save(path, tree)
    restored = checkpoint.restore(path, like=tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def test_a_file_from_elsewhere_is_nested_by_its_slashes(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, None, **{"a/b": np.float32([1]), "encoder.weight": np.float32([2])})
    restored = checkpoint.restore(path)
    assert jax.tree.map(float, jax.tree.map(jnp.squeeze, restored)) == {
        "a": {"b": 1.0},
        "encoder.weight": 2.0,
    }
    for names in (["a", "a/b"], ["a/b", "a"]):
        write(path, None, **dict.fromkeys(names, np.ones(1)))
        with pytest.raises(ValueError, match="restore it by `like`"):
            checkpoint.restore(path)
