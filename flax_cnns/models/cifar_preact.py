"""Pre-activation ResNets for CIFAR, in each of the paper's five orders of norm and ReLU.

The orders are those of figure 4 and table 2. "full_preact" is the paper's proposal: 110 layers of
basic units, 164 and 1001 layers of bottlenecks. As in section 4, its first unit applies norm and
ReLU right after the first convolution, before shortcut and branch separate, and norm and ReLU
follow the last unit. As in the authors' code (resnet-1k-layers), the first unit of every stage
applies norm and ReLU before shortcut and branch separate, the first convolution of a unit has the
stride, and the shortcut is a projection where the shape changes.

Where the paper is silent, we choose as follows. The projection has a norm in the orders whose
branch ends in one. This is all that changes the parameter count between orders: by 192 in
ResNet-110, by 896 in 164. In "relu_only_preact", the stem keeps the norm of the first convolution,
and a ReLU follows the last unit.

The paper takes its 110 layers from He et al. 2015, where zeros replace projections. That is
`shortcut="A"`, with 1,727,962 parameters; with the two projections of the released code (written
for bottlenecks) there are 1,730,522. The paper prints 10.2 M parameters for 1001 layers; there are
10.33 M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Rate
from flax_cnns.models.resnet import shortcut
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Identity Mappings in Deep Residual Networks",
    authors="He, Zhang, Ren, Sun",
    year=2016,
    url="https://arxiv.org/abs/1603.05027",
)


class Order(NamedTuple):
    """Where norm and ReLU stand, except between two convolutions of a unit."""

    stem: str  # after the network's first convolution, before the first unit
    before: str  # at the start of a branch, and after the network's last unit
    last: str  # at the end of a branch
    after: str  # after the sum


ORDERS = {  # figure 4
    "original": Order("norm relu", "", "norm", "relu"),
    "bn_after_add": Order("norm relu", "", "", "norm relu"),
    "relu_before_add": Order("norm relu", "", "norm relu", ""),
    "relu_only_preact": Order("norm", "relu", "norm", ""),
    "full_preact": Order("", "norm relu", "", ""),
}


def activate(kinds: str, x: Array, norm: ModuleDef, name: str) -> Array:
    """Applies `kinds`, which is "norm", "relu", "norm relu" or "", to `x`; `name` names the
    norm."""
    if "norm" in kinds:
        x = norm(name=name)(x)
    return nn.relu(x) if "relu" in kinds else x


class Stem(nn.Module):
    """A 3x3 convolution and what `order` puts after it: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    order: Order

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (3, 3), padding=1, name="conv")(x)
        return activate(self.order.stem, x, self.norm, "norm")


class Unit(nn.Module):
    """Residual unit whose convolutions have the kernel sizes `windows`.

    [N H W C] -> [N H/stride W/stride width*expansion], rounded up. All convolutions but the last
    have `width` channels.
    """

    width: int
    windows: Sequence[int]
    expansion: int
    order: Order
    conv: ModuleDef
    norm: ModuleDef
    shortcut: str = "B"
    stride: int | None = None  # only the first unit of a stage has one

    @nn.compact
    def __call__(self, x: Array, drop: layers.DropPath | None = None) -> Array:
        order, count, wide = self.order, len(self.windows), self.expansion * self.width
        first, stride = self.stride is not None, self.stride or 1
        if first:
            x = activate(order.before, x, self.norm, "norm1")  # for shortcut and branch
        norm = self.norm if "norm" in order.last else layers.NoNorm
        skip = shortcut(self.shortcut, x, wide, stride, self.conv, norm)
        # Norms are numbered in the order of use, whether before or after the convolutions.
        number = 1 + ("norm" in order.before)

        def branch(unit: Unit, x: Array) -> Array:
            y = x if first else activate(order.before, x, unit.norm, "norm1")
            for i, kernel_size in enumerate(unit.windows):
                if i:
                    y = activate("norm relu", y, unit.norm, f"norm{i - 1 + number}")
                width, strides = (wide if i == count - 1 else unit.width), (1 if i else stride)
                conv = unit.conv(
                    width,
                    (kernel_size, kernel_size),
                    strides=strides,
                    padding=kernel_size // 2,
                    name=f"conv{i + 1}",
                )
                y = conv(y)
            return activate(order.last, y, unit.norm, f"norm{count}")

        y = layers.residual(skip, branch, self, x, drop)
        return activate(order.after, y, self.norm, f"norm{count}")


class CifarPreAct(nn.Module):
    """Pre-activation ResNet for CIFAR: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W. Raises
    `UserError` if the images have other channels than `input_size`, and for an unknown order or
    shortcut.
    """

    # architecture
    depths: Counts  # units per stage; the first stage keeps the size, the others halve it
    windows: Counts = (3, 3)  # kernel sizes of a unit's convolutions
    expansion: Count = 1  # of a unit's last convolution; its others have `widths`
    widths: Counts = (16, 32, 64)
    order: str = "full_preact"  # one of ORDERS
    shortcut: str = "B"  # one of resnet.SHORTCUTS except "none"
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 10
    # regularization
    drop_path: Rate = 0.0  # rate of the last unit: layers.make_drop_paths
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical units under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each unit in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        layers.check_stages(self.depths, self.widths)
        if self.order not in ORDERS:
            raise UserError(f"unknown order {self.order!r}{did_you_mean(self.order, ORDERS)}")
        if self.shortcut == "none":
            raise UserError(
                'expected shortcut="A" or "B", got "none": a plain net has no residual sum'
            )
        order = ORDERS[self.order]
        conv, norm = layers.building_blocks(self, train)
        x = Stem(self.widths[0], conv, norm, order, name="stem")(images)
        drops = layers.make_drop_paths(self, self.depths, train)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
            unit = partial(
                Unit, width, self.windows, self.expansion, order, norm=norm, shortcut=self.shortcut
            )
            stride = 1 if i == 0 else 2
            x = stage(unit, conv, depth, stride, name=f"stage{i + 1}")(x, drops[i])
        x = activate(order.before, x, norm, "norm")
        return layers.classify(self, x)


_bottlenecks = partial(CifarPreAct, windows=(1, 3, 1), expansion=4)
VARIANTS = {  # tables 2 and 4: 6n + 2 layers of basic units, 9n + 2 of bottlenecks
    "cifar_preact110": partial(CifarPreAct, depths=(18, 18, 18)),
    "cifar_preact164": partial(_bottlenecks, depths=(18, 18, 18)),
    "cifar_preact1001": partial(_bottlenecks, depths=(111, 111, 111)),
}
