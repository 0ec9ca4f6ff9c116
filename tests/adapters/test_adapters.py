"""What a fine-tuning has changed, against NumPy, and the adapter of it as PEFT would apply it."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import adapters, checkpoint, ranks, Spectrum
from rmtjax.adapters._difference import _without_noise
from rmtjax.cli import main

SHAPE = (80, 60)


@pytest.fixture
def tensors():
    """A base and a tuned model under Torch's names, of which two kernels have changed."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    names = [f"model.layers.{index}.proj.weight" for index in range(3)]
    base = {name: draw(*SHAPE) for name in names} | {"model.norm.weight": np.ones(60, np.float32)}
    tuned = dict(base)
    for rank, name in enumerate(names[:2], 2):
        tuned[name] = base[name] + 3 * draw(SHAPE[0], rank) @ draw(rank, SHAPE[1]) + draw(*SHAPE)
    return base, tuned | {"model.norm.weight": 2 * base["model.norm.weight"]}


@pytest.fixture
def paths(tensors, tmp_path):
    saved = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for path, tree in zip(saved, tensors, strict=True):
        checkpoint.save(path, tree)
    return saved


def test_a_row_is_the_plan_of_the_change_and_the_rest_is_named(tensors, paths):
    base, tuned = tensors
    checkpoint.save(paths[1], tuned | {"extra.weight": np.ones((3, 2), np.float32)})
    found = adapters.analyze_difference(*paths)
    assert [row.rank for row in found.report.rows] == [2, 3]
    for path, row in found.report.plan.items():
        alone = rmtjax.plan({path: tuned[path] - base[path]}, multiple=1)[path]
        assert (row.reason, row.rank) == (alone.reason, alone.rank)
        np.testing.assert_array_equal(row.spectrum.eigenvalues, alone.spectrum.eigenvalues)
    assert found.unchanged == ("model.layers.2.proj.weight",)
    assert found.others == ("model.norm.weight",)
    assert found.unmatched == ("extra.weight",)


