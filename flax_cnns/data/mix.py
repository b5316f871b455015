"""Mixing per batch, inside the step: mixup, cutmix and label smoothing make soft labels."""

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
    """`mix(images [n H W C], labels, key) -> (images, soft labels f32 [n K])`; `config` is
    `config.mix`; labels are i32 [n], or f32 [n K] of K classes or fewer.

    Label smoothing gives the right class 1 - s + s/K and every other s/K
    (https://arxiv.org/abs/1512.00567, section 7), and soft labels p the mean (1 - s) p + s/K; a
    label y of multilabel data, 0 or 1, becomes (1 - s) y + s/2.

    Mixup (https://arxiv.org/abs/1710.09412) draws one weight for the batch, from Beta(alpha,
    alpha); cutmix (https://arxiv.org/abs/1905.04899) one box, see `cutmix_weights`; with both on a
    fair coin a batch says which. Both pair neighbors, i with i ^ 1, not a random permutation: the
    batch is in random order anyway, and neighbors stay on one device, so that with the same `key`
    everywhere the number of devices doesn't matter. All off: one-hot labels, images untouched.
    Raises UserError, at trace time where an odd batch is to be paired.
    """
    smoothing, mixup, cutmix = config.label_smoothing, config.mixup, config.cutmix
    if not 0 <= smoothing < 1:
        raise UserError(f"mix.label_smoothing must be at least 0 and below 1; got {smoothing}")
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise UserError(
                f"mix.{name} is the alpha of a Beta distribution, 0 for off; got {alpha}"
            )

    def weights(key: Array, height: int, width: int) -> tuple[Array, Array]:
        """Of the own image, [] or per pixel [H W 1]; of the own label []."""
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
                    "mixup and cutmix pair neighbors, so that each device needs an even number "
                    f"of images; got {len(labels)}"
                )
            of_images, of_labels = weights(key, *images.shape[1:3])
            images, soft = _blend(images, of_images), _blend(soft, of_labels)
        return images, soft

    return mix


def cutmix_weights(key: Array, alpha: float, height: int, width: int) -> tuple[Array, Array]:
    """(weights f32 [H W 1], 0 in a box that the partner fills and 1 around it; their mean []).

    The box has the image's proportions and 1 - w of its area, w from Beta(alpha, alpha); its center
    is uniform over the image, and what would lie outside is cut off. So the label's weight is what
    is left of the image, not w. Sides are whole pixels, rounded down, as in timm; the authors' code
    and torchvision's halve them first, so that theirs are even.
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
    """Each row with its neighbor's, by a weight that all share: [n ...] -> [n ...]."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return (weight * pairs + (1 - weight) * pairs[:, ::-1]).reshape(x.shape).astype(x.dtype)
