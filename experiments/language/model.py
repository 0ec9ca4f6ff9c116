"""A causal transformer on characters, in the form of GPT-2, with a kernel for each projection."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.language.text import VOCABULARY


@dataclass(frozen=True)
class Sizes:
    """The shape of the model."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    length: int = 128


class Block(nn.Module):
    """Attention to what came before, and two dense layers; both added to their inputs."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the inputs with what the block adds."""
        width, heads = self.sizes.width, self.sizes.heads
        normal = nn.LayerNorm(name="before_attention")(x)
        split = lambda y: y.reshape(*y.shape[:-1], heads, width // heads)
        query, key, value = (
            split(nn.Dense(width, name=name)(normal)) for name in ("query", "key", "value")
        )
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        mixed = nn.dot_product_attention(query, key, value, mask=mask)
        x = x + nn.Dense(width, name="out")(mixed.reshape(x.shape))
        normal = nn.LayerNorm(name="before_dense")(x)
        return x + nn.Dense(width, name="down")(nn.gelu(nn.Dense(4 * width, name="up")(normal)))


class Model(nn.Module):
    """Logits of the next character after each one."""

    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Returns the logits of the characters."""
        size, init = self.sizes, nn.initializers.normal(0.02)
        x = nn.Embed(VOCABULARY, size.width, embedding_init=init, name="characters")(tokens)
        places = nn.Embed(size.length, size.width, embedding_init=init, name="places")
        x = x + places(jnp.arange(tokens.shape[1]))[None]
        for place in range(size.layers):
            x = Block(size, name=f"block_{place}")(x)
        return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm(name="last")(x))


def in_block(path: str, leaf: Any) -> bool:
    """Returns True for the kernels of the blocks, which are those that are cut."""
    del leaf
    return path.startswith("block_") and path.endswith("/kernel")


def loss(logits: Float[Array, "b t v"], tokens: Int[Array, "b t"]) -> Float[Array, ""]:
    """Mean surprise of the next characters, in nats."""
    chances = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(chances, tokens[..., None], axis=-1))
