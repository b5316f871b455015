"""ResNet and its training step on plain Flax, a yardstick for ours.

Flax's ImageNet example (flax/examples/imagenet, models.py and train.py), written anew with
`nn.Conv`, `nn.BatchNorm` and `optax.sgd`. As in the example, the network computes in `dtype` up to
the logits, and each device normalizes by its own statistics. Two differences: images are uint8 and
are normalized on the device, as in our step, and there is no loss scaling, which only float16
needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel in 0..1
DEPTHS_50 = (3, 4, 6, 3)


class PlainBottleneck(nn.Module):
    """A bottleneck block: x [N H W C] -> [N H/strides W/strides 4*width]."""

    width: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut, strides = x, (self.strides, self.strides)
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), strides)(y)))
        y = self.conv(4 * self.width, (1, 1))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if shortcut.shape != y.shape:
            shortcut = self.conv(4 * self.width, (1, 1), strides, name="projection")(shortcut)
            shortcut = self.norm(name="projection_norm")(shortcut)
        return nn.relu(shortcut + y)


class PlainResNet(nn.Module):
    """ResNet-50 by default: images [N H W C], normalized -> logits `dtype` [N num_classes]."""

    depths: tuple[int, ...] = DEPTHS_50
    width: int = 64
    num_classes: int = 1000
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        x = conv(self.width, (7, 7), (2, 2), padding=3, name="stem")(images)
        x = nn.relu(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                strides = 2 if i > 0 and j == 0 else 1
                x = PlainBottleneck(self.width * 2**i, conv, norm, strides)(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


class PlainState(train_state.TrainState):
    """The example's training state."""

    batch_stats: Any


def make_plain_state(
    model: PlainResNet,
    key: jax.Array,
    images_shape: tuple[int, ...],
    *,
    rate: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = True,
) -> PlainState:
    """Initializes the network for images [N H W C] and SGD; can run under `jax.eval_shape`."""
    images = jnp.zeros((1, *images_shape[1:]), model.dtype)
    variables = model.init(key, images)
    return PlainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.sgd(rate, momentum, nesterov),
    )


def normalize(images: jax.Array, dtype: Any) -> jax.Array:
    """Normalizes images u8 [N H W C] by ImageNet's statistics; returns `dtype`."""
    channels = images.shape[-1]
    mean, std = (jnp.asarray(each[:channels], jnp.float32) for each in (MEAN, STD))
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def make_plain_step(
    model: PlainResNet, *, weight_decay: float = 1e-4, axis_name: str | None = None
) -> Callable[[PlainState, dict[str, jax.Array]], tuple[PlainState, dict[str, jax.Array]]]:
    """Returns the example's step: (state, {"image" u8 [N H W C], "label" i32 [N]}) -> (state,
    {"loss", "accuracy"}).

    It is not compiled. `weight_decay` is an L2 penalty on kernels, in the loss. With `axis_name`,
    gradients, statistics and metrics are averaged over the devices of that axis.
    """

    def average(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def step(state: PlainState, batch: dict[str, jax.Array]) -> tuple[PlainState, dict]:
        images, labels = normalize(batch["image"], model.dtype), batch["label"]

        def compute_loss(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            one_hot = jax.nn.one_hot(labels, model.num_classes)
            loss = jnp.mean(optax.softmax_cross_entropy(logits, one_hot))
            if weight_decay:
                kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
                loss += weight_decay * 0.5 * sum(jnp.sum(jnp.square(x)) for x in kernels)
            return loss, (updates["batch_stats"], logits)

        gradient = jax.value_and_grad(compute_loss, has_aux=True)
        (loss, (batch_stats, logits)), grads = gradient(state.params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        new = state.apply_gradients(grads=average(grads), batch_stats=average(batch_stats))
        return new, average({"loss": loss, "accuracy": accuracy})

    return step