def applied(folder, base):
    """The base with its adapter, by the formula of PEFT: W + alpha / r B A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    halves = checkpoint.restore(folder / "adapter_model.safetensors")
    result = dict(base)
    for module in config["target_modules"]:
        a, b = (halves[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        rank = config["rank_pattern"][module]
        assert (len(a), b.shape[1]) == (rank, rank)
        change = config["alpha_pattern"][module] / rank * np.asarray(b) @ np.asarray(a)
        result[f"{module}.weight"] += change
    return config, result


def test_an_adapter_is_the_truncated_change(tensors, paths, tmp_path):
    base, tuned = tensors
    found = adapters.extract_lora(*paths, tmp_path / "lora")
    config, result = applied(tmp_path / "lora", {k: v.copy() for k, v in base.items()})
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    assert len(config["target_modules"]) == 2
    for path, row in found.report.plan.items():
        u, s, vt = np.linalg.svd(np.float64(tuned[path]) - base[path])
        nearest = (u[:, : row.rank] * s[: row.rank]) @ vt[: row.rank]
        # Products in float32, relative to the largest singular value.
        np.testing.assert_allclose(result[path] - base[path], nearest, atol=2e-6 * s[0])


def save_both(folder, base, tuned):
    """Writes two checkpoints of the same names."""
    saved = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tree in zip(saved, (base, tuned), strict=True):
        checkpoint.save(path, tree)
    return saved


def low_rank(seed=1, rank=2):
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((80, rank)), rng.standard_normal((rank, 60))
    return (factors[0] @ factors[1]).astype(np.float32)


def test_each_kind_of_layer_has_the_halves_that_it_loads(tmp_path):
    change = low_rank()
    # Of a kernel of (80, 60): the axis that the inputs are on, None for what PEFT cannot load.
    inputs = {
        "torch.proj.weight": 1,
        "flax/proj/kernel": 0,
        "gpt2.attn.c_attn.weight": 0,  # Conv1D, turned by the option
        "gpt2.lm_head.weight": 1,  # a Linear beside it
        "gpt2.wte.weight": None,
        "torch.attn.in_proj_weight": None,
        "flax/embed/embedding": None,
    }
    saved = save_both(tmp_path, {n: 0 * change for n in inputs}, dict.fromkeys(inputs, change))
    found = adapters.extract_lora(*saved, tmp_path / "lora", fan_in_fan_out=True)
    halves = checkpoint.restore(tmp_path / "lora" / "adapter_model.safetensors")
    assert {*found.written} == {name for name, axis in inputs.items() if axis is not None}
    assert {row.path for row in found.report} == {*inputs}
    assert len(halves) == 2 * len(found.written)
    for name in found.written:
        module = name.replace("/", ".").rpartition(".")[0]
        a, b = (
            np.asarray(halves[f"base_model.model.{module}.lora_{half}.weight"]) for half in "AB"
        )
        shapes = {1: ((2, 60), (80, 2)), 0: ((2, 80), (60, 2))}
        assert (a.shape, b.shape) == shapes[inputs[name]]
        expected = change if inputs[name] == 1 else change.T
        # Float32, relative to the largest singular value.
        np.testing.assert_allclose(b @ a, expected, atol=2e-6 * np.linalg.norm(change))


@pytest.mark.parametrize(("shape", "turned"), [((64, 192), True), ((192, 64), False)])
def test_layers_of_gpt2_are_turned_by_their_shape(tmp_path, shape, turned):
    """PEFT 0.21 loads both: a `Conv1D` by `fan_in_fan_out`, and a linear layer of the same name."""
    draw = lambda *shape: np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    change = {"h.c_attn.weight": draw(shape[0], 2) @ draw(2, shape[1])}
    change["h.c_proj.weight"] = draw(64, 2) @ draw(2, 64)  # whose shape does not tell
    saved = save_both(tmp_path, {n: 0 * leaf for n, leaf in change.items()}, change)
    adapters.extract_lora(*saved, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == turned
    halves = checkpoint.restore(tmp_path / "lora" / "adapter_model.safetensors")
    for path, kernel in change.items():
        name = path.removesuffix("weight")
        a, b = (np.asarray(halves[f"base_model.model.{name}lora_{half}.weight"]) for half in "AB")
        expected = kernel.T if turned else kernel
        np.testing.assert_allclose(b @ a, expected, atol=2e-6 * np.linalg.norm(kernel))


def test_two_kernels_of_one_name_are_refused(tmp_path):
    change = low_rank()
    names = "a/b/kernel", "a.b/kernel"
    saved = save_both(tmp_path, {n: 0 * change for n in names}, dict.fromkeys(names, change))
    with pytest.raises(ValueError, match=r"would both be 'a\.b' in the adapter: rename"):
        adapters.extract_lora(*saved, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_change_without_noise_has_its_numerical_rank(tensors, tmp_path):
    base, _ = tensors
    name = "model.layers.0.proj.weight"
    saved = save_both(tmp_path, base, base | {name: base[name] + low_rank(rank=4)})
    found = adapters.extract_lora(*saved, tmp_path / "lora")
    (row,) = found.report.rows
    assert row.reason == "factorized: 4 of 60 are signal, rank 4 (no noise above rounding)"
    assert row.removed < 1e-10  # Float32 in squares.
    assert found.written == (name,)
    assert found.report.summary.endswith("call `rmtjax.adapters.extract_lora`.")


@pytest.mark.parametrize(("estimated", "rank"), [(True, 2), (False, 3)])
def test_an_estimate_knows_no_direction_near_the_rounding_of_squares(estimated, rank):
    # The third is a direction in an exact spectrum; of estimates of zeros, 1.9e-7 was the largest.
    eigenvalues = np.float32([[1.0, 2e-3, 2e-7, *np.zeros(57)]])
    spectra = Spectrum(eigenvalues, np.float32([1.0]))
    row = SimpleNamespace(
        spectra=spectra,
        estimated=estimated,
        noisy=np.array([False]),
        accepted=np.array([False]),
        signal=np.array([0]),
        fits=SimpleNamespace(threshold=np.float32([np.nan])),
        values=SimpleNamespace(num_exact=np.array([20])),
        _replace=lambda **new: new,
    )
    assert _without_noise(row) == {"accepted": np.array([True]), "signal": np.array([rank])}


def test_options_know_the_tensors_that_are_unchanged(tensors, paths):
    norm, unchanged = "model.norm.weight", "model.layers.2.proj.weight"
    for where in ("*layers.2.*", {unchanged: True}):
        found = adapters.analyze_difference(*paths, where=where)
        assert len(found.report) == 0
        assert len(found.others) == 3
        assert found.report.to_dict()["rows"] == []
    axes = {unchanged: rmtjax.KernelAxes((0,), (1,))}
    assert len(adapters.analyze_difference(*paths, axes=axes).report) == 2
    with pytest.raises(ValueError, match=r"'h.\*' matches no tensor, of 4"):
        adapters.analyze_difference(*paths, where="h.*")
    # Only a norm has changed: no kernel, and no error.
    base, tuned = tensors
    checkpoint.save(paths[1], base | {norm: tuned[norm]})
    found = adapters.analyze_difference(*paths)
    assert (len(found.report), found.others) == (0, (norm,))


def test_equal_infinities_are_no_change_and_eight_bits_are_subtracted(tmp_path):
    mask = np.where(np.tri(60, dtype=bool), 0, -np.inf).astype(np.float32)
    eighth = lambda array: array.astype(jnp.float8_e4m3fn)
    rest = {"mask": mask, "hole": np.full((2, 2), np.nan, np.float32)}
    kernels = (eighth(kernel) for kernel in (np.zeros((80, 60)), low_rank()))
    saved = save_both(tmp_path, *(rest | {"a.weight": kernel} for kernel in kernels))
    found = adapters.analyze_difference(*saved)
    assert {*found.unchanged} == {*rest}
    s = np.linalg.svd(np.float64(eighth(low_rank())), compute_uv=False)
    seen = found.report.plan["a.weight"].spectrum.eigenvalues
    np.testing.assert_allclose(seen, s**2 / 80, atol=2e-6 * s[0] ** 2 / 80, rtol=0)  # Float32.


def test_half_precision_is_subtracted_in_float32(tensors, tmp_path):
    base, tuned = tensors
    saved = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for path, tree in zip(saved, tensors, strict=True):
        checkpoint.save(path, {k: v.astype(np.float16) for k, v in tree.items()})
    for path, row in adapters.analyze_difference(*saved).report.plan.items():
        change = np.float64(tuned[path].astype(np.float16)) - base[path].astype(np.float16)
        expected = np.linalg.svd(change, compute_uv=False) ** 2 / max(SHAPE)
        # Float32, relative to the largest.
        np.testing.assert_allclose(
            row.spectrum.eigenvalues, expected, atol=2e-6 * expected[0], rtol=0
        )


def test_the_product_of_an_adapter_is_analyzed(tensors, paths, tmp_path):
    base, tuned = tensors
    adapters.extract_lora(*paths, tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    report = checkpoint.analyze_file(path, rule=ranks.energy(1.0))
    assert [row.shape for row in report.rows] == [SHAPE] * 2
    for row, rank in zip(report.rows, (2, 3), strict=True):
        name = row.path.removeprefix("base_model.model.")
        s = np.linalg.svd(np.float64(tuned[name]) - base[name], compute_uv=False)[:rank]
        seen = report.plan[row.path].spectrum.eigenvalues[:rank]
        np.testing.assert_allclose(seen, s**2 / max(SHAPE), rtol=1e-5)  # Float32.


def test_no_input_is_overwritten(paths, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    base, tuned = folder / "adapter_model.safetensors", paths[1]
    base.write_bytes(paths[0].read_bytes())
    for pair in ((base, tuned), (tuned, base)):
        with pytest.raises(ValueError, match="`out` must not be the input"):
            adapters.extract_lora(*pair, folder)
        assert main(["diff", *map(str, pair), "--json", str(base)]) == 1
        assert "--json must not be the input" in capsys.readouterr().err
    assert base.read_bytes() == paths[0].read_bytes()
    assert [path.name for path in folder.iterdir()] == [base.name]


def test_two_adapters_have_no_difference(tmp_path):
    saved = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for seed, path in enumerate(saved):
        halves = np.random.default_rng(seed).standard_normal((2, 60, 60)).astype(np.float32)
        checkpoint.save(path, {"m.lora_A.weight": halves[0], "m.lora_B.weight": halves[1]})
    with pytest.raises(ValueError, match=r"'m.lora_A.weight' is half of an adapter.*merge"):
        adapters.analyze_difference(*saved)


def test_faults_are_told(tensors, paths, tmp_path):
    thin = {k: v for k, v in tensors[0].items() if "layers.0" not in k}
    checkpoint.save(tmp_path / "thin.safetensors", thin)
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.proj\.weight' and others are in one alone"
    ):
        adapters.analyze_difference(paths[0], tmp_path / "thin.safetensors")
    with pytest.raises(ValueError, match=r"nothing has changed in .*base"):
        adapters.analyze_difference(paths[0], paths[0])
    with pytest.raises(ValueError, match=r"no kernel of .* has a change of low rank by fixed"):
        adapters.extract_lora(*paths, tmp_path / "lora", rule=ranks.fixed(60))
    assert not (tmp_path / "lora").exists()
    checkpoint.save(tmp_path / "other.safetensors", {"other": np.ones((3, 2), np.float32)})
    with pytest.raises(ValueError, match="no floating tensor of one name and shape"):
        adapters.analyze_difference(paths[0], tmp_path / "other.safetensors")


def test_the_command_line(paths, tmp_path, capsys):
    arguments = ["diff", *map(str, paths), "--lora", str(tmp_path / "lora")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "3 of 60 are signal, rank 3" in printed
    assert "Nothing is changed yet" not in printed
    assert "directions that changed: 5, in 2 of 2 changed kernels\nin the adapter: 2 (" in printed
    assert "unchanged: 1 (model.layers.2.proj.weight)\n" in printed
    assert "changed, and no kernel: 1 (model.norm.weight)\n" in printed
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert main(arguments) == 1
    assert "give --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    capsys.readouterr()
    file = str(tmp_path / "lora" / "adapter_config.json")
    assert main([*arguments[:-1], file, "--force"]) == 1
    assert "is a file: give the path of a folder" in capsys.readouterr().err
    for wrong in ([*arguments, "--multiple", "8"], [*arguments[:3], "--fan-in-fan-out"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert wrong[5 if "--lora" in wrong else 3] in capsys.readouterr().err
    assert main(["diff", *map(str, paths), "--quiet"]) == 0
    assert not capsys.readouterr().out
