"""ResNet for ImageNet, table 1, in the form called v1.5: torchvision's.

The paper strides on the first 1x1 of a bottleneck; v1.5 strides on its 3x3, which costs 4.1 in
place of 3.8 GMACs (ResNet-50) and gains about half a percent. ResNet-18 and 34 are the paper's,
with option B: projections where the shape changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Deep Residual Learning for Image Recognition",
    authors="He, Zhang, Ren, Sun",
    year=2015,
    url="https://arxiv.org/abs/1512.03385",
)


def project(x: Array, width: int, stride: int, conv: ModuleDef, norm: ModuleDef) -> Array:
    """Option B, called inside a block: x itself where the shape stays, else its 1x1 projection."""
    if x.shape[-1] == width and stride == 1:
        return x
    x = conv(width, (1, 1), strides=stride, padding=0, name="projection")(x)
    return norm(name="projection_norm")(x)


class BasicBlock(nn.Module):
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
        return nn.relu(project(x, self.width, self.stride, self.conv, self.norm) + y)


class Bottleneck(nn.Module):
    """1x1 narrows, 3x3 looks around, 1x1 widens: [N H W C] -> [N H/stride W/stride 4*width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        y = self.conv(self.width, (1, 1), padding=0, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.width, (3, 3), strides=self.stride, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(4 * self.width, (1, 1), padding=0, name="conv3")(y)
        y = self.norm(name="norm3", scale_init=last)(y)
        return nn.relu(project(x, 4 * self.width, self.stride, self.conv, self.norm) + y)


class ResNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N C] if it is None.

    Any H and W; sizes round up at each of the five halvings. Raises `UserError` where C is not that
    of `input_size`.
    """

    depths: Sequence[int]  # blocks per stage; the first stage keeps the size, the others halve it
    block: ModuleDef = Bottleneck
    width: int = 64  # of the stem and the first stage; doubled from stage to stage
    num_classes: int | None = 1000
    input_size: tuple[int, int, int] = (224, 224, 3)
    norm: str = "batch"
    kernel_init: str | Callable = "he"
    # The last norm of each branch starts at 0, so that a block starts as the identity (Goyal et al.
    # 2017, section 5.1). Off, as in torchvision.
    zero_init: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronised BatchNorm
    scan: bool = False  # the repeats of a stage as one block under nn.scan: layers.Stage
    remat: bool = False  # compute the inside of each block again in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
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
        x = layers.ImageNetStem(self.width, conv, norm, name="stem")(images)  # H/4
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, depth in enumerate(self.depths):  # H/4, H/8, H/16, H/32
            block = partial(self.block, self.width * 2**i, norm=norm, zero_init=self.zero_init)
            stride = 1 if i == 0 else 2
            x = stage(block, conv, depth, stride, name=f"stage{i + 1}")(x)
        x = layers.global_avg_pool(x)  # [N H W C] -> [N C]
        if self.num_classes is None:
            return x
        head = partial(nn.Dense, dtype=jnp.float32, param_dtype=self.param_dtype)
        return head(self.num_classes, kernel_init=layers.initializer("lecun"), name="head")(x)


VARIANTS = {  # table 1
    "resnet18": partial(ResNet, depths=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": partial(ResNet, depths=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": partial(ResNet, depths=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, depths=(3, 4, 23, 3)),
    "resnet152": partial(ResNet, depths=(3, 8, 36, 3)),
}
SOURCES = {name: ("torchvision",) for name in VARIANTS}
