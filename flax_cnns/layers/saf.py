"""SAF pooling (simple adaptive feature composition): the best features, some of them missing.

Hasanpour et al. 2018, https://arxiv.org/abs/1802.06205: "essentially the max-pooling operation
carried out before a dropout operation". The network learns to do without some of the strongest
responses, as it must where they are occluded or noisy.
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
    """[N H W C] -> [N H/window W/window C], rounded down; [N C] where `window` is None.

    In training the share `rate` of the pooled responses is turned off, in evaluation none. Which
    ones the paper does not put in a formula; there are two readings:

    - `choose="strongest"`, the name taken at its word: of each image's pooled responses, all places
      and channels together, the round(rate * count) largest; nothing random. Responses equal to the
      last of them go with it. The others stay as they are: the paper names no scaling, and what
      keeps the mean under a random choice does not here.
    - `choose="random"`, what its authors' published networks do (max pooling, then Caffe's
      dropout): every pooled response, each the strongest of its window, independently with
      probability `rate`, by the rng stream "dropout"; the others are multiplied by 1 / (1 - rate).

    Raises `UserError` where rate is not in [0, 1) or `choose` is unknown.
    """

    rate: float = 0.0
    window: int | None = 2
    choose: str = "strongest"

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if not 0 <= self.rate < 1:
            raise UserError(f"the rate of SAF pooling is from 0 to below 1, got {self.rate}")
        if self.choose not in CHOICES:
            near = did_you_mean(self.choose, CHOICES)
            raise UserError(f"unknown choice of SAF pooling {self.choose!r}{near}")
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
        weakest = lax.top_k(flat, count)[0][:, -1:]  # of those that are turned off
        return jnp.where(flat < weakest, flat, 0).reshape(x.shape)
