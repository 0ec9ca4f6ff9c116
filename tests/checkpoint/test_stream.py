"""Files analyzed and compressed a kernel at a time: what becomes of the tree."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import checkpoint, KernelAxes
from rmtjax.checkpoint._manifest import read_manifest
from rmtjax.checkpoint._open import open_tensors
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensors import Entry

AXES = KernelAxes((0,), (1,))
FIT = rmtjax.BulkFit(*np.float32([1, 2, 2, 0]), np.int32(0))
INDEX = "model.safetensors.index.json"
FIXED = rmtjax.ranks.fixed(16)


def spiked(seed, shape=(80, 60), spikes=2):
    """Noise with a few directions of signal, above any threshold."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((shape[0], np.prod(shape[1:], dtype=int)))
    noise[:, :spikes] += 5 * rng.standard_normal((shape[0], spikes))
    return noise.reshape(shape).astype(np.float32) / 10


def write(path, tensors, **metadata):
    entries = {name: Entry.of(array) for name, array in tensors.items()}
    write_tensors(path, entries, tensors.items(), metadata)
    return path


def read(path):
    with open_tensors(path) as tensors:
        return {name: tensors.read(name) for name in tensors.entries}


@pytest.fixture
def tree():
    bias = np.arange(60, dtype=np.float32)
    names = np.arange(7, dtype=np.int32)
    return {
        "Conv_0": {"kernel": spiked(1, (3, 3, 10, 60)), "bias": bias},
        "Dense_0": {"kernel": spiked(0), "bias": bias},
        "Dense_1": {"kernel": spiked(2)[:, :10]},
        "Embed_0": {"embedding": spiked(3).astype(jnp.bfloat16)},
        "step": names,
    }


@settings(max_examples=5)
@given(seed=st.integers(0, 99), spikes=st.integers(0, 5), half=st.booleans())
def test_a_file_has_the_report_of_its_tree(tmp_path_factory, seed, spikes, half):
    kernel = spiked(seed, spikes=spikes).astype(jnp.bfloat16 if half else np.float32)
    params = {"Dense_0": {"kernel": kernel}, "Dense_1": {"kernel": spiked(seed + 1)}}
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    checkpoint.save(path, params)
    rows = {row.path: row for row in checkpoint.analyze_file(path).rows}
    assert len(rows) == 2
    for other in rmtjax.analyze(params).rows:
        for found, wanted in zip(rows[other.path], other, strict=True):
            # One kernel or a batch of them: the order of the sums in float32.
            assert found == (pytest.approx(wanted, rel=1e-5) if type(wanted) is float else wanted)


@pytest.mark.parametrize("mode", ["factorize", "truncate"])
@pytest.mark.parametrize("shrink", [None, rmtjax.shrinkage.frobenius])
def test_compress_then_restore_is_the_change_of_the_tree(tmp_path, tree, mode, shrink):
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    checkpoint.save(path, tree)
    steps = []
    options = {"shrink": shrink, "multiple": 4}
    report = checkpoint.compress_file(
        path, out, mode=mode, progress=lambda *step: steps.append(step), **options
    )
    change = rmtjax.factorize if mode == "factorize" else rmtjax.truncate
    plan = rmtjax.plan(tree, **options)
    assert {row.path for row in report.rows} == plan.keys()
    wanted, found = change(tree, plan), checkpoint.restore(out)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)
    for (key, a), b in zip(
        jax.tree.leaves_with_path(rmtjax.merge(found)),
        jax.tree.leaves(rmtjax.merge(wanted)),
        strict=True,
    ):
        assert a.dtype == b.dtype, key
        # Entries are of the order of 1; bfloat16 has 8 bits.
        tolerance = 2e-2 if a.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(np.float64(a), np.float64(b), atol=tolerance)
    assert found["step"].tobytes() == tree["step"].tobytes()
    assert [done for done, _, _ in steps] == list(range(steps[-1][1]))


def test_kernels_are_chosen_by_paths_patterns_and_functions(tmp_path):
    names = ("a.weight", "b.weight", "c.mask")
    path = write(tmp_path / "a.safetensors", dict.fromkeys(names, spiked(0)))
    for where, chosen in (
        (r"re:^[bc]\.", ["b.weight", "c.mask"]),
        ({"c.mask": True, "a.weight": False}, ["c.mask"]),
        (lambda path, leaf: path == "a.weight" and np.asarray(leaf).shape == (80, 60), names[:1]),
    ):
        rows = checkpoint.analyze_file(path, rule=FIXED, where=where).rows
        assert [row.path for row in rows] == [*chosen]


