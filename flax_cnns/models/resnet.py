"""ResNet for ImageNet and its relatives: v1, v1.5, -D and plain networks, all kinds of shortcuts.

`resnet50` is table 1 of the paper in the form called v1.5, which is torchvision's. In the paper
(`resnet50_v1`) the first 1x1 of a bottleneck has the stride; in v1.5 the 3x3 has it, which costs
4.1 instead of 3.9 GMACs (`analysis.cost.cost`). Shortcuts are option B: projections where the shape
changes. In the paper's table 2, ResNet-18 and 34 have option A: `resnet34_optA`. ResNet-200 comes
from He et al. 2016, https://arxiv.org/abs/1603.05027, with pre-activation; here it has the same
stages with this file's block, as in timm. ResNet-D: He et al. 2018,
https://arxiv.org/abs/1812.01187. Keras's networks, `keras_resnet50` and others, are v1 with biases
before the BatchNorms. The head is initialized with LeCun's variance for every `kernel_init`; the
paper uses He's for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper, PyTree

PAPER = Paper(
    title="Deep Residual Learning for Image Recognition",
    authors="He, Zhang, Ren, Sun",
    year=2015,
    url="https://arxiv.org/abs/1512.03385",
)
# The shortcut of a block whose input and output differ in shape ("C": of every block). If the
# shapes are equal, the shortcut is the input itself.
SHORTCUTS = {
    "A": "every stride-th pixel, with zeros appended to the channels: no parameters",
    "A-mean": "2x2 average pooling if the stride is 2, with zeros appended (Huang et al. 2016)",
    "B": "a 1x1 projection",
    "C": "a 1x1 projection, in all blocks",
    "D": "a 1x1 projection, after 2x2 average pooling if the stride is 2 (ResNet-D, figure 2c)",
    "3x3": "a projection, 3x3 if the stride is 2 (SENet-154)",
    "none": "no shortcut: the plain networks",
}


def shortcut(
    option: str, x: Array, width: int, stride: int, conv: ModuleDef, norm: ModuleDef
) -> Array:
    """Applies one of `SHORTCUTS`: [N H W C] -> [N H/stride W/stride width].

    A block calls it, so that the projection is the block's own. Raises `UserError` for an unknown
    option, and if option A would have to drop channels.
    """
    if option not in SHORTCUTS:
        raise UserError(f"unknown shortcut {option!r}{did_you_mean(option, SHORTCUTS)}")
    if x.shape[-1] == width and stride == 1 and option != "C":
        return x
    if option in ("D", "A-mean") and stride > 1:
        x, stride = layers.avg_pool(x, stride, stride, ceil=True), 1
    if option in ("A", "A-mean"):
        if (more := width - x.shape[-1]) < 0:
            raise UserError(
                f"shortcut A cannot drop channels: the input has {x.shape[-1]}, the output {width}"
            )
        return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, more)))
    k = 3 if option == "3x3" and stride > 1 else 1
    x = conv(width, (k, k), strides=stride, padding=k // 2, name="projection")(x)
    return norm(name="projection_norm")(x)


def add_branch(
    block: Any, branch: Callable, x: Array, width: int, drop: layers.DropPath | None
) -> Array:
    """Adds a block's branch to its shortcut; without a shortcut returns the branch alone."""
    if block.shortcut == "none":
        return branch(block, x)
    first = shortcut(block.shortcut, x, width, block.stride, block.conv, block.norm)
    return layers.residual(first, branch, block, x, drop)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: [N H W C] -> [N H/stride W/stride width], rounded up."""

    branch_depth: ClassVar[int] = 2  # convolutions

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    shortcut: str = "B"
    attention: ModuleDef | None = None
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array, drop: PyTree = None, shake_drop: PyTree = None) -> Array:
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones

        def branch(self, x: Array) -> Array:
            y = self.conv(self.width, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
            y = nn.relu(self.norm(name="norm1")(y))
            y = self.conv(self.width, (3, 3), padding=1, name="conv2")(y)
            y = self.norm(name="norm2", scale_init=last)(y)
            y = y if self.attention is None else self.attention(name="se")(y)
            return layers.shake_drop(y, shake_drop)

        return nn.relu(add_branch(self, branch, x, self.width, drop))


class Bottleneck(nn.Module):
    """1x1 (narrows), 3x3, 1x1 (widens): [N H W C] -> [N H/stride W/stride 4*width]."""

    branch_depth: ClassVar[int] = 3

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    shortcut: str = "B"
    attention: ModuleDef | None = None
    zero_init: bool = False
    groups: int = 1  # ResNeXt's cardinality
    base_width: int = 64  # channels per group where width is 64
    stride_first: bool = False  # the stride is on the 1x1, as in the paper, not on the 3x3
    first_reduction: int = 1  # conv2 is this many times as wide as conv1 (SENet-154: 2)

    @nn.compact
    def __call__(self, x: Array, drop: layers.DropPath | None = None) -> Array:
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones

        def branch(self, x: Array) -> Array:
            inner = self.width * self.base_width // 64 * self.groups
            first, second = (self.stride, 1) if self.stride_first else (1, self.stride)
            narrow = inner // self.first_reduction
            if not narrow or narrow % self.groups:
                raise UserError(
                    f"{self.groups} groups do not divide the {narrow} channels inside a block of "
                    f"width {self.width}; take a larger width or base_width, or fewer groups"
                )
            y = self.conv(narrow, (1, 1), strides=first, padding=0, name="conv1")(x)
            y = nn.relu(self.norm(name="norm1")(y))
            grouped = partial(self.conv, feature_group_count=self.groups)
            y = grouped(inner, (3, 3), strides=second, padding=1, name="conv2")(y)
            y = nn.relu(self.norm(name="norm2")(y))
            y = self.conv(4 * self.width, (1, 1), padding=0, name="conv3")(y)
            y = self.norm(name="norm3", scale_init=last)(y)
            return y if self.attention is None else self.attention(name="se")(y)

        return nn.relu(add_branch(self, branch, x, 4 * self.width, drop))


class ResNet(nn.Module):
    """ResNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W; sizes round up at
    each halving (five in networks with ImageNet's stems). Raises `UserError` if the images have
    other channels than `input_size`, or if fields contradict each other.
    """

    # architecture
    depths: Counts  # blocks per stage; the first stage keeps the size, the others halve it
    block: ModuleDef = Bottleneck
    width: Count = 64  # of the first stage; each stage doubles it
    groups: Count = 1  # of a bottleneck's 3x3: ResNeXt's cardinality
    base_width: Count = 64  # channels per group if width is 64; 128 makes the 3x3 twice as wide
    shortcut: str = "B"  # one of SHORTCUTS
    attention: ModuleDef | None = None  # at the end of each branch: layers.SqueezeExcite
    stem: ModuleDef = layers.ImageNetStem
    stem_width: Count | None = None  # None: width
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"  # or another of layers.make_norm's, or "fixup": layers/fixup.py
    conv_bias: bool = False
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.0  # of the pooled features
    drop_path: Rate = 0.0  # rate of the last block: layers.make_drop_paths
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    # numerics
    momentum: Rate = 0.9  # of the running statistics
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"
    # The last norm of each branch starts at 0, so that each block starts as the identity (Goyal et
    # al. 2017, section 5.1). Off by default, as in torchvision.
    zero_init: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        if self.shortcut == "none" and (self.drop_path or self.norm == "fixup"):
            field = "drop_path" if self.drop_path else 'norm="fixup"'
            raise UserError(
                f"{field} needs a shortcut, since it can set a branch to zero; got shortcut='none'"
            )
        fixup = self.norm == "fixup"
        conv, norm = layers.building_blocks(
            self, train, use_bias=self.conv_bias, norm="none" if fixup else self.norm
        )
        head: ModuleDef = layers.make_head(self)
        block_class: Any = getattr(self.block, "func", self.block)  # without partial
        if fixup:
            if self.stem is not layers.ImageNetStem:
                raise UserError(
                    'norm="fixup" needs the stem with a single convolution: ImageNetStem'
                )
            assert isinstance(conv, partial)
            assert isinstance(head, partial)
            conv, norm, head = layers.fixup(
                conv, head, branches=sum(self.depths), depth=block_class.branch_depth
            )
        grouped: dict[str, int] = {}
        if hasattr(block_class, "groups"):
            grouped = dict(groups=self.groups, base_width=self.base_width)
        elif (self.groups, self.base_width) != (1, 64):
            # Groups would turn two 3x3 into a wide block without groups (ResNeXt, section 3.3).
            raise UserError(
                f"groups and base_width belong to bottlenecks: got {self.groups} and "
                f"{self.base_width} for blocks of two 3x3; use the blocks of resnet50"
            )
        attention = self.attention and partial(
            self.attention,
            kernel_init=layers.get_initializer(self.kernel_init, paper=layers.he),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        x = self.stem(self.stem_width or self.width, conv, norm, name="stem")(images)  # H/4
        drops = layers.make_drop_paths(self, self.depths, train)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, depth in enumerate(self.depths):  # H/4, H/8, H/16, H/32
            block = partial(
                self.block,
                self.width * 2**i,
                norm=norm,
                shortcut=self.shortcut,
                attention=attention,
                zero_init=self.zero_init,
                **grouped,
            )
            stride = 1 if i == 0 else 2
            x = stage(block, conv, depth, stride, name=f"stage{i + 1}")(x, drops[i])
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return layers.classify(self, x, dropout=dropout, head=head)


DEPTHS = {  # table 1; 200 in https://arxiv.org/abs/1603.05027
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
BottleneckV1 = partial(Bottleneck, stride_first=True)
_18 = partial(ResNet, depths=DEPTHS[18], block=BasicBlock)
_34 = partial(ResNet, depths=DEPTHS[34], block=BasicBlock)
_50, _101, _152, _200 = (partial(ResNet, depths=DEPTHS[n]) for n in (50, 101, 152, 200))
_KERAS: Any = dict(block=BottleneckV1, conv_bias=True, momentum=0.99, epsilon=1.001e-5)
_D: Any = dict(stem=layers.DeepStem, shortcut="D")
VARIANTS = {
    "resnet18": _18,
    "resnet34": _34,
    "resnet50": _50,
    "resnet101": _101,
    "resnet152": _152,
    "resnet200": _200,
    "resnet50_v1": partial(_50, block=BottleneckV1),
    "resnet101_v1": partial(_101, block=BottleneckV1),
    "resnet152_v1": partial(_152, block=BottleneckV1),
    "resnet200_v1": partial(_200, block=BottleneckV1),
    "keras_resnet50": partial(_50, **_KERAS),
    "keras_resnet101": partial(_101, **_KERAS),
    "keras_resnet152": partial(_152, **_KERAS),
    "plain18": partial(_18, shortcut="none"),
    "plain34": partial(_34, shortcut="none"),
    "resnet34_optA": partial(_34, shortcut="A"),  # table 3
    "resnet34_optC": partial(_34, shortcut="C"),
    "resnet18d": partial(_18, **_D),
    "resnet34d": partial(_34, **_D),
    "resnet50d": partial(_50, **_D),
    "resnet101d": partial(_101, **_D),
    "resnet152d": partial(_152, **_D),
    "resnet200d": partial(_200, **_D),
}
SOURCES = (
    {f"resnet{n}": ("torchvision",) for n in (18, 34, 50, 101, 152)}
    | {f"resnet{n}d": ("timm",) for n in DEPTHS}
    | {"resnet200": ("timm",)}
    | {f"keras_resnet{n}": ("keras",) for n in (50, 101, 152)}
)
