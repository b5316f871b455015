"""Normalization layers with one interface.

`make_norm` selects the layer, and a block calls `norm(name=...)(x)`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Array, Dtype, ModuleDef

NORMS = ("batch", "group", "layer", "channel", "none")
_GROUP_SIZE = 16  # channels
# Flax's methods without the wrapper for interceptors and captured outputs. A call through `super()`
# would show each norm to the interceptors twice.
_batch_norm = inspect.unwrap(nn.BatchNorm.__call__)
_group_norm = inspect.unwrap(nn.GroupNorm.__call__)


def make_norm(
    norm: str,
    *,
    train: bool,
    axis_name: str | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    scale: bool = True,
) -> ModuleDef:
    """Returns a norm as a partial, which a block calls with `name` and optionally `scale_init`.

    `norm` is one of:

    - "batch": Ioffe & Szegedy 2015. In training it normalizes by the statistics of the batch (with
      `axis_name`, of all devices' batches together) and updates the running statistics. In
      evaluation it normalizes by the running statistics. `momentum` means
      `new = momentum * old + (1 - momentum) * batch`: PyTorch's 0.1 is 0.9 here. The running
      variance is biased; PyTorch's is unbiased. With n values per channel in a batch, ours
      approaches (n - 1) / n of PyTorch's: 0.969 at n = 32, 0.984 at n = 64. Statistics are float32
      for every `dtype`. Tracing a training step with one value per channel raises `OneValueError`;
      PyTorch raises an error too.
    - "group": Wu & He 2018 with 16 channels per group (their table 3). It keeps no statistics.
    - "layer": Ba, Kiros & Hinton 2016, in the form of Wu & He 2018 for maps (their equation 4).
      Mean and variance are over H, W and C of each image, as with a single group; gamma and beta
      are per channel.
    - "channel": normalizes over C at each pixel or token, as in ConvNeXt and transformers.
    - "none": the identity. Convolutions before a norm have no bias, so with "none" the network
      learns no shifts and scales at these places. `layers.fixup` is a way to train without norms.

    `scale=False` omits gamma, the trainable scale.

    Raises `UserError` for an unknown name. The layer for "group" raises `UserError` if the number
    of channels is not a multiple of 16.
    """
    if norm == "batch":
        return partial(
            BatchNorm,
            use_running_average=not train,
            axis_name=axis_name,
            momentum=momentum,
            epsilon=epsilon,
            use_scale=scale,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    if norm == "group":
        return partial(
            GroupNorm,
            num_groups=None,
            group_size=_GROUP_SIZE,
            epsilon=epsilon,
            use_scale=scale,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    if norm == "layer":
        return partial(
            nn.GroupNorm,
            num_groups=1,
            epsilon=epsilon,
            use_scale=scale,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    if norm == "channel":
        return partial(
            nn.LayerNorm,
            epsilon=epsilon,
            use_scale=scale,
            use_fast_variance=False,  # tokens may have means far from zero
            dtype=dtype,
            param_dtype=param_dtype,
        )
    if norm == "none":
        return NoNorm
    raise UserError(f"unknown norm {norm!r}{did_you_mean(norm, NORMS)}")


class OneValueError(UserError):
    """A BatchNorm would be trained on one value per channel.

    Its output would be its bias for every image, and no layer before it would learn.
    """

    def __init__(self, path: str, shape: tuple[int, ...]):
        super().__init__(
            f"{path}: BatchNorm of {list(shape)} would train on 1 value per channel and give the"
            " same output for all images; use 2 images or more per batch, or larger images"
        )
        self.path, self.shape = path, shape


def check_value_count(layer: nn.BatchNorm, x: Array) -> None:
    """Raises `OneValueError` if `layer` would normalize one value of `x` per channel.

    If `layer` has an `axis_name`, the values on all devices count.
    """
    axes = (layer.axis,) if isinstance(layer.axis, int) else layer.axis
    values = x.size // max(math.prod(x.shape[axis] for axis in axes), 1)
    if values == 1 and layer.axis_name is not None:
        values *= lax.psum(1, layer.axis_name, axis_index_groups=layer.axis_index_groups)
    if values == 1:
        raise OneValueError(_name(layer), x.shape)


def _name(layer: nn.Module) -> str:
    return "/".join(layer.path) or "the network"


def check_batch_norms() -> AbstractContextManager[None]:
    """Returns a context in which Flax's own BatchNorm raises `OneValueError` too."""

    def check_and_call(
        function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        layer, is_call = context.module, context.method_name == "__call__"
        if isinstance(layer, nn.BatchNorm) and layer.use_running_average is False and is_call:
            check_value_count(layer, args[0])
        return function(*args, **kwargs)

    return nn.intercept_methods(check_and_call)


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` that explains two mistakes in training.

    Raises `OneValueError` if there is one value per channel, and `UserError` if the running
    statistics, which training updates, are not mutable.
    """

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None, **kwargs: Any) -> Array:
        is_eval = self.use_running_average if use_running_average is None else use_running_average
        if not is_eval and not self.is_initializing():
            check_value_count(self, x)
            if not self.is_mutable_collection("batch_stats"):
                raise UserError(
                    f"train=True updates the running statistics of {_name(self)}: expected "
                    'apply(..., train=True, mutable=["batch_stats"]), which also returns them'
                )
        return _batch_norm(self, x, use_running_average, **kwargs)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that raises `UserError` if `group_size` does not divide the channels."""

    @nn.compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        if self.group_size and x.shape[-1] % self.group_size:
            raise UserError(
                f'norm="group": expected a multiple of {self.group_size} channels, got '
                f'{x.shape[-1]} in {"/".join(self.path)}; norm can be "batch", "layer", "channel" '
                'or "none"'
            )
        return _group_norm(self, x, mask=mask)


class NoNorm(nn.Module):
    """The identity in a norm's place: x -> x, without parameters."""

    scale_init: Callable | None = None

    def __call__(self, x: Array) -> Array:
        return x


def local_response_norm(
    x: Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> Array:
    """Returns x / (k + alpha * sum of x^2 over `size` neighboring channels)^beta, [... C].

    Krizhevsky et al. 2012, section 3.3, with their constants. The sum is truncated at the first and
    the last channel. Caffe and PyTorch divide alpha by `size`: pass alpha / size to reproduce them.
    The computation is in float32.
    """
    square = jnp.square(x.astype(jnp.float32))
    before = size // 2
    padded = jnp.pad(square, [(0, 0)] * (x.ndim - 1) + [(before, size - 1 - before)])
    total = sum(padded[..., i : i + x.shape[-1]] for i in range(size))
    return (x * (k + alpha * total) ** -beta).astype(x.dtype)
