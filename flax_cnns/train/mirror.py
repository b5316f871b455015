"""Mirror images: in training by epochs, and in evaluation beside the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from flax_cnns.types import Array, Batch, PyTree


def mirror_images(batch: Batch) -> Array:
    """Returns the images [n H W C], mirrored where the batch's "mirror" (bool [n]), if it has one,
    is True."""
    images = batch["image"]
    if "mirror" not in batch:
        return images
    return jnp.where(batch["mirror"][:, None, None, None], images[:, :, ::-1], images)


def average_mirrored(apply_fn: Callable) -> Callable:
    """Returns `apply_fn` with the mean of the outputs for images [N H W C] and for their mirror
    images."""

    def apply(variables: PyTree, images: Array, **options: Any) -> Array:
        straight = apply_fn(variables, images, **options)
        return (straight + apply_fn(variables, images[:, :, ::-1], **options)) / 2

    return apply
