"""MobileNet v2 as torchvision has it, for `vs-torch`: until its family is in the registry."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.types import Array, Dtype


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


BLOCKS = {"mobilenet_v2": MobileNetV2}
