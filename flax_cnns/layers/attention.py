"""Multi-head attention: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_cnns.errors import UserError
from flax_cnns.types import Array, ModuleDef


def flat_dot_general(
    x: Array, kernel: Array, dimension_numbers: lax.DotDimensionNumbers, **options: Any
) -> Array:
    """`lax.dot_general` for `nn.Dense` on tokens: [... C] times [C F] as one product of matrices.

    Otherwise, the kernel's gradient on [N T C] contracts two axes, which takes XLA longer on a CPU.
    Raises AssertionError for other products than those of `nn.Dense`.
    """
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    assert kernel.ndim == 2
    flat = x.reshape(-1, x.shape[-1])
    product = lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v for each head: q, k and v [N T heads D] -> [N T heads D].

    The layer has no parameters. The softmax is computed in float32, whatever the inputs' dtype.
    """

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v)

    def macs(self, q: Array, k: Array, v: Array) -> int:
        """Returns the multiply-adds of q k^T and of the weights times v, for `analysis.cost`."""
        return q.size * k.shape[1] + v.size * q.shape[1]


class MultiHeadAttention(nn.Module):
    """Self-attention, in which every token attends to every token: [N T C] -> [N T C].

    The dense layer `qkv` has 3 C outputs: the queries of all heads, then the keys, then the values.
    Raises `UserError` if `heads` does not divide C.
    """

    heads: int
    dense: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        *batch, width = x.shape
        if width % self.heads:
            raise UserError(
                f"expected a number of heads that divides {width} channels, got {self.heads}"
            )
        qkv = self.dense(3 * width, name="qkv")(x)
        qkv = qkv.reshape(*batch, 3, self.heads, width // self.heads)
        y = Attention(name="products")(*jnp.moveaxis(qkv, -3, 0))
        return self.dense(width, name="out")(y.reshape(x.shape))
