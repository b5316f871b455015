"""Normalization, all called alike: `make_norm` decides, a block says `norm(name=...)(x)`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Array, Dtype, ModuleDef

NORMS = ("batch", "group", "layer", "channel", "none")
_GROUP_SIZE = 16  # channels
# Flax's methods without the wrapper that interceptors and captured outputs see: called through
# `super()`, a norm would appear twice.
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
    """The network's normalization as a module that lacks only its name (and `scale_init`, at will).

    `"batch"`: Ioffe & Szegedy 2015. In training it normalizes by the batch (with `axis_name` by all
    devices' batches together) and moves the running statistics, else it uses those. `momentum`
    means `new = momentum * old + (1 - momentum) * batch`: PyTorch's 0.1 is 0.9 here. The running
    variance is the biased one; PyTorch keeps the unbiased one. With n values per channel and batch
    it moves toward (n - 1) / n of PyTorch's: 0.969 at n = 32, 0.984 at n = 64. Statistics are
    float32 whatever `dtype` is. Training on one value per channel raises `OneValueError` as it is
    traced; PyTorch refuses it too.
    `"group"`: Wu & He 2018 with 16 channels a group (their table 3), no statistics kept.
    `"layer"`: Ba, Kiros & Hinton 2016 as Wu & He 2018 take it for maps (their equation 4): mean and
    variance over H, W and C of each image, that is one group; gamma and beta per channel.
    `"channel"`: over C alone, at each pixel or token: ConvNeXt's and the transformers'.
    `"none"`: nothing, called alike. Convolutions in front of norms have no biases, and so neither
    a shift nor a scale is learned in its place: `layers.fixup` is how networks do without.
    `scale=False` leaves out gamma, the trainable scale.

    Raises `UserError` for an unknown name, and when called for channels that 16 does not divide.
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
    """A BatchNorm would be trained on one value per channel. Its result would be its bias, whatever
    the image, and no layer before it would learn."""

    def __init__(self, path: str, shape: tuple[int, ...]):
        super().__init__(
            f"{path}: BatchNorm of {list(shape)} would train on 1 value per channel, and give all"
            " images the same result; give it 2 images or more at a time, or larger images"
        )
        self.path, self.shape = path, shape


def check_value_count(layer: nn.BatchNorm, x: Array) -> None:
    """Raises `OneValueError` unless `layer` normalizes two values per channel or more of `x`, over
    all devices if it has an `axis_name`."""
    axes = (layer.axis,) if isinstance(layer.axis, int) else layer.axis
    values = x.size // max(math.prod(x.shape[axis] for axis in axes), 1)
    if values == 1 and layer.axis_name is not None:
        values *= lax.psum(1, layer.axis_name, axis_index_groups=layer.axis_index_groups)
    if values == 1:
        raise OneValueError(_name(layer), x.shape)


def _name(layer: nn.Module) -> str:
    return "/".join(layer.path) or "the network"


def check_batch_norms() -> Any:
    """A context in which Flax's own BatchNorm raises `OneValueError`, too."""

    def call(function: Callable, args: tuple, kwargs: dict, at: nn.module.InterceptorContext):
        layer = at.module
        trains = isinstance(layer, nn.BatchNorm) and layer.use_running_average is False
        if trains and at.method_name == "__call__":
            check_value_count(layer, args[0])
        return function(*args, **kwargs)

    return nn.intercept_methods(call)


class BatchNorm(nn.BatchNorm):
    """Raises `OneValueError` in training on one value per channel, and `UserError` where the
    running statistics, which training moves, are not mutable."""

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None, **kwargs: Any) -> Array:
        keeps = self.use_running_average if use_running_average is None else use_running_average
        if not keeps and not self.is_initializing():
            check_value_count(self, x)
            if not self.is_mutable_collection("batch_stats"):
                raise UserError(
                    f"train=True moves the running statistics of {_name(self)}: expected "
                    'apply(..., train=True, mutable=["batch_stats"]), which returns what moved too'
                )
        return _batch_norm(self, x, use_running_average, **kwargs)


class GroupNorm(nn.GroupNorm):
    """Raises `UserError` where the channels are not whole groups."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if x.shape[-1] % self.group_size:
            raise UserError(
                f'expected norm="batch", "layer", "channel" or "none", got "group": its '
                f"{self.group_size} channels do not divide the {x.shape[-1]} of "
                f"{'/'.join(self.path)}"
            )
        return _group_norm(self, x)


class NoNorm(nn.Module):
    """What stands in a norm's place: x -> x, without parameters."""

    scale_init: Callable | None = None

    def __call__(self, x: Array) -> Array:
        return x


def local_response_norm(
    x: Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> Array:
    """x / (k + alpha * sum of x^2 over `size` neighboring channels)^beta: [... C] -> [... C].

    Krizhevsky et al. 2012, section 3.3, with their constants; a sum, cut at the first and the last
    channel. Caffe and PyTorch divide alpha by `size`: pass alpha / size for theirs. Computed in
    float32.
    """
    square = jnp.square(x.astype(jnp.float32))
    before = size // 2
    padded = jnp.pad(square, [(0, 0)] * (x.ndim - 1) + [(before, size - 1 - before)])
    total = sum(padded[..., i : i + x.shape[-1]] for i in range(size))
    return (x * (k + alpha * total) ** -beta).astype(x.dtype)
