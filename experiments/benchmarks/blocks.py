"""ResNeXt-50 and MobileNet v2 as PyTorch's torchvision has them, of our layers, for `vs-torch`.

For timing until their families are in the registry.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.resnet import ResNet, project
from flax_cnns.types import Array, Dtype, ModuleDef


class GroupedBottleneck(nn.Module):
    """ResNeXt's, table 1 of https://arxiv.org/abs/1611.05431: 32 groups of 4 channels at width 64.

    [N H W C] -> [N H/stride W/stride 4*width].
    """

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    zero_init: bool = False
    groups: int = 32
    base_width: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inner = self.width * self.base_width // 64 * self.groups
        y = self.conv(inner, (1, 1), padding=0, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        grouped = partial(self.conv, strides=self.stride, padding=1)
        y = grouped(inner, (3, 3), feature_group_count=self.groups, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(4 * self.width, (1, 1), padding=0, name="conv3")(y)
        y = self.norm(name="norm3")(y)
        return nn.relu(project(x, 4 * self.width, self.stride, self.conv, self.norm) + y)


class MobileNetV2(nn.Module):
    """Table 2 of https://arxiv.org/abs/1801.04381 with BatchNorm and ReLU6 (no dropout)."""

    num_classes: int = 1000
    input_size: tuple[int, int, int] = (224, 224, 3)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        conv = partial(layers.Conv, use_bias=False, dtype=self.dtype)
        norm = layers.make_norm("batch", train=train, dtype=self.dtype)

        def unit(x: Array, width: int, k: int, stride: int = 1, groups: int = 1, *, name: str):
            x = conv(
                width,
                (k, k),
                strides=stride,
                padding=k // 2,
                feature_group_count=groups,
                name=f"{name}_conv",
            )(x)
            return norm(name=f"{name}_norm")(x)

        x = nn.relu6(unit(images, 32, 3, 2, name="stem"))
        table = (  # expansion, width, blocks, stride
            *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        )
        for i, (expansion, width, blocks, stride) in enumerate(table, 1):
            for j in range(1, blocks + 1):
                y, inner, name = x, expansion * x.shape[-1], f"stage{i}_block{j}"
                if expansion > 1:
                    y = nn.relu6(unit(y, inner, 1, name=f"{name}_expand"))
                step = stride if j == 1 else 1
                y = nn.relu6(unit(y, inner, 3, step, inner, name=f"{name}_depthwise"))
                y = unit(y, width, 1, name=f"{name}_project")
                x = x + y if x.shape == y.shape else y
        x = nn.relu6(unit(x, 1280, 1, name="top"))
        x = layers.global_avg_pool(x)  # [N H W C] -> [N C]
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)


BLOCKS = {
    "resnext50_32x4d": partial(ResNet, depths=(3, 4, 6, 3), block=GroupedBottleneck),
    "mobilenet_v2": MobileNetV2,
}
