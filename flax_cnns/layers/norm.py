"""Normalisation, all called alike: `make_norm` decides, a block says `norm(name=...)(x)`."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Dtype, ModuleDef

NORMS = ("batch", "group")


def make_norm(
    norm: str,
    *,
    train: bool,
    axis_name: str | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> ModuleDef:
    """The network's normalisation as a module that lacks only its name (and `scale_init`, at will).

    `"batch"`: Ioffe & Szegedy 2015. In training it normalises by the batch (with `axis_name` by all
    devices' batches together) and moves the running statistics, else it uses those. `momentum`
    means `new = momentum * old + (1 - momentum) * batch`: PyTorch's 0.1 is 0.9 here. The running
    variance is the biased one, where PyTorch keeps the unbiased. Statistics are float32 whatever
    `dtype` is.
    `"group"`: Wu & He 2018 with 16 channels a group (their table 3), no statistics kept.

    Raises `UserError` for an unknown name.
    """
    if norm == "batch":
        return partial(
            nn.BatchNorm,
            use_running_average=not train,
            axis_name=axis_name,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    if norm == "group":
        return partial(
            nn.GroupNorm,
            num_groups=None,
            group_size=16,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    raise UserError(f"unknown norm {norm!r}{did_you_mean(norm, NORMS)}")
