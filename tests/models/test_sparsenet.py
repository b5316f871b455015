"""SparseNet of Zhu et al.: selected maps, published counts, sums by their definition."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.densenet import all_before
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.models.sparsenet import powers_of_two
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes

FAST = {"xla_backend_optimization_level": 0}
IMAGES = np.random.RandomState(0).randn(2, 8, 8, 3).astype(np.float32)
SUM = dict(depth=47, widths=(2, 3), input_size=(8, 8, 3), num_classes=3)  # 5 blocks per stage


def test_a_layer_takes_those_1_2_4_8_before_it():
    assert [powers_of_two(range(n)) for n in range(1, 10)] == [
        [0],
        [0, 1],
        [1, 2],
        [0, 2, 3],
        [1, 3, 4],
        [2, 4, 5],
        [3, 5, 6],
        [0, 4, 6, 7],
        [1, 5, 7, 8],
    ]


def by_hand(rates, layers, bc, classes):
    """Counts parameters of three blocks whose layers take the maps 1, 2, 4 ... layers before."""
    c = 2 * rates[0]
    count = 27 * c
    for i, k in enumerate(rates):

        def taken(before, c=c, k=k):  # channels of `before` maps and the block's input
            backs = [2**j for j in range(10) if 2**j <= before + 1]
            return sum(c if back == before + 1 else k for back in backs)

        for layer in range(layers):
            x = taken(layer)
            inner = 4 * k if bc else x
            count += 2 * x + 9 * inner * k + (x * inner + 2 * inner if bc else 0)
        c = taken(layers)
        if i < 2:
            count += 2 * c + c * (c // 2 if bc else c)
            c = c // 2 if bc else c
    return count + 2 * c + (c + 1) * classes


@pytest.mark.parametrize(
    ("name", "rates", "layers", "published", "within"),
    [
        ("sparsenet_40_24", (24, 24, 24), 12, 0.76e6, 0.005),
        ("sparsenet_100_24", (24, 24, 24), 32, 2.52e6, 0.002),
        ("sparsenet_100_36", (36, 36, 36), 32, 5.65e6, 0.001),
        ("sparsenet_100_16_32_64", (16, 32, 64), 32, 7.22e6, 0.001),
        ("sparsenet_bc_100_24", (24, 24, 24), 16, 1.46e6, 0.004),
        ("sparsenet_bc_100_16_32_64", (16, 32, 64), 16, 4.38e6, 0.004),
        ("sparsenet_bc_100_32_64_128", (32, 64, 128), 16, 16.72e6, 0.04),  # see the module
    ],
)
def test_count_by_hand(name, rates, layers, published, within):
    assert PUBLISHED[name].params == by_hand(rates, layers, "bc" in name, classes=10)
    hand = by_hand(rates, layers, "bc" in name, classes=100)
    assert hand == pytest.approx(published, rel=within)


def test_a_sum_takes_no_parameter():
    """The network has as many parameters as pre-activation ResNet-164: 1.7 M in table 4 of He et
    al. 2016."""
    n, wide = 18, (64, 128, 256)
    count = 27 * 16
    for width, c in zip((16, 32, 64), (16, *wide)):
        count += c * 4 * width  # the projection
        for channels in (c, *[4 * width] * (n - 1)):
            count += 2 * channels + channels * width  # each norm and the convolution after it
            count += 2 * width + 9 * width * width + 2 * width + width * 4 * width
    count += 2 * 256 + 257 * 10
    assert PUBLISHED["sparsenet_sum_164"].params == count


def test_output_shape_of_each_stage():
    logits, shapes = capture_shapes("sparsenet_40_24", 32)
    assert logits.shape == (2, 10)
    assert shapes["stem"] == (2, 32, 32, 48)
    assert shapes["block1/layer12/norm1"] == (2, 32, 32, 4 * 24)  # 1, 2, 4, 8 before it
    assert shapes["block1"] == (2, 32, 32, 4 * 24)
    assert shapes["transition1"] == (2, 16, 16, 4 * 24)
    assert shapes["block3"] == (2, 8, 8, 4 * 24)
    assert shapes["block3/layer8/norm1"] == (2, 8, 8, 3 * 24 + 4 * 24)  # the input is 8 before
    _, shapes = capture_shapes("sparsenet_sum_164", 29, depth=29)
    assert shapes["stage1"] == (2, 29, 29, 64)
    assert shapes["stage2/projection"] == shapes["stage2"] == (2, 15, 15, 128)
    assert shapes["stage3"] == shapes["norm"] == (2, 8, 8, 256)


@pytest.fixture(scope="module")
def seen():
    """Returns {links: {path: array}}, the outputs of the parts of a small summed network."""
    model = create_model("sparsenet_sum_164", **SUM)
    variables = init_variables(model, jax.random.key(0))

    def run(links):
        apply = partial(
            model.clone(links=links).apply, capture_intermediates=True, mutable=["intermediates"]
        )
        _, state = jax.jit(apply, compiler_options=FAST)(variables, IMAGES)
        flat = pytree.flatten(state["intermediates"])
        return {path.removesuffix("/__call__/0"): np.asarray(a) for path, a in flat.items()}

    return {links: run(links) for links in (powers_of_two, all_before)}


def test_sums_of_those_1_2_4_before(seen):
    given = seen[powers_of_two]
    blocks = [
        given[f"stage1/{name}"] for name in ("projection", *(f"block{i}" for i in range(1, 6)))
    ]
    np.testing.assert_allclose(given["stage1"], blocks[5] + blocks[4] + blocks[2], atol=1e-5)
    # block5's first norm shows its input: up to epsilon the norm is the identity at first.
    taken = blocks[4] + blocks[3] + blocks[1]
    np.testing.assert_allclose(given["stage1/block5/norm1"], taken / np.sqrt(1 + 1e-5), atol=1e-5)


def test_sums_of_all_are_a_resnet(seen):
    given = seen[all_before]
    total = given["stage2/projection"]
    for i in range(1, 6):
        total = total + given[f"stage2/block{i}"]
    np.testing.assert_allclose(given["stage2"], total, atol=1e-4)
    assert np.abs(seen[powers_of_two]["stage2"] - total).max() > 0.1


def test_features_bfloat16_group_norm_and_remat():
    model = create_model("sparsenet_sum_164", num_classes=None, depth=29, norm="group")
    model = model.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    features = jax.eval_shape(model.apply, shapes, IMAGES)
    assert (features.shape, features.dtype) == ((2, 256), jnp.float32)
    assert shapes["batch_stats"] == {}
    saving = model.clone(remat=True)
    assert jax.eval_shape(partial(init_variables, saving), jax.random.key(0)) == shapes

    def kept(model):
        backward = jax.eval_shape(lambda v: jax.vjp(lambda v: model.apply(v, IMAGES), v)[1], shapes)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(saving) < 0.6 * kept(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(depth=165), "such as 164 or 173, got 165"), (dict(depth=9), "such as 11 or 20, got 9")],
)
def test_depth_of_no_three_equal_stages(fields, message):
    with pytest.raises(UserError, match=message):
        capture_shapes("sparsenet_sum_164", 32, **fields)
