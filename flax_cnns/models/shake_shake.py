"""Shake-Shake networks for CIFAR-10 (section 2.1): two residual branches mixed with random weights.

The 26 layers are a 3x3 convolution, three stages of four blocks that are two convolutions deep, and
the head. "2x32d" means two branches of 32 channels in the first stage. Every stage starts with a
new width, so the first block of each has the paper's shortcut of two flows: a 1x1 convolution of
every second pixel, and a 1x1 convolution of every second pixel of the maps shifted right and down
by one pixel. The paper does not mention the ReLU before the two flows; the author's released code
has it, and so does ours. Others (google-research/sam) shift the maps left and up and leave this
ReLU out; the number of parameters is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Shake-Shake regularization",
    authors="Gastaldi",
    year=2017,
    url="https://arxiv.org/abs/1705.07485",
)


class Branch(nn.Module):
    """Twice ReLU, 3x3, norm: [N H W C] -> [N H/stride W/stride width], rounded up."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        conv = partial(self.conv, self.width, (3, 3), padding=1)
        x = self.norm(name="norm1")(conv(strides=self.stride, name="conv1")(nn.relu(x)))
        return self.norm(name="norm2", scale_init=last)(conv(name="conv2")(nn.relu(x)))


class Block(nn.Module):
    """Adds a mix of two branches to a shortcut: [N H W C] -> [N H/stride W/stride width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array, shake: layers.Shake | None = None) -> Array:
        branch = partial(
            Branch, self.width, self.conv, self.norm, self.stride, zero_init=self.zero_init
        )
        y1, y2 = branch(name="branch1")(x), branch(name="branch2")(x)
        return self.shortcut(x) + layers.shake_shake(y1, y2, shake)

    def shortcut(self, x: Array) -> Array:
        """Returns x if the shape stays, else applies ReLU, two concatenated flows and a norm."""
        if x.shape[-1] == self.width and self.stride == 1:
            return x
        x = nn.relu(x)
        moved = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))[:, :-1, :-1]  # right and down
        conv = partial(self.conv, kernel_size=(1, 1), strides=self.stride, padding=0)
        flows = (
            conv(self.width - self.width // 2, name="projection1")(x),
            conv(self.width // 2, name="projection2")(moved),
        )
        return self.norm(name="projection_norm")(jnp.concatenate(flows, axis=-1))


class ShakeShake(nn.Module):
    """Shake-Shake network: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W. In training
    `apply` needs the random stream "dropout", or "shared" for level "batch". Raises `UserError` if
    the images have other channels than `input_size`, and for an unknown `forward`, `backward` or
    `level`.
    """

    # architecture
    width: Count  # of the first stage; each stage doubles it
    depths: Counts = (4, 4, 4)  # blocks per stage; the first keeps the size, others halve it
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 10
    # regularization
    forward: str = "shake"  # or "even": layers.make_shakes
    backward: str = "shake"  # or "even", or "keep": the numbers of the forward pass
    level: str = "image"  # one random number per image, or per "batch"
    # numerics
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # the last norm of each branch starts at 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        conv, norm = layers.building_blocks(self, train)
        shakes = layers.make_shakes(self, self.depths, train)
        x = layers.CifarStem(16, conv, norm, relu=False, name="stem")(images)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, (depth, shake) in enumerate(zip(self.depths, shakes)):
            block = partial(Block, self.width * 2**i, norm=norm, zero_init=self.zero_init)
            stride = 1 if i == 0 else 2
            x = stage(block, conv, depth, stride, name=f"stage{i + 1}")(x, shake)
        return layers.classify(self, nn.relu(x))


VARIANTS = {  # table 1; 2x112d comes from later work (Cubuk et al. 2018, AutoAugment)
    "shakeshake_26_2x32d": partial(ShakeShake, width=32),
    "shakeshake_26_2x64d": partial(ShakeShake, width=64),
    "shakeshake_26_2x96d": partial(ShakeShake, width=96),
    "shakeshake_26_2x112d": partial(ShakeShake, width=112),
}
