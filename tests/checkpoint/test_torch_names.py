"""Tensors by the names of Torch: what is a kernel, which way round, and why others are left."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cli_models import names_of, save

import rmtjax
from rmtjax import checkpoint

RANK = 4
LEFT = "not a kernel by its name, unless `where` chooses it"


def draw(seed, *shape):
    """A kernel of low rank without noise, which factors of the rank give back."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((*shape[:-1], RANK))
    right = rng.standard_normal((*shape[:-2], RANK, shape[-1]))
    return (left @ right).astype(np.float32)


TABLE = draw(5, 96, 64)
KERNELS = {
    # Fused query, key and value, each layout as one matrix.
    "gpt2.h.0.attn.c_attn.weight": draw(0, 64, 192),  # Conv1D: (inputs, outputs)
    "gpt2.h.0.mlp.c_fc.weight": draw(1, 64, 256),
    "neox.attention.query_key_value.weight": draw(2, 192, 64),
    "phi.self_attn.qkv_proj.weight": draw(3, 128, 64),
    "mha.in_proj_weight": draw(4, 192, 64),
    # Grouped queries: keys and values have fewer outputs.
    "llama.self_attn.q_proj.weight": draw(6, 128, 128),
    "llama.self_attn.k_proj.weight": draw(7, 64, 128),
    # A tied head, saved twice, and experts that are saved each for itself.
    "model.embed_tokens.weight": TABLE,
    "lm_head.weight": TABLE,
    "mixtral.experts.0.w1.weight": draw(8, 128, 64),
}
OTHERS = {
    "gptq.qweight": (np.ones((16, 128), np.int32), "not floating (int32)"),
    "gptq.scales": (draw(9, 64, 128).astype(np.float16), LEFT),
    "bnb8.weight": (np.ones((128, 64), np.int8), "not floating (int8)"),
    "bnb4.weight": (np.ones((4096, 1), np.uint8), "not floating (uint8)"),
    "ct.weight_packed": (np.ones((128, 32), np.uint8), "not floating (uint8)"),
    "oss.experts.gate_up_proj_blocks": (np.ones((4, 99, 2, 16), np.uint8), "not floating (uint8)"),
    "fp8.weight": (np.asarray(draw(1, 128, 64), jnp.float8_e4m3fn), "too few bits (float8_e4m3fn)"),
    "fp8.weight_scale_inv": (draw(2, 64, 64), LEFT),
    "moe.experts.gate_up_proj": (draw(3, 4, 64, 128), LEFT),
    "moe.experts.weight": (
        draw(4, 4, 128, 64),
        "no matrix (shape (4, 128, 64)), unless `axes` says how it is one",
    ),
    "moe.gate.weight": (draw(5, 8, 64), "short side 8 under 50"),
}
# Without a row: vectors, positions and masks.
SILENT = {
    "gptq.qzeros": np.ones((1, 16), np.int32),
    "gptq.g_idx": np.ones(128, np.int32),
    "bnb8.SCB": np.ones(128, np.float32),
    "norm.weight": np.ones(64, np.float32),
    "position_ids": np.ones((1, 64), np.int64),
}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    others = {name: array for name, (array, _) in OTHERS.items()}
    path, out = save(folder, **KERNELS, **others, **SILENT), str(folder / "out.safetensors")
    options = {"rule": rmtjax.ranks.fixed(RANK), "multiple": 1}
    return path, out, checkpoint.compress_file(path, out, **options)


def test_each_tensor_has_its_row_or_none(compressed):
    _, _, report = compressed
    rows = {row.path: row for row in report.rows}
    assert rows.keys() == KERNELS.keys() | OTHERS.keys()
    assert {rows[name].action for name in KERNELS} == {"factorize"}
    for name, (array, reason) in OTHERS.items():
        assert (rows[name].reason, rows[name].spikes) == (f"kept: {reason}", None)
        assert rows[name].shape == array.shape
    assert report.others.tensors == len(SILENT)


def test_factors_give_each_kernel_back_the_way_it_is_stored(compressed):
    path, out, _ = compressed
    restored, stored = checkpoint.restore(out), checkpoint.restore(path)
    for name, kernel in KERNELS.items():
        factors = restored[name]
        assert factors.left.shape == (kernel.shape[0], RANK)
        # Products of float32.
        np.testing.assert_allclose(factors.left @ factors.right, kernel, atol=1e-4)
    for name in (*OTHERS, *SILENT):
        np.testing.assert_array_equal(restored[name], stored[name])
    halves = {f"{name}/{half}" for name in KERNELS for half in ("left", "right")}
    assert names_of(out) == halves | {*OTHERS, *SILENT}


def test_axes_make_kernels_of_a_stack_of_experts(compressed):
    path, *_ = compressed
    axes = {"moe.experts.gate_up_proj": rmtjax.KernelAxes((1,), (2,), (0,))}
    options = {"rule": rmtjax.ranks.fixed(RANK), "where": "moe.experts.gate_up_proj"}
    (row,) = checkpoint.analyze_file(path, axes=axes, **options).rows
    assert (row.action, row.rank) == ("factorize", RANK)


def test_select_names_no_quantized_tensor(compressed):
    path, *_ = compressed
    chosen = rmtjax.most_signal(checkpoint.analyze_file(path), top=1.0)
    assert not {*chosen} & {*OTHERS, *SILENT}
