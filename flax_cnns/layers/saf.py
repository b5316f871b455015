"""SAF pooling (simple adaptive feature composition): max pooling, then dropout of its results.

Hasanpour et al. 2018, https://arxiv.org/abs/1802.06205: "essentially the max-pooling operation
carried out before a dropout operation". The network learns to do without some of the strongest
responses, as it must if they are occluded or noisy.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.layers.pool import max_pool
from flax_cnns.types import Array

CHOICES = ("strongest", "random")


class SAFPool(nn.Module):
    """Max pooling that drops responses: [N H W C] -> [N H/window W/window C], rounded down.

    If `window` is None, the maximum is over the whole map: [N C]. In training, the fraction `rate`
    of the pooled responses is set to zero; in evaluation, all responses are kept. The paper does
    not define which responses to drop. There are two readings:

    - `choose="strongest"` takes the paper's description literally. In each image, over all
      positions and channels, the round(rate * count) largest pooled responses are set to zero, with
      all responses equal to the smallest of them. Nothing is random. The remaining responses are
      not rescaled: the paper names no factor, and dropout's factor would not keep the mean here.
    - `choose="random"` is what the authors' published networks do: max pooling, then Caffe's
      dropout. Each pooled response is set to zero independently with probability `rate`, drawn from
      the stream "dropout". The others are multiplied by 1 / (1 - rate).

    Raises `UserError` if `rate` is not in [0, 1) or `choose` is unknown.
    """

    rate: float = 0.0
    window: int | None = 2
    choose: str = "strongest"

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if not 0 <= self.rate < 1:
            raise UserError(f"SAF pooling: expected a rate from 0 to below 1, got {self.rate}")
        if self.choose not in CHOICES:
            hint = did_you_mean(self.choose, CHOICES)
            raise UserError(f"SAF pooling: unknown choice {self.choose!r}{hint}")
        if self.window is None:
            x = jnp.max(x, axis=(1, 2))
        else:
            x = max_pool(x, self.window, self.window)
        if self.choose == "random":
            return nn.Dropout(self.rate, deterministic=not train, name="dropout")(x)
        flat = x.reshape(x.shape[0], -1)
        count = round(self.rate * flat.shape[1])
        if not train or count == 0:
            return x
        threshold = lax.top_k(flat, count)[0][:, -1:]  # the smallest response to drop
        return jnp.where(flat < threshold, flat, 0).reshape(x.shape)
