"""A BERT encoder of sentences in plain Flax; it knows nothing of this library."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class Config:
    """The sizes of an encoder, named as in the `config.json` of a BERT."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float


class Layer(nn.Module):
    """Attention and two dense layers, each added to its input and normalised."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], mask: Bool[Array, "n 1 t t"]
    ) -> Float[Array, "n t d"]:
        """The next state of each token; `mask` says which tokens see which."""
        config = self.config
        norm = lambda name: nn.LayerNorm(epsilon=config.layer_norm_eps, name=name)
        attention = nn.MultiHeadDotProductAttention(config.num_attention_heads, name="attention")
        x = norm("attention_norm")(x + attention(x, mask=mask))
        hidden = nn.Dense(config.intermediate_size, name="intermediate")(x)
        hidden = nn.gelu(hidden, approximate=False)
        return norm("output_norm")(x + nn.Dense(config.hidden_size, name="output")(hidden))


class Bert(nn.Module):
    """The encoder of Devlin et al. (2019), for one sentence in a row."""

    config: Config

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "n t"], mask: Bool[Array, "n t"]
    ) -> tuple[Float[Array, "n t d"], Float[Array, "n d"]]:
        """Encodes tokens.

        Args:
          tokens: Indices into the vocabulary, padded at the end.
          mask: True for a token, False for padding.

        Returns:
          The state of each token, and the pooled state of the first, which the embedding of
          `embed` does not use.
        """
        config = self.config
        embedding = lambda size, name: nn.Embed(size, config.hidden_size, name=name)
        positions = jnp.arange(tokens.shape[1])[None]
        x = embedding(config.vocab_size, "words")(tokens)
        x += embedding(config.max_position_embeddings, "positions")(positions)
        x += embedding(config.type_vocab_size, "types")(jnp.zeros_like(positions))
        x = nn.LayerNorm(epsilon=config.layer_norm_eps, name="norm")(x)
        pairs = nn.make_attention_mask(jnp.ones_like(mask), mask, dtype=jnp.bool_)
        for index in range(config.num_hidden_layers):
            x = Layer(config, name=f"layer_{index}")(x, pairs)
        return x, jnp.tanh(nn.Dense(config.hidden_size, name="pooler")(x[:, 0]))


def pool(states: Float[Array, "n t d"], mask: Bool[Array, "n t"]) -> Float[Array, "n d"]:
    """The embedding of a sentence: the mean state of its tokens, of length 1."""
    total = jnp.sum(jnp.where(mask[..., None], states, 0), axis=1)
    # The number of tokens cancels out.
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)
