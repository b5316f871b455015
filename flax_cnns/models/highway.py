"""Highway networks for CIFAR-10, of 19 and 32 layers: table 2 of "Training Very Deep Networks".

`highway_19` is Highway B as the authors released it for Caffe
(github.com/flukeskywalker/highway-networks). Its three stages each have a plain convolution that
sets the width, and then highway layers; a 1x1 convolution to 100 maps and their mean follow. It has
2,256,838 parameters, published as about 2.3 M. The released CIFAR-10 file still has CIFAR-100's 100
outputs (9,090 parameters more); ours has ten.

`highway_32`, Highway C, is an unverified reconstruction. The paper says only: 32 layers,
"alternating receptive fields of size 3x3 and 1x1", thinner than B, about 1.25 M. We keep B's plan,
with ten convolutions in each stage: 3x3 and 1x1 in turn, beginning with the plain 3x3. The widths
32, 64 and 96 then give 1,264,502 parameters, which is 1.2 % more; other widths come equally close.

The biases of the transform gates start at -2, as in the release, so that layers at first pass on
their inputs. The paper searched from -1 to -10 on MNIST. Dropout of 0.2 is the release's.
`kernel_init="paper"` is N(0, 2 / fan_in), which the "xavier" of the authors' Caffe draws, and
N(0, 0.05^2) in the head. The release's first convolution also asks for N(0, 0.05^2), but in a field
that Caffe does not read (`value` instead of `std`), which would make it N(0, 1). We take
N(0, 2 / fan_in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Training Very Deep Networks",
    authors="Srivastava, Greff, Schmidhuber",
    year=2015,
    url="https://arxiv.org/abs/1507.06228",
)


class Highway(nn.Module):
    """Highway layer: y = H(x) T(x) + x (1 - T(x)), equation 3: [N H W C] -> [N H W C].

    H is a convolution with ReLU; the transform gate T is a convolution with a sigmoid.
    """

    window: int  # kernel size
    gate_bias: float
    conv: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        window = (self.window, self.window)
        conv = partial(self.conv, x.shape[-1], window, padding=self.window // 2)
        h = nn.relu(conv(name="conv")(x))
        bias = nn.initializers.constant(self.gate_bias)
        t = nn.sigmoid(conv(bias_init=bias, name="gate")(x))
        return h * t + x * (1 - t)


class Stage(nn.Module):
    """A 3x3 convolution with ReLU, then highway layers: [N H W C] -> [N H W width]."""

    width: int
    windows: Sequence[int]  # kernel sizes of the highway layers
    gate_bias: float
    conv: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(self.conv(self.width, (3, 3), padding=1, name="conv")(x))
        for i, window in enumerate(self.windows, 1):
            x = Highway(window, self.gate_bias, self.conv, name=f"highway{i}")(x)
        return x


class HighwayNet(nn.Module):
    """Highway network: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N 100] if `num_classes` is None. Takes any H and W; both poolings
    round sizes up, as Caffe does. The network normalizes nothing, so `axis_name` has no effect.
    Raises `UserError` if the images have other channels than `input_size`.
    """

    # architecture
    widths: Counts  # of the stages
    windows: Sequence[Counts]  # kernel sizes of the highway layers in each stage
    last: Count = 100  # maps of the 1x1 convolution before the head
    input_size: ImageSize = (32, 32, 3)
    # head
    num_classes: Classes | None = 10
    # regularization
    dropout: Rate = 0.2  # on the images, after each pooling and before the head
    # numerics
    gate_bias: float = -2.0  # initial bias of the transform gates
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        paper = variance_scaling(2.0, "fan_in", "normal")
        conv, _ = layers.building_blocks(self, train, paper=paper, use_bias=True)
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)
        x = drop(name="dropout0")(images)
        for i, (width, windows) in enumerate(zip(self.widths, self.windows), 1):
            if i > 1:  # 32x32 images: H = 32, 16, 8
                x = layers.MaxPool(2, 2, ceil=True, name=f"pool{i - 1}")(x)
                x = drop(name=f"dropout{i - 1}")(x)
            x = Stage(width, windows, self.gate_bias, conv, name=f"stage{i}")(x)
        x = layers.ConvUnit(self.last, (1, 1), conv, name="last")(x)
        dropout = drop(name="dropout_head")
        return layers.classify(self, x, dropout=dropout, paper=layers.gaussian(0.05))


_ALTERNATING = (1, 3, 1, 3, 1, 3, 1, 3, 1)  # after the plain 3x3 convolution

VARIANTS = {  # layers: each stage's convolution and highway layers, the 1x1 convolution, the head
    "highway_19": partial(HighwayNet, widths=(32, 80, 128), windows=((3,) * 4, (3,) * 5, (3,) * 5)),
    "highway_32": partial(HighwayNet, widths=(32, 64, 96), windows=(_ALTERNATING,) * 3),
}
