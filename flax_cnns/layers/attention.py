"""Attention of many heads: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns.errors import UserError
from flax_cnns.types import Array, ModuleDef


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v for each head: three of [N T heads D] -> [N T heads D].

    Without parameters. The softmax is computed in float32, whatever the products are.
    """

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v)

    def macs(self, q: Array, k: Array, v: Array) -> int:
        """Of both products, for `analysis.cost`: q k^T, and the weights by v."""
        return q.size * k.shape[1] + v.size * q.shape[1]


class MultiHeadAttention(nn.Module):
    """Every token looks at every token: [N T C] -> [N T C].

    `qkv` is one dense layer to 3 C channels: the queries of all heads, then keys, then values.
    Raises `UserError` where the heads do not divide C.
    """

    heads: int
    dense: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        *batch, width = x.shape
        if width % self.heads:
            raise UserError(f"expected heads that divide {width} channels, got {self.heads}")
        qkv = self.dense(3 * width, name="qkv")(x)
        qkv = qkv.reshape(*batch, 3, self.heads, width // self.heads)
        y = Attention(name="products")(*jnp.moveaxis(qkv, -3, 0))
        return self.dense(width, name="out")(y.reshape(x.shape))
