"""SparseNet of Liu & Zeng: which maps, counts by hand, attention in closed form."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns.models.sparse_densenet import ChannelAttention, farthest_and_nearest
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes


def test_a_layer_takes_the_farthest_and_the_nearest():
    assert farthest_and_nearest(range(14), path=14) == range(14)
    seven = [0, 1, 2, 3, 4, 5, 6]
    taken = farthest_and_nearest(range(20), path=14)  # 7 and 7: section 5.1
    assert taken == [*seven, 13, 14, 15, 16, 17, 18, 19]
    assert farthest_and_nearest(range(5), path=2) == [0, 4]  # figure 5b
    assert farthest_and_nearest(range(5), path=3) == [0, 3, 4]


@pytest.mark.parametrize("name", ["sparse_densenet", "sparse_densenet_bc", "sparse_densenet_abc"])
def test_count_by_hand(name):
    """With k = 16, the block's input is one of the ten maps, always among the farthest."""
    k, c, bc = 16, 32, name != "sparse_densenet"
    count = 27 * c
    for i, depth in enumerate((10, 15, 20)):
        for layer in range(depth):
            x = c + k * min(layer, 9)
            inner = 4 * k if bc else x
            count += 2 * x + 9 * inner * k + (x * inner + 2 * inner if bc else 0)
            if name.endswith("abc"):  # k to k and 2k to k, a norm before each
                count += 2 * k + k * k + 4 * k + 2 * k * k
        c += 9 * k
        if i < 2:
            count += 2 * c + c * (c // 2 if bc else c)
            c = c // 2 if bc else c
    assert PUBLISHED[name].params == count + 2 * c + (c + 1) * 10


def test_output_shape_of_each_stage():
    logits, shapes = capture_shapes("sparse_densenet_abc", 32)
    assert logits.shape == (2, 10)
    assert shapes["stem"] == (2, 32, 32, 32)
    assert shapes["block1"] == (2, 32, 32, 32 + 9 * 16)
    assert shapes["transition1"] == (2, 16, 16, 88)
    assert shapes["block2/layer15/norm1"] == shapes["block2"] == (2, 16, 16, 88 + 9 * 16)
    assert shapes["block3"] == (2, 8, 8, 116 + 9 * 16)
    assert shapes["block3/layer20/attention/conv1"] == (2, 1, 1, 16)
    assert shapes["block3/layer20"] == (2, 8, 8, 16)


def test_attention_in_closed_form():
    """Section 3.3: x + x sigmoid(...), with kernels that give 2 relu(mean) + 3 relu(relu(mean)).

    In evaluation, norms with their initial values divide by sqrt(1 + epsilon).
    """
    attention = ChannelAttention(
        conv=partial(layers.Conv, use_bias=False), norm=layers.make_norm("batch", train=False)
    )
    x = np.random.RandomState(0).randn(2, 3, 3, 4).astype(np.float32)
    variables = attention.init(jax.random.key(0), x)
    eye = np.eye(4, dtype=np.float32)
    params = jax.tree.map(lambda a: a, variables["params"])
    params["conv1"]["kernel"] = jnp.asarray(eye[None, None])
    params["conv2"]["kernel"] = jnp.asarray(np.concatenate([3 * eye, 2 * eye])[None, None])
    out = attention.apply({**variables, "params": params}, x)
    mean = np.maximum(x.mean((1, 2), keepdims=True), 0) / np.sqrt(1 + 1e-5)
    gate = 1 / (1 + np.exp(-(2 * mean + 3 * mean / np.sqrt(1 + 1e-5))))
    np.testing.assert_allclose(out, x + x * gate, rtol=1e-5)
