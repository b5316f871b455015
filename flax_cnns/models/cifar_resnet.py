"""The ResNets for CIFAR-10, section 4.2: 6n + 2 layers, widths 16, 32, 64, no weight in a shortcut.

The paper's "option A" leaves open where the zeros of the wider shortcut go: ours are behind the
channels that there are. Where maps shrink the shortcut takes every second pixel ("stride of 2").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Deep Residual Learning for Image Recognition",
    authors="He, Zhang, Ren, Sun",
    year=2015,
    url="https://arxiv.org/abs/1512.03385",
)


def shortcut_a(x: Array, width: int, stride: int) -> Array:
    """Option A: [N H W C] -> [N H/stride W/stride width], every stride-th pixel, zeros behind C."""
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


class Block(nn.Module):
    """Two 3x3: [N H W C] -> [N H/stride W/stride width], rounded up."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        y = self.conv(self.width, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.width, (3, 3), padding=1, name="conv2")(y)
        y = self.norm(name="norm2", scale_init=last)(y)
        return nn.relu(shortcut_a(x, self.width, self.stride) + y)


class CifarResNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N C] if it is None.

    Any H and W. Raises `UserError` where C is not that of `input_size`, or for widths that option A
    cannot serve.
    """

    depths: Sequence[int]  # blocks per stage; the first stage keeps the size, the others halve it
    widths: Sequence[int] = (16, 32, 64)  # never narrower than the one before: option A only adds
    num_classes: int | None = 10
    input_size: tuple[int, int, int] = (32, 32, 3)
    norm: str = "batch"
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # the last norm of each branch starts at 0: the block is the identity
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronised BatchNorm
    scan: bool = False  # the repeats of a stage as one block under nn.scan: layers.Stage
    remat: bool = False  # compute the inside of each block again in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        if len(self.depths) != len(self.widths) or list(self.widths) != sorted(self.widths):
            raise UserError(
                f"expected a depth and a width for each stage, no stage narrower than the one "
                f"before, got depths {tuple(self.depths)} and widths {tuple(self.widths)}"
            )
        conv = partial(
            layers.Conv,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=layers.initializer(self.kernel_init, paper=layers.he),
        )
        norm = layers.make_norm(
            self.norm,
            train=train,
            axis_name=self.axis_name,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        x = layers.CifarStem(self.widths[0], conv, norm, name="stem")(images)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
            block = partial(Block, width, norm=norm, zero_init=self.zero_init)
            stride = 1 if i == 0 else 2
            x = stage(block, conv, depth, stride, name=f"stage{i + 1}")(x)
        x = layers.global_avg_pool(x)  # [N H W C] -> [N C]
        if self.num_classes is None:
            return x
        head = partial(nn.Dense, dtype=jnp.float32, param_dtype=self.param_dtype)
        return head(self.num_classes, kernel_init=layers.initializer("lecun"), name="head")(x)


VARIANTS = {  # 6n + 2 layers, n blocks a stage
    "cifar_resnet20": partial(CifarResNet, depths=(3, 3, 3)),
    "cifar_resnet32": partial(CifarResNet, depths=(5, 5, 5)),
    "cifar_resnet44": partial(CifarResNet, depths=(7, 7, 7)),
    "cifar_resnet56": partial(CifarResNet, depths=(9, 9, 9)),
    "cifar_resnet110": partial(CifarResNet, depths=(18, 18, 18)),
    "cifar_resnet1202": partial(CifarResNet, depths=(200, 200, 200)),
}
