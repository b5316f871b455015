"""Checks of images and of networks' fields. Each error is one line."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from flax_cnns.errors import UserError
from flax_cnns.types import Array

MAX_IMAGE_CHANNELS = 4  # RGB and alpha
# The fields that functions of `layers` read from a network, with declarations for its class.
FIELD_DECLARATIONS = {
    "axis_name": "str | None = None",
    "backward": 'str = "shake"',
    "drop_path": "float = 0.0",
    "drop_path_global": "float = 0.0",
    "drop_path_mode": 'str = "batch"',
    "drop_path_schedule": 'str = "linear"',
    "dtype": "Any = jnp.float32",
    "forward": 'str = "shake"',
    "kernel_init": 'str | Callable = "he"',
    "level": 'str = "image"',
    "num_classes": "int | None = 10",
    "param_dtype": "Any = jnp.float32",
    "shake_drop": "float = 0.0",
    "shake_drop_alpha": "tuple[float, float] = (-1.0, 1.0)",
    "shake_drop_beta": "tuple[float, float] = (0.0, 1.0)",
    "shake_drop_level": 'str = "image"',
}


def check_images(images: Array, input_size: Sequence[int], smallest: int = 1) -> None:
    """Raises `UserError` unless images are [N H W C], with the expected C and H, W >= `smallest`.

    `input_size` is the network's (H, W, C); only its C must match.
    """
    if images.ndim != 4:
        raise UserError(f"expected images [N H W C], got the shape {tuple(images.shape)}")
    _, height, width, channels = images.shape
    if channels != input_size[-1]:
        if height == input_size[-1] and channels > MAX_IMAGE_CHANNELS:
            raise UserError(
                "images are [N H W C]: transpose (0, 2, 3, 1); expected "
                f"{input_size[-1]} channels last, got the shape {tuple(images.shape)}"
            )
        raise UserError(
            f"expected images of {input_size[-1]} channels, got {channels} in the shape "
            f"{tuple(images.shape)}; create_model(..., input_size=({height}, {width}, {channels})) "
            f"makes a network for them"
        )
    if min(height, width) < smallest:
        raise UserError(
            f"images of {height}x{width} are too small: the smallest is {smallest}x{smallest}"
        )


def check_stages(depths: Sequence[int], widths: Sequence[int]) -> None:
    """Raises `UserError` unless there are as many `depths` as `widths`."""
    if len(depths) != len(widths):
        raise UserError(
            f"expected a depth and a width for each stage, got depths {tuple(depths)} "
            f"and widths {tuple(widths)}"
        )


def check_fields(network: nn.Module, asker: str, *names: str) -> None:
    """Raises `UserError` for the first of the fields `names` that `network` lacks.

    `names` are keys of FIELD_DECLARATIONS. `asker` is the function of `layers` that reads them.
    """
    for name in names:
        if not hasattr(network, name):
            raise UserError(
                f"{type(network).__name__} has no field {name!r}, which layers.{asker} reads from "
                f"the network: add `{name}: {FIELD_DECLARATIONS[name]}` to its class"
            )
