"""Xception: blocks of depthwise separable convolutions with shortcuts.

Figure 5 of the paper shows an entry flow, a middle flow of eight identical blocks and an exit flow.
A separable convolution is a 3x3 per channel and a 1x1 over all channels, with nothing between them,
since the paper found that an activation there hurts (figure 10); a norm follows. A block starts
with a ReLU, except the first block. The shortcut takes the block's input before this ReLU.

The figure gives no padding. `keras_xception` is the author's code: no padding in the first two
convolutions, TensorFlow's padding in pooling, epsilon 1e-3, momentum 0.99. `xception` and
`legacy_xception`, timm's old and new name of one network, pad pooling by one pixel on all sides.
For images of 299x299 this makes a difference at 74x74, the first even size: the windows of the
pooling lie elsewhere. These networks have PyTorch's BatchNorm, and the paper's dropout of 0.5
(section 4.3), which Keras and timm leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Xception: Deep Learning with Depthwise Separable Convolutions",
    authors="Chollet",
    year=2016,
    url="https://arxiv.org/abs/1610.02357",
)


class Stem(nn.Module):
    """Two unpadded 3x3 with norm and ReLU: [N H W C] -> [N (H-1)/2-2 (W-1)/2-2 C']."""

    widths: Sequence[int]
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.widths, 1):
            stride = 2 if i == 1 else 1
            x = self.conv(width, (3, 3), strides=stride, padding=0, name=f"conv{i}")(x)
            x = nn.relu(self.norm(name=f"norm{i}")(x))
        return x


class Block(nn.Module):
    """ReLU, separable 3x3 and norm for each of `widths`; 3x3 max pooling if `stride` is 2.

    [N H W C] -> [N H/stride W/stride C'], rounded up. The shortcut is the input, or a 1x1
    projection of it if the shape changes.
    """

    widths: Sequence[int]
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    padding: str = "torch"
    begins_with_relu: bool = True
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y, width, convs = x, self.widths[-1], len(self.widths)
        for i, n in enumerate(self.widths, 1):
            y = nn.relu(y) if i > 1 or self.begins_with_relu else y
            y = layers.SeparableConv(n, self.conv, name=f"conv{i}")(y)
            zero = self.zero_init and i == convs
            scale_init = nn.initializers.zeros if zero else nn.initializers.ones
            y = self.norm(name=f"norm{i}", scale_init=scale_init)(y)
        if self.stride > 1:
            y = layers.max_pool(y, 3, self.stride, layers.resolve_padding(self.padding, 3))
        if self.stride > 1 or x.shape[-1] != width:
            x = self.conv(width, (1, 1), strides=self.stride, padding=0, name="projection")(x)
            x = self.norm(name="projection_norm")(x)
        return x + y


class SeparableUnit(nn.Module):
    """Separable 3x3, norm, ReLU: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = layers.SeparableConv(self.width, self.conv, name="conv")(x)
        return nn.relu(self.norm(name="norm")(x))


class Xception(nn.Module):
    """Xception: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. H and W are at least 7; after the
    stem sizes round up. Raises `UserError` if the images are too small or have other channels than
    `input_size`.
    """

    # architecture
    stem: Counts = (32, 64)  # widths
    entry: Counts = (128, 256, 728)  # widths of blocks with two convolutions and stride 2
    depth: Count = 8  # blocks of the middle flow, as wide as the last entry block
    exit: Counts = (728, 1024)  # widths of the convolutions in the last block, which has stride 2
    top: Counts = (1536, 2048)  # widths of the convolutions after the last block
    padding: str = "torch"  # of pooling; or "same", TensorFlow's
    input_size: ImageSize = (299, 299, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.5  # of the pooled features
    # numerics
    momentum: Rate = 0.9  # of the running statistics
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # each block starts as its shortcut: its last norm is 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run the middle flow under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of the middle flow's blocks in the backward pass

    # Layers of optimizer.layer_decay, as in timm: see train.optimizers.layer_exponents.
    layer_groups = (("top2", "below"),)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        conv, norm = layers.building_blocks(self, train)
        x = Stem(self.stem, conv, norm, name="stem")(images)  # H/2
        block = partial(Block, norm=norm, padding=self.padding, zero_init=self.zero_init)
        for i, n in enumerate(self.entry, 1):  # H/4, H/8, H/16
            x = block((n, n), conv, stride=2, begins_with_relu=i > 1, name=f"entry{i}")(x)
        middle_block = partial(block, (self.entry[-1],) * 3)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        x = stage(middle_block, conv, self.depth, name="middle")(x)
        x = block(self.exit, conv, stride=2, name="exit")(x)  # H/32
        for i, n in enumerate(self.top, 1):
            x = SeparableUnit(n, conv, norm, name=f"top{i}")(x)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return layers.classify(self, x, dropout=dropout)


MIN_IMAGE_SIZE = 7  # the stem leaves one pixel
VARIANTS = {
    "xception": partial(Xception),
    "legacy_xception": partial(Xception),
    "keras_xception": partial(Xception, padding="same", dropout=0.0, momentum=0.99, epsilon=1e-3),
}
SOURCES = {"xception": ("timm",), "legacy_xception": ("timm",), "keras_xception": ("keras",)}
