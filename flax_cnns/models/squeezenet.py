"""SqueezeNet, table 1, its simple bypass (figure 2), and the authors' version 1.1.

Where the paper is silent we follow the authors' release (github.com/forresti/SqueezeNet): pooling
rounds sizes up as Caffe does, ReLU also follows conv10 (here `head`), and `kernel_init="paper"` is
its "xavier" filler, uniform with variance 1 / fan_in, N(0, 0.01^2) in the head, zero biases. Table
1's shapes are those of 227x227 images, though it says 224. The released 1.0 pads conv10, whose
border then averages in nothing but biases; torchvision does not, and neither do we.

Version 1.1 is not in the paper: a smaller conv1 and earlier pooling, 2.3 times fewer MACs.

`squeezenet1_1_c10` is 1.1 as it stands with ten classes: its last four modules see 1x1 maps of a
CIFAR image. `cifar_squeezenet1_1` has as many parameters, 727,626, and a conv1 with stride 1 and
padding 1 in place of 2 and 0, so that they see 4x4. Hasanpour et al. 2018
(https://arxiv.org/abs/1802.06205) trained 1.1 on CIFAR-10 with stride 1 in conv1 and in the first
pooling, both unpadded (maps of 30, 28, 14, 7: github.com/Coderx7/SimpNet, SimpNetV2/Experiments/
SqueezeNet_v1.1_tests); ours computes at a third of the places. "Optimized" in their table is with
BatchNorm, here `norm="batch"`, but not in fire2's squeeze and fire4's expand1x1. The 768K of that
table is unverified: their own list has 727,626 parameters, or 733,226 with its BatchNorm (ours
733,514); with 100 classes it is 773,796, and 1.0 with ten classes has 740,554.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size",
    authors="Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer",
    year=2016,
    url="https://arxiv.org/abs/1602.07360",
)

# Channels of fire2 to fire9: squeezed, and of each of the two expanding convolutions.
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class Fire(nn.Module):
    """1x1 squeezes, 1x1 and 3x3 side by side expand: [N H W C] -> [N H W 2*expand]."""

    squeeze: int
    expand: int
    conv: ModuleDef
    norm: ModuleDef
    bypass: bool = False  # adds the input, which must have as many channels as the output

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def conv(x: Array, width: int, window: int, name: str) -> Array:
            x = self.conv(width, (window, window), padding=window // 2, name=name)(x)
            return nn.relu(self.norm(name=f"{name}_norm")(x))

        y = conv(x, self.squeeze, 1, "squeeze")
        pair = [conv(y, self.expand, 1, "expand1x1"), conv(y, self.expand, 3, "expand3x3")]
        y = jnp.concatenate(pair, axis=-1)
        return x + y if self.bypass else y


class SqueezeNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled fire9 f32 [N 512] if it is None.

    H and W are at least 21 in 1.0, 17 in 1.1, 8 with the CIFAR stem. Raises `UserError` where the
    images are too small or have other channels than `input_size`.
    """

    conv1: tuple[int, int, int, int]  # width, window, stride, padding
    pool_after: Sequence[int]  # the numbers of the fire modules before a pooling
    bypass: Sequence[int] = ()  # the numbers of the fire modules with a bypass
    num_classes: int | None = 1000
    input_size: tuple[int, int, int] = (224, 224, 3)
    norm: str = "none"
    dropout: float = 0.5  # of fire9's output
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronised BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        width, window, stride, padding = self.conv1
        # Three poolings that round up bring 8 pixels down to 4, 2 and 1, and fewer to none.
        layers.check_images(images, self.input_size, 7 * stride + window - 2 * padding)
        given = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = layers.initializer(self.kernel_init, paper=layers.caffe_xavier)
        conv = partial(layers.Conv, kernel_init=init, **given)
        norm = layers.make_norm(self.norm, train=train, axis_name=self.axis_name, **given)
        stem = partial(conv, width, (window, window), strides=stride, padding=padding)
        # In comments the sides for 227x227: of 1.0, of 1.1.
        x = nn.relu(norm(name="norm1")(stem(name="conv1")(images)))  # 111, 113
        x = layers.max_pool(x, 3, 2, ceil=True)  # 55, 56
        for i, (squeeze, expand) in enumerate(FIRES, 2):
            x = Fire(squeeze, expand, conv, norm, i in self.bypass, name=f"fire{i}")(x)
            if i in self.pool_after:
                x = layers.max_pool(x, 3, 2, ceil=True)  # 27 and 13, 28 and 14
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout9")(x)
        if self.num_classes is None:
            return layers.global_avg_pool(x)  # [N H W 512] -> [N 512]
        init = layers.head_initializer(self.kernel_init, paper=layers.gaussian(0.01))
        head = partial(layers.Conv, kernel_init=init, param_dtype=self.param_dtype)
        x = head(self.num_classes, (1, 1), dtype=jnp.float32, name="head")(x)
        return layers.global_avg_pool(nn.relu(x))  # [N H W num_classes] -> [N num_classes]


_1_0 = partial(SqueezeNet, conv1=(96, 7, 2, 0), pool_after=(4, 8))
_1_1 = partial(SqueezeNet, pool_after=(3, 5))
_C10 = dict(num_classes=10, input_size=(32, 32, 3))

VARIANTS = {
    "squeezenet1_0": partial(_1_0),
    "squeezenet1_0_bypass": partial(_1_0, bypass=(3, 5, 7, 9)),
    "squeezenet1_1": partial(_1_1, conv1=(64, 3, 2, 0)),
    "squeezenet1_1_c10": partial(_1_1, conv1=(64, 3, 2, 0), **_C10),
    "cifar_squeezenet1_1": partial(_1_1, conv1=(64, 3, 1, 1), **_C10),
}

SOURCES = {"squeezenet1_0": ("torchvision",), "squeezenet1_1": ("torchvision",)}
