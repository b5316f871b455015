"""Mixing per batch, inside the step: mixup and label smoothing make soft labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_cnns.errors import UserError
from flax_cnns.types import Array


def make_mix(config: Any, num_classes: int) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """`mix(images [n H W C], labels i32 [n], key) -> (images, soft labels f32 [n K])`; `config` is
    `config.mix`.

    Label smoothing gives the right class 1 - s + s/K and every other s/K
    (https://arxiv.org/abs/1512.00567, section 7). Mixup (https://arxiv.org/abs/1710.09412) draws
    one weight for the batch, from Beta(alpha, alpha), and pairs neighbours, i with i ^ 1, not a
    random permutation: the batch is in random order anyway, and neighbours stay on one device, so
    that with the same `key` everywhere the number of devices doesn't matter. All off: one-hot
    labels, images untouched. Raises UserError at trace time where mixup meets an odd batch.
    """
    smoothing, alpha = config.label_smoothing, config.mixup
    if not 0 <= smoothing < 1:
        raise UserError(f"mix.label_smoothing must be at least 0 and below 1; got {smoothing}")
    if alpha < 0:
        raise UserError(f"mix.mixup is the alpha of a Beta distribution, 0 for off; got {alpha}")

    def mix(images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
        soft = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        if smoothing:
            soft = (1 - smoothing) * soft + smoothing / num_classes
        if alpha:
            if len(labels) % 2:
                raise UserError(
                    "mixup pairs neighbours, so that each device needs an even number of "
                    f"images; got {len(labels)}"
                )
            weight = jax.random.beta(key, alpha, alpha)
            images = _blend(images, weight)
            soft = _blend(soft, weight)
        return images, soft

    return mix


def _blend(x: Array, weight: Array) -> Array:
    """Each row with its neighbour's: [n ...] -> [n ...]."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return (weight * pairs + (1 - weight) * pairs[:, ::-1]).reshape(x.shape).astype(x.dtype)