def test_a_table_of_linen_knows_leaves_that_were_stacked_since(tmp_path):
    module, inputs = nn.Dense(60), jnp.ones((2, 80))
    variables = module.init(jax.random.key(0), inputs)
    axes = rmtjax.linen.kernel_axes(module, variables, inputs)
    tree = {"kernel": np.stack([spiked(0), spiked(1)]), "bias": np.zeros((2, 60), np.float32)}
    checkpoint.save(tmp_path / "a.safetensors", tree)
    report = checkpoint.analyze_file(tmp_path / "a.safetensors", rule=FIXED, axes=axes)
    assert report.plan["kernel"].axes == KernelAxes((1,), (2,), (0,))


def test_analyze_rounds_ranks_as_compress_does_where_asked(tmp_path, tree):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tree)
    reasons = lambda report: [row.reason for row in report.rows]
    cut = reasons(checkpoint.compress_file(path, tmp_path / "b.safetensors"))
    assert reasons(checkpoint.analyze_file(path, multiple=8)) == cut
    assert reasons(checkpoint.analyze_file(path)) == reasons(rmtjax.analyze(tree)) != cut


def test_what_was_compressed_is_judged_by_its_own_noise(tmp_path, tree):
    path, thin, again = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    checkpoint.save(path, tree)
    first = {row.path: row for row in checkpoint.compress_file(path, thin, multiple=1).rows}
    for row in checkpoint.analyze_file(thin).rows:
        assert (row.shape, row.spikes) == (first[row.path].shape, first[row.path].spikes)
        assert row.threshold == first[row.path].threshold
    # Another run leaves the factors alone, and they go on being told as such.
    checkpoint.compress_file(thin, again, where=lambda path, leaf: path == "Dense_1/kernel")
    assert {name: a.tobytes() for name, a in read(again).items()} == {
        name: a.tobytes() for name, a in read(thin).items()
    }
    assert checkpoint.load_plan(again).keys() == checkpoint.load_plan(thin).keys()
    assert checkpoint.restore(again)["Dense_0"]["kernel"].left.shape[-1] == 2
    # A lower rank replaces the factors by thinner ones.
    checkpoint.compress_file(again, thin, rule=rmtjax.ranks.fixed(1), multiple=1)
    assert checkpoint.restore(thin)["Dense_0"]["kernel"].left.shape == (80, 1)


def test_a_rule_is_told_where_it_is_that_of_all(tmp_path):
    path, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    write(path, {"a.weight": spiked(0), "b.weight": spiked(1)})
    only = lambda name: {"where": lambda path, leaf: path == name}

    def rule(source, target, rank, **options):
        checkpoint.compress_file(source, target, rule=rmtjax.ranks.fixed(rank), **options)
        with open_tensors(target) as opened:
            return read_manifest(opened).rule

    assert rule(path, out, 16, **only("a.weight")) == str(FIXED)
    assert rule(out, path, 16, **only("b.weight")) == str(FIXED)
    assert rule(path, out, 8, **only("a.weight")) is None  # the other has still that of before
    assert rule(path, out, 8) == str(rmtjax.ranks.fixed(8))


def test_torch_kernels_keep_their_order_and_the_rest_its_bits(tmp_path):
    bad = spiked(3)
    bad[5, 5] = np.nan
    tensors = {
        "conv.weight": spiked(1, (60, 20, 2, 2)),
        "bad.weight": bad,
        "depthwise.weight": spiked(2, (60, 1, 8, 8)),
        "fc.weight": spiked(0),
        "norm.weight": np.ones(60, np.float16),
        "norm.num_batches_tracked": np.asarray(7),
    }
    path = write(tmp_path / "torch.safetensors", tensors, format="pt")
    report = checkpoint.compress_file(path, tmp_path / "out.safetensors", rule=FIXED)
    reasons = {row.path: row.reason for row in report.rows}
    assert reasons.keys() == {"conv.weight", "bad.weight", "depthwise.weight", "fc.weight"}
    assert reasons["bad.weight"] == "kept: not finite"
    assert "no matrix" in reasons["depthwise.weight"]
    found = read(tmp_path / "out.safetensors")
    assert found["conv.weight/left"].shape == (60, 16)
    assert found["conv.weight/right"].shape == (16, 20, 2, 2)
    u, s, vt = np.linalg.svd(tensors["fc.weight"].astype(np.float64), full_matrices=False)
    product = found["fc.weight/left"] @ found["fc.weight/right"]
    # float32 of entries of the order of 1.
    np.testing.assert_allclose(product, (u[:, :16] * s[:16]) @ vt[:16], atol=1e-5)
    for name in ("bad.weight", "depthwise.weight", "norm.weight", "norm.num_batches_tracked"):
        assert found[name].tobytes() == tensors[name].tobytes()
        assert found[name].dtype == tensors[name].dtype
    with open_tensors(tmp_path / "out.safetensors") as opened:
        assert opened.metadata["format"] == "pt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": lambda path, leaf: False}, "no tensor is chosen as a kernel, of 7 .*'Conv_0"),
        ({"fits": {"none/kernel": FIT}}, "`fits` has 'none/kernel', which is not a path"),
        ({"batch": {"none/kernel": 1}}, "`batch` has 'none/kernel', which is none of the kernels"),
        ({"axes": {"none/kernel": AXES}}, "`axes` has 'none/kernel', which is not a path"),
        ({"where": {"none/kernel": True}}, "`where` has 'none/kernel', which is not a path"),
        ({"dtype": "float16"}, "`dtype` must be float32 or float64, got float16"),
        ({"dtype": "float64"}, "jax_enable_x64"),
        ({"mode": "shrink"}, "mode"),
        ({"multiple": 0}, "`multiple` must be an integer of at least 1"),
        ({"keep": 2.0}, "`keep` must be in"),
        ({"axes": {"Dense_0/kernel": KernelAxes((0,), (0,))}}, "`axes` must name each of the 2"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(tmp_path, tree, options, message):
    checkpoint.save(tmp_path / "a.safetensors", tree)
    with pytest.raises((TypeError, ValueError), match=message):
        checkpoint.compress_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_without_tensors_is_told(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match=r"^there are no tensors, and so no kernels\.$"):
        checkpoint.analyze_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["out", "out.st", "out.safetensors.old"])
