"""ResNet-50 and its training step in plain Flax and Optax, to compare our compiled step with.

It is the program of Flax's ImageNet example (github.com/google/flax, examples/imagenet), written
anew: `nn.Conv` and `nn.BatchNorm`, SGD with Nesterov's momentum, an L2 penalty in the loss, and
images that the input pipeline has normalized already. It uses nothing of flax_cnns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

DEPTHS = (3, 4, 6, 3)  # of ResNet-50


class PlainBottleneck(nn.Module):
    """[N H W C] -> [N H/strides W/strides 4*width]."""

    width: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        steps = (self.strides, self.strides)
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), steps)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_projection")(
                self.conv(4 * self.width, (1, 1), steps, name="projection")(x)
            )
        return nn.relu(x + y)


class PlainResNet(nn.Module):
    """Images [N H W 3] -> logits f32 [N num_classes]."""

    depths: tuple[int, ...] = DEPTHS
    width: int = 64
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name="batch",
        )
        x = conv(self.width, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="stem")(images)
        x = nn.relu(norm(name="norm_stem")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.depths):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = PlainBottleneck(self.width * 2**stage, strides, conv, norm)(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return jnp.asarray(x, jnp.float32)


@struct.dataclass
class PlainState:
    """The training state."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def make_plain_step(model: PlainResNet, learning_rate: float = 0.1) -> Any:
    """Returns (create_state(key), step(state, batch) -> (state, metrics)).

    batch: {"image" [n H W 3], "label" i32 [n]}, n examples of one device of the axis "batch".
    """
    optimizer = optax.sgd(learning_rate, momentum=0.9, nesterov=True)

    def create_state(key: jax.Array) -> PlainState:
        # One image of 64 pixels: the parameters do not depend on the size.
        variables = model.init(key, jnp.zeros((1, 64, 64, 3), model.dtype), train=False)
        params = variables["params"]
        return PlainState(
            jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params)
        )

    def compute_loss(params: Any, state: PlainState, batch: Any) -> Any:
        logits, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            mutable=["batch_stats"],
        )
        one_hot = jax.nn.one_hot(batch["label"], model.num_classes)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, one_hot))
        kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
        loss += 0.5 * 1e-4 * sum(jnp.sum(x**2) for x in kernels)
        return loss, (updates["batch_stats"], logits)

    def step(state: PlainState, batch: Any) -> tuple[PlainState, Any]:
        gradient = jax.value_and_grad(compute_loss, has_aux=True)
        (loss, (batch_stats, logits)), grads = gradient(state.params, state, batch)
        grads = lax.pmean(grads, "batch")
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        metrics = lax.pmean({"loss": loss, "accuracy": accuracy}, "batch")
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, metrics

    return create_state, step
