"""Mixing of whole batches inside the training step: mixup, cutmix and label smoothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_cnns.errors import UserError
from flax_cnns.types import Array


def make_mix(
    config: Any, num_classes: int, *, task: str = "classes"
) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """Returns `mix(images [n H W C], labels, key) -> (images, soft labels f32 [n K])`. `config` is
    a run's `config.mix`, and K is `num_classes`. Labels are i32 [n], or f32 [n k] with k <= K.

    Label smoothing s gives the correct class 1 - s + s/K and every other class s/K
    (https://arxiv.org/abs/1512.00567, section 7). Soft labels p become (1 - s) p + s/K. A label y,
    0 or 1, of multilabel data becomes (1 - s) y + s/2.

    Mixup (https://arxiv.org/abs/1710.09412) draws one weight per batch from Beta(alpha, alpha).
    Cutmix (https://arxiv.org/abs/1905.04899) draws one box per batch, see `cutmix_weights`. If both
    are on, a fair coin per batch chooses between them. Both mix each image i with its neighbor
    i ^ 1 instead of a random partner: the batch is in random order anyway, and neighbors are on one
    device. With the same `key` on all devices, the result does not depend on the number of devices.
    If smoothing, mixup and cutmix are off, labels become one-hot and images are unchanged.

    Raises UserError if a value is out of range, and `mix` raises UserError at trace time if it must
    pair an odd number of images.
    """
    smoothing, mixup, cutmix = config.label_smoothing, config.mixup, config.cutmix
    if not 0 <= smoothing < 1:
        raise UserError(f"mix.label_smoothing must be at least 0 and below 1; got {smoothing}")
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise UserError(
                f"mix.{name} is the alpha of a Beta distribution, 0 for off; got {alpha}"
            )

    def draw_weights(key: Array, height: int, width: int) -> tuple[Array, Array]:
        """Draws the weight of an image's own pixels, [] or [H W 1], and of its own label, []."""
        if not cutmix:
            weight = jax.random.beta(key, mixup, mixup)
            return weight, weight
        key_box, key_coin = (jax.random.fold_in(key, i) for i in (1, 2))
        pixels, share = cutmix_weights(key_box, cutmix, height, width)
        if not mixup:
            return pixels, share
        heads, weight = jax.random.bernoulli(key_coin), jax.random.beta(key, mixup, mixup)
        return jnp.where(heads, weight, pixels), jnp.where(heads, weight, share)

    def mix(images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
        if labels.ndim == 1:
            soft = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        else:  # a head may have more classes than the data
            missing = num_classes - labels.shape[1]
            if missing < 0:
                raise UserError(
                    f"labels have {labels.shape[1]} columns, but the network has {num_classes}"
                    " classes"
                )
            soft = jnp.pad(labels.astype(jnp.float32), ((0, 0), (0, missing)))
        if smoothing:
            soft = (1 - smoothing) * soft + smoothing / (2 if task == "multilabel" else num_classes)
        if mixup or cutmix:
            if len(labels) % 2:
                raise UserError(
                    "mixup and cutmix pair neighbors, so each device needs an even number of "
                    f"images; got {len(labels)}"
                )
            image_weight, label_weight = draw_weights(key, *images.shape[1:3])
            images, soft = _blend(images, image_weight), _blend(soft, label_weight)
        return images, soft

    return mix


def cutmix_weights(key: Array, alpha: float, height: int, width: int) -> tuple[Array, Array]:
    """Draws a box for the partner's pixels. Returns (weights f32 [H W 1], 0 inside the box and 1
    outside; their mean []).

    The box has the image's aspect ratio and 1 - w of its area, with w from Beta(alpha, alpha). Its
    center is uniform over the image, and the part outside the image is cut off. The label's weight
    is therefore the share of the image outside the box, not w. Sides are rounded down to whole
    pixels, as in timm. The code of the authors and of torchvision rounds half the side, so their
    sides are even.
    """
    key_weight, key_center = jax.random.split(key)
    size = jnp.array([height, width])
    side = jnp.sqrt(1 - jax.random.beta(key_weight, alpha, alpha))
    box = (side * size).astype(jnp.int32)
    low = jax.random.randint(key_center, (2,), 0, size) - box // 2
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y >= low[0]) & (y < low[0] + box[0]) & (x >= low[1]) & (x < low[1] + box[1])
    pixels = jnp.where(inside, 0.0, 1.0)
    return pixels[..., None], pixels.mean()


def _blend(x: Array, weight: Array) -> Array:
    """Mixes each row with its neighbor: weight * own + (1 - weight) * neighbor, [n ...]."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return (weight * pairs + (1 - weight) * pairs[:, ::-1]).reshape(x.shape).astype(x.dtype)