def test_the_name_of_the_output_tells_its_format(tmp_path, name):
    path = write(tmp_path / "a.safetensors", {"fc.weight": spiked(0)})
    words = rf"`out` must end in \.safetensors, .* got '.*{name}': give '.*{name}\.safetensors'"
    with pytest.raises(ValueError, match=words):
        checkpoint.compress_file(path, tmp_path / name)
    assert [*tmp_path.iterdir()] == [path]


def test_the_input_is_never_written_over(tmp_path):
    path = write(tmp_path / "a.safetensors", {"fc.weight": spiked(0)})
    (tmp_path / "link").symlink_to(path)
    before = path.read_bytes()
    for source, out in ((path, path), (path, tmp_path / "link"), (tmp_path, path)):
        with pytest.raises(ValueError, match="`out` must not be the input"):
            checkpoint.compress_file(source, out)
    assert path.read_bytes() == before


def test_no_shard_and_no_blob_is_written_over(tmp_path):
    snapshot, blobs, plain = tmp_path / "snapshots" / "0", tmp_path / "blobs", tmp_path / "plain"
    for folder in (snapshot, blobs, plain):
        folder.mkdir(parents=True)
    for name in ("m-1", "m-2"):
        blob = write(blobs / name, {f"{name}.weight": spiked(0)})
        (snapshot / f"{name}.safetensors").symlink_to(blob)
        (plain / f"{name}.safetensors").write_bytes(blob.read_bytes())
    told = {"weight_map": {f"{name}.weight": f"{name}.safetensors" for name in ("m-1", "m-2")}}
    for folder in (snapshot, plain):
        (folder / INDEX).write_text(json.dumps(told))
    (tmp_path / "link").symlink_to(snapshot)
    contents = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    before = contents()
    for source, out in (
        (plain / INDEX, plain / "m-1.safetensors"),
        (plain / INDEX, plain / INDEX),
        (plain / INDEX, plain / "new.safetensors"),
        (snapshot, snapshot / "m-1.safetensors"),
        (snapshot, snapshot / "new.safetensors"),
        (snapshot, blobs / "m-2"),
        (tmp_path / "link", snapshot / "m-1.safetensors"),
        (snapshot, tmp_path / "link" / "m-1.safetensors"),
        (snapshot / "m-1.safetensors", blobs / "m-1"),
    ):
        with pytest.raises(ValueError, match="`out` must not be the input, nor be in it"):
            checkpoint.compress_file(source, out)
    assert contents() == before


def test_a_factor_takes_no_name_that_is_there(tmp_path):
    tensors = {"a/kernel": spiked(0), "a/kernel/left": spiked(1)}
    path, out = write(tmp_path / "a.safetensors", tensors), tmp_path / "out.safetensors"
    for where in (None, "a/*"):  # the other tensor stays, or becomes factors with longer names
        with pytest.raises(ValueError, match="'a/kernel/left', as another tensor"):
            checkpoint.compress_file(path, out, rule=FIXED, where=where)
    checkpoint.compress_file(path, out, rule=FIXED, mode="truncate")
    assert np.linalg.matrix_rank(read(out)["a/kernel"]) == 16


def test_a_lost_factor_is_named(tmp_path):
    path, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    write(path, {"a.weight": spiked(0)})
    checkpoint.compress_file(path, out, rule=FIXED)
    with open_tensors(out) as opened:
        metadata = dict(opened.metadata)
    half = {name: array for name, array in read(out).items() if name.endswith("right")}
    with pytest.raises(ValueError, match=r"lacks 'a\.weight/left'"):
        checkpoint.analyze_file(write(tmp_path / "c.safetensors", half, **metadata))
