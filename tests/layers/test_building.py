"""Building blocks and classifiers take each argument from the network's fields."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.layers.norm import BatchNorm, NoNorm


class Plain(nn.Module):
    """A network without the field `norm`."""

    num_classes: int | None = 3
    kernel_init: Any = "lecun"
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        conv, _ = layers.building_blocks(self, train, use_bias=True)
        dropout = nn.Dropout(0.5, deterministic=not train)
        return layers.classify(self, conv(4, (1, 1), name="conv")(x), dropout=dropout)


class Normed(Plain):
    norm: str = "batch"
    momentum: float = 0.5


def test_norms_get_the_networks_fields_or_the_arguments():
    conv, norm = layers.building_blocks(Normed(axis_name="x"), True, epsilon=0.1)
    assert norm.func is BatchNorm
    given = {field: norm.keywords[field] for field in ("momentum", "epsilon", "axis_name")}
    assert given == {"momentum": 0.5, "epsilon": 0.1, "axis_name": "x"}
    assert norm.keywords["use_running_average"] is False
    assert norm.keywords["dtype"] is conv.keywords["dtype"] is jnp.bfloat16
    conv, norm = layers.building_blocks(Normed(), False, dtype=jnp.float32)
    assert norm.keywords["dtype"] is conv.keywords["dtype"] is jnp.float32
    assert layers.building_blocks(Plain(), True)[1] is NoNorm
    assert layers.building_blocks(Normed(), True, norm="none")[1] is NoNorm
    with pytest.raises(UserError, match="unknown norm 'bath'; did you mean 'batch'"):
        layers.building_blocks(Normed(norm="bath"), True)


def test_kernels_are_initialized_as_the_network_says():
    paper = nn.initializers.ones
    conv, _ = layers.building_blocks(Plain(kernel_init="paper"), True, paper=paper)
    assert conv.keywords["kernel_init"] is paper
    assert layers.make_head(Plain(kernel_init="paper"), paper).keywords["kernel_init"] is paper
    head = layers.make_head(Plain(kernel_init="he"), paper)
    assert head.keywords["kernel_init"] is layers.get_initializer("lecun")


@pytest.mark.parametrize("classes", [3, None])
def test_logits_or_features_in_float32(classes):
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    out, variables = Plain(num_classes=classes).init_with_output(jax.random.key(1), x)
    assert (out.shape, out.dtype) == ((2, classes or 4), jnp.float32)
    assert ("head" in variables["params"]) == (classes is not None)
    trained = Plain(num_classes=classes).apply(
        variables, x, train=True, rngs={"dropout": jax.random.key(2)}
    )
    assert (trained != out).any()


def test_features_of_two_axes_are_not_pooled():
    x = jnp.ones((2, 4), jnp.bfloat16)
    features = layers.classify(Plain(num_classes=None), x)
    assert (features.shape, features.dtype) == ((2, 4), jnp.float32)
