"""VGG: counts of the paper's table, published shapes of each layer, dropout, LRN."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of, variable_shapes

# Table 1 as (kernel size, input channels, output channels) of each convolution.
A = [
    *[(3, 3, 64), (3, 64, 128), (3, 128, 256), (3, 256, 256)],
    *[(3, 256, 512), (3, 512, 512), (3, 512, 512), (3, 512, 512)],
]
B = [
    *[(3, 3, 64), (3, 64, 64), (3, 64, 128), (3, 128, 128), (3, 128, 256), (3, 256, 256)],
    *[(3, 256, 512), (3, 512, 512), (3, 512, 512), (3, 512, 512)],
]
C = [*B, (1, 256, 256), (1, 512, 512), (1, 512, 512)]
D = [*B, (3, 256, 256), (3, 512, 512), (3, 512, 512)]
E = [*D, (3, 256, 256), (3, 512, 512), (3, 512, 512)]
DENSE = [(25088, 4096), (4096, 4096), (4096, 1000)]  # 25088 = 7 * 7 * 512
CIFAR = [(512, 10)]


def by_hand(convolutions, dense, batch_norm):
    """Counts parameters: a bias per output, and per channel of a BatchNorm a scale and a shift."""
    per_channel = 3 if batch_norm else 1
    return sum(k * k * i * o + per_channel * o for k, i, o in convolutions) + sum(
        i * o + o for i, o in dense
    )


TABLES = {
    "vgg11": A,
    "vgg11_lrn": A,
    "vgg13": B,
    "vgg16_c": C,
    "vgg16": D,
    "vgg19": E,
    "vgg11_bn": A,
    "vgg13_bn": B,
    "vgg16_c_bn": C,
    "vgg16_bn": D,
    "vgg19_bn": E,
    "cifar_vgg11": A,
    "cifar_vgg13": B,
    "cifar_vgg16": D,
    "cifar_vgg19": E,
    "cifar_vgg11_bn": A,
    "cifar_vgg13_bn": B,
    "cifar_vgg16_bn": D,
    "cifar_vgg19_bn": E,
}


@pytest.mark.parametrize("name", TABLES)
def test_count(name):
    dense = CIFAR if name.startswith("cifar") else DENSE
    assert PUBLISHED[name].params == by_hand(TABLES[name], dense, name.endswith("_bn"))


def test_the_papers_table_2():
    millions = {"vgg11": 133, "vgg11_lrn": 133, "vgg13": 133, "vgg16_c": 134, "vgg16": 138}
    for name, published in {**millions, "vgg19": 144}.items():
        assert round(PUBLISHED[name].params / 1e6) == published


# Configuration D in the slides "Convolutional Neural Networks": weights without biases, height and
# channels of the output.
ROWS = [
    ("stage1/conv1", 3 * 3 * 3 * 64, 1_728, 224, 64),
    ("stage1/conv2", 3 * 3 * 64 * 64, 36_864, 224, 64),
    ("stage2/conv1", 3 * 3 * 64 * 128, 73_728, 112, 128),
    ("stage2/conv2", 3 * 3 * 128 * 128, 147_456, 112, 128),
    ("stage3/conv1", 3 * 3 * 128 * 256, 294_912, 56, 256),
    ("stage3/conv2", 3 * 3 * 256 * 256, 589_824, 56, 256),
    ("stage3/conv3", 3 * 3 * 256 * 256, 589_824, 56, 256),
    ("stage4/conv1", 3 * 3 * 256 * 512, 1_179_648, 28, 512),
    ("stage4/conv2", 3 * 3 * 512 * 512, 2_359_296, 28, 512),
    ("stage4/conv3", 3 * 3 * 512 * 512, 2_359_296, 28, 512),
    ("stage5/conv1", 3 * 3 * 512 * 512, 2_359_296, 14, 512),
    ("stage5/conv2", 3 * 3 * 512 * 512, 2_359_296, 14, 512),
    ("stage5/conv3", 3 * 3 * 512 * 512, 2_359_296, 14, 512),
    ("fc6", 7 * 7 * 512 * 4096, 102_760_448, 1, 4096),
    ("fc7", 4096 * 4096, 16_777_216, 1, 4096),
    ("head", 4096 * 1000, 4_096_000, 1, 1000),
]
POOLED = [(112, 64), (56, 128), (28, 256), (14, 512), (7, 512)]


def test_each_layer_of_d():
    layers = cost_of("vgg16").layers
    assert [layer.path for layer in layers] == [path for path, *_ in ROWS]
    for layer, (path, product, weights, side, channels) in zip(layers, ROWS):
        assert layer.params - channels == weights == product, path
        assert layer.macs == weights * side**2, path
        shape = (1, channels) if side == 1 else (1, side, side, channels)
        assert layer.output_shape == shape, path
    assert sum(weights for _, _, weights, *_ in ROWS) == 138_344_128
    # The slides say "24M", but their rows, with image and poolings, have a smaller sum.
    maps = [side**2 * channels for *_, side, channels in ROWS]
    pools = [side**2 * channels for side, channels in POOLED]
    assert sum(maps) + sum(pools) + 224 * 224 * 3 == 15_237_608


@pytest.mark.parametrize("name", ["vgg11_lrn", "vgg16_c", "vgg19_bn"])
@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((224, 224), [(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)]),
        ((32, 97), [(16, 48), (8, 24), (4, 12), (2, 6), (1, 3)]),
    ],
)
def test_output_shape_of_each_stage(name, size, sides):
    logits, shapes = capture_shapes(name, *size)
    for i, (side, channels) in enumerate(zip(sides, (64, 128, 256, 512, 512))):
        assert shapes[f"stage{i + 1}"] == (2, *side, channels)
    assert shapes["fc6"] == shapes["fc7"] == (2, 4096)
    assert logits.shape == (2, 1000)


def test_the_cifar_head_sees_one_pixel():
    logits, shapes = capture_shapes("cifar_vgg16", 32, 32)
    assert shapes["stage5"] == (2, 1, 1, 512)
    assert "fc6" not in shapes
    assert logits.shape == (2, 10)
    logits, _ = capture_shapes("cifar_vgg16", 70, 64)
    assert logits.shape == (2, 10)


def tiny(name="vgg11", **fields):
    """Returns (network, variables) with few channels and the same layers."""
    fields = dict(widths=(6, 8, 8, 8, 8), hidden=(300, 200), pool=1, num_classes=3) | fields
    model = create_model(name, **fields)
    return model, init_variables(model, jax.random.key(0), (1, 32, 32, 3))


# Compiling takes nearly all of the time here.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
IMAGES = np.random.RandomState(0).randn(4, 32, 32, 3).astype(np.float32)


def test_half_of_fc6_and_of_fc7_is_dropped_in_training_only():
    assert create_model("vgg16").dropout == create_model("vgg16_bn").dropout == 0.5
    model, variables = tiny()

    @quick_jit
    def run(key):
        rngs = {"dropout": key}
        logits, state = model.apply(
            variables, IMAGES, train=True, rngs=rngs, capture_intermediates=True, mutable=True
        )
        return logits, state["intermediates"], model.apply(variables, IMAGES)  # needs no rng

    logits, seen, evaluated = run(jax.random.key(0))
    for name in ("6", "7"):
        before = np.maximum(seen[f"fc{name}"]["__call__"][0], 0)
        after = np.asarray(seen[f"dropout{name}"]["__call__"][0])
        kept = after[before > 0] != 0
        assert 0.4 < kept.mean() < 0.6
        np.testing.assert_allclose(after[after != 0], 2 * before[after != 0], rtol=1e-6)
    assert np.abs(logits - run(jax.random.key(1))[0]).max() > 1e-3
    np.testing.assert_array_equal(evaluated, run(jax.random.key(1))[2])


def test_lrn_follows_the_first_convolution():
    model, variables = tiny("vgg11_lrn")
    images = 100 * IMAGES  # so that it changes something
    run = quick_jit(partial(model.apply, capture_intermediates=True, mutable="intermediates"))
    _, state = run(variables, images)
    seen = state["intermediates"]["stage1"]
    x = np.maximum(seen["conv1"]["__call__"][0], 0)
    near = [np.square(x[..., max(c - 2, 0) : c + 3]).sum(-1) for c in range(6)]
    x = x / (2 + 1e-4 * np.stack(near, axis=-1)) ** 0.75  # Krizhevsky et al. 2012, section 3.3
    pooled = x.reshape(4, 16, 2, 16, 2, 6).max((2, 4))
    np.testing.assert_allclose(seen["__call__"][0], pooled, rtol=1e-4, atol=1e-5)
    assert "norm1" not in variables["params"]["stage1"]


def test_c_has_its_1x1_last_in_three_stages():
    shapes = variable_shapes("vgg16_c_bn")
    flat = pytree.flatten(shapes)
    small = [path for path, leaf in flat.items() if leaf.shape[:2] == (1, 1)]
    assert small == [f"params/stage{i}/conv3/kernel" for i in (3, 4, 5)]
    assert flat["params/stage3/norm3/scale"].shape == (256,)
    assert flat["batch_stats/stage5/norm3/var"].shape == (512,)


def test_the_papers_initialization():
    _, variables = tiny(init="paper", hidden=(400, 300))
    for path, leaf in pytree.flatten(variables["params"]).items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
        elif leaf.size > 1000:
            assert np.std(leaf) == pytest.approx(0.01, rel=0.1), path
            assert np.abs(leaf).max() > 0.025, path  # neither uniform nor truncated at 2
    # "paper": 0.01, also in the head. Else He's, and in the head 1 / sqrt(fan_in).
    assert np.std(variables["params"]["head"]["kernel"]) == pytest.approx(0.01, rel=0.1)
    _, variables = tiny(hidden=(400, 300))
    params = variables["params"]
    assert np.std(params["fc7"]["kernel"]) == pytest.approx(np.sqrt(2 / 300), rel=0.05)
    assert np.std(params["head"]["kernel"]) == pytest.approx(np.sqrt(1 / 300), rel=0.1)


def test_batch_norm_learns_statistics_in_training():
    model, variables = tiny("vgg11_bn")
    rngs = {"dropout": jax.random.key(0)}
    train = quick_jit(partial(model.apply, train=True, rngs=rngs, mutable=["batch_stats"]))
    _, state = train(variables, IMAGES)
    old, new = (pytree.flatten(v["batch_stats"]) for v in (variables, state))
    assert len(old) == 2 * 8
    assert all(np.abs(new[path] - old[path]).max() > 1e-4 for path in old)
