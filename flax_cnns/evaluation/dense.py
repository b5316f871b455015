"""Dense evaluation: a network with dense layers slides over a larger image.

Sermanet et al. 2014 (OverFeat, section 3.3); Simonyan & Zisserman 2015 (VGG, section 3.2): fc6
becomes a convolution over the last maps, fc7 and the head become 1x1 convolutions, and the logits
are averaged over positions. This package's AlexNet, ZFNet and VGG call that layer fc6. Networks
with global pooling take larger images as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree

_DENSE = "fc6"


def make_dense_apply(model: nn.Module, variables: PyTree) -> Callable[..., Array]:
    """Returns `apply(variables, images, train=False) -> logits f32 [N K]`, the mean over all
    positions of the head.

    At the network's own size there is one position, and the logits are those of the network. Raises
    UserError for a network without the dense layer fc6 on maps.
    """
    kernel = variables["params"].get(_DENSE, {}).get("kernel")
    if kernel is None:
        raise UserError(
            f"--dense: {type(model).__name__} has no dense layer {_DENSE} on its maps, as AlexNet,"
            " ZFNet and VGG have; a network with global pooling takes --scales"
        )

    def apply(variables: PyTree, images: Array, *, train: bool = False) -> Array:
        maps: list[Array] = []

        def slide(
            function: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
        ) -> Any:
            layer = context.module
            if context.method_name != "__call__":
                return function(*args, **kwargs)
            if isinstance(layer, nn.Dense) and layer.name == _DENSE:
                return _convolve(maps[-1], layer.variables["params"], layer.dtype)
            out = function(*args, **kwargs)
            if getattr(out, "ndim", 0) == 4:
                maps.append(out)
            return out

        with nn.intercept_methods(slide):
            logits: Any = model.apply(variables, images, train=train)
        return jnp.asarray(logits, jnp.float32).mean(tuple(range(1, logits.ndim - 1)))

    return apply


def _convolve(maps: Array, params: PyTree, dtype: Any) -> Array:
    """fc6 as a convolution over maps [N h w C]: [N h-side+1 w-side+1 features]."""
    kernel = params["kernel"]
    channels = maps.shape[-1]
    side = math.isqrt(kernel.shape[0] // channels)
    if side * side * channels != kernel.shape[0] or min(maps.shape[1:3]) < side:
        raise UserError(
            f"--dense: {_DENSE} takes maps of {side}x{side}, but this image gives"
            f" {maps.shape[1]}x{maps.shape[2]}x{channels}; use a larger image"
        )
    kernel = kernel.reshape(side, side, channels, -1)
    dtype = maps.dtype if dtype is None else dtype
    out = jax.lax.conv_general_dilated(
        maps.astype(dtype),
        kernel.astype(dtype),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out + params["bias"].astype(dtype)
