"""Squeeze-and-excitation: channels are weighted by features of the whole image."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns.layers.initializers import he
from flax_cnns.layers.pool import global_avg_pool
from flax_cnns.types import Array, Dtype


class SqueezeExcite(nn.Module):
    """Multiplies each channel of each image by a gate in (0, 1): [N H W C] -> [N H W C].

    Hu et al. 2017, https://arxiv.org/abs/1709.01507, equations 2 to 4. The gate is computed by
    means over H and W, a dense layer to C / reduction (`reduce`), ReLU, a dense layer back to C
    (`expand`), and sigmoid. Both dense layers have biases, as in the authors' networks.
    """

    reduction: int = 16  # r
    divisor: int = 1  # C / r is rounded to a positive multiple of this; 8 in timm's SEModule
    inner: int | None = None  # the number of inner channels; overrides `reduction`
    activation: Callable = nn.relu
    gate: Callable = nn.sigmoid  # MobileNetV3: nn.hard_sigmoid
    kernel_init: Callable = he
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels, d = x.shape[-1], self.divisor
        inner = self.inner or max(d, int(channels / self.reduction + d / 2) // d * d)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        gate = dense(inner, "reduce")(global_avg_pool(x))  # [N H W C] -> [N C] -> [N C/r]
        gate = self.gate(dense(channels, "expand")(self.activation(gate)))
        return x * gate[:, None, None].astype(x.dtype)
