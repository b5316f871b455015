"""MobileNet v3: counts from the paper's tables, shapes and MACs, and each field."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.models.mobilenet_v3 import HS, RE, Row
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import (
    capture_modules,
    capture_shapes,
    norms_starting_at_zero,
    variable_shapes,
)

# Tables 1 and 2: kernel size, inner width, width, and squeezed width (0: no squeeze).
LARGE = [
    *((3, 16, 16, 0), (3, 64, 24, 0), (3, 72, 24, 0), (5, 72, 40, 24), (5, 120, 40, 32)),
    *((5, 120, 40, 32), (3, 240, 80, 0), (3, 200, 80, 0), (3, 184, 80, 0), (3, 184, 80, 0)),
    *((3, 480, 112, 120), (3, 672, 112, 168), (5, 672, 160, 168), (5, 960, 160, 240)),
    (5, 960, 160, 240),
]
SMALL = [
    *((3, 16, 16, 8), (3, 72, 24, 0), (3, 88, 24, 0), (5, 96, 40, 24), (5, 240, 40, 64)),
    *((5, 240, 40, 64), (5, 120, 48, 32), (5, 144, 48, 40), (5, 288, 96, 72), (5, 576, 96, 144)),
    (5, 576, 96, 144),
]


def count_table(rows: list[tuple[int, int, int, int]], hidden: int) -> int:
    """Returns the parameters; norms have a scale and a shift per channel."""
    count, channels = 27 * 16 + 2 * 16, 16
    for kernel, inner, width, squeezed in rows:
        count += 0 if inner == channels else channels * inner + 2 * inner
        count += kernel * kernel * inner + 2 * inner + inner * width + 2 * width
        count += 2 * inner * squeezed + squeezed + inner if squeezed else 0
        channels = width
    last = rows[-1][1]
    count += channels * last + 2 * last + last * hidden + hidden
    return count + hidden * 1000 + 1000


def test_counts_by_hand():
    large, small = (PUBLISHED[f"mobilenet_v3_{size}"].params for size in ("large", "small"))
    assert large == count_table(LARGE, 1280)
    assert small == count_table(SMALL, 1024)
    # With the gate that table 2 has after its last convolution, it would exceed the paper's 2.5 M.
    assert small + 2 * 576 * 144 + 144 + 576 > 2.7e6


SIDES = {  # of each block's output, for images of 224 and 97 pixels
    "large": [
        *((112, 49), (56, 25), (56, 25), (28, 13), (28, 13), (28, 13), (14, 7), (14, 7), (14, 7)),
        *((14, 7), (14, 7), (14, 7), (7, 4), (7, 4), (7, 4)),
    ],
    "small": [
        *((56, 25), (28, 13), (28, 13), (14, 7), (14, 7), (14, 7), (14, 7), (14, 7), (7, 4)),
        *((7, 4), (7, 4)),
    ],
}


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("name", ["mobilenet_v3_{}", "keras_mobilenetv3{}"])
@pytest.mark.parametrize(("which", "pixels"), [(0, 224), (1, 97)])
def test_output_shape_of_each_block(size, name, which, pixels):
    logits, shapes = capture_shapes(name.format(size), pixels)
    half = (112, 49)[which]
    assert shapes["stem"] == (2, half, half, 16)
    rows = LARGE if size == "large" else SMALL
    for i, ((_, inner, width, squeezed), sides) in enumerate(
        zip(rows, SIDES[size], strict=True), 1
    ):
        assert shapes[f"block{i}"] == (2, sides[which], sides[which], width)
        assert shapes[f"block{i}/depthwise"][-1] == inner
        assert shapes.get(f"block{i}/se/reduce", (2, 0)) == (2, squeezed)
    assert shapes["top"][-1] == rows[-1][1]
    assert shapes["hidden_layer"] == (2, 1280 if size == "large" else 1024)
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize(
    ("name", "same", "momentum", "epsilon", "dropout"),
    [
        ("mobilenet_v3_small", False, 0.99, 1e-3, 0.2),
        ("mobilenetv3_large_100", False, 0.9, 1e-5, 0.0),
        ("keras_mobilenetv3small", True, 0.999, 1e-3, 0.2),
    ],
)
def test_arithmetic_of_each_source(name, same, momentum, epsilon, dropout):
    modules = capture_modules(name, 32)
    convs = [m for m in modules.values() if isinstance(m, nn.Conv) and m.kernel_size != (1, 1)]
    assert {m.kernel_size for m in convs} == {(3, 3), (5, 5)}
    for conv in convs:
        assert conv.padding == ("SAME" if same else conv.kernel_size[0] // 2)
    norms = [m for m in modules.values() if isinstance(m, nn.BatchNorm)]
    assert {(m.momentum, m.epsilon) for m in norms} == {(momentum, epsilon)}
    assert {m.rate for m in modules.values() if isinstance(m, nn.Dropout)} == {dropout}
    gates = [m for path, m in modules.items() if path.endswith("/se")]
    assert all((m.gate, m.activation) == (nn.hard_sigmoid, nn.relu) for m in gates)


def test_activations_are_the_tables():
    """ReLU up to block 6 of the large and block 3 of the small network, then hard swish."""
    for name, first in (("mobilenet_v3_large", 6), ("mobilenet_v3_small", 3)):
        modules = capture_modules(name, 32)
        blocks = len(create_model(name).table)
        activations = [modules[f"block{i}"].activation for i in range(1, blocks + 1)]
        assert activations == [RE] * first + [HS] * (blocks - first)
        assert modules["stem"].activation == modules["top"].activation == HS


TINY = dict(
    table=(Row(3, 16, 8, True, RE, 2), Row(5, 16, 8, True, HS, 1), Row(3, 24, 8, False, HS, 1)),
    hidden=8,
    num_classes=3,
    input_size=(16, 16, 3),
    dropout=0.0,
)
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def tiny():
    """Returns (network, variables, images)."""
    model = create_model("mobilenet_v3_small", **TINY)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    return model, init_variables(model, jax.random.key(0)), images


@pytest.mark.slow
def test_drop_path_and_remat(tiny):
    """Dropping changes no name and no evaluation; remat changes no result."""
    model, variables, images = tiny
    dropping = model.clone(drop_path=0.99, remat=True)
    shapes = jax.eval_shape(lambda: init_variables(dropping, jax.random.key(0)))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)

    @quick_jit
    def run(variables, key):
        evaluations = [m.apply(variables, images) for m in (model, dropping)]
        training = dict(train=True, rngs={"dropout": key}, mutable=True, capture_intermediates=True)
        _, state = dropping.apply(variables, images, **training)
        return evaluations, state["intermediates"]

    (plain, evaluated), seen = run(variables, jax.random.key(3))
    np.testing.assert_allclose(evaluated, plain, atol=1e-6)
    last, before = (np.asarray(seen[f"block{i}"]["__call__"][0]) for i in (3, 2))
    branch = np.asarray(seen["block3"]["project_norm"]["__call__"][0])
    dropped = [bool((a == b).all()) for a, b in zip(last, before)]
    assert any(dropped)
    for image, gone in enumerate(dropped):  # EfficientNet's schedule: 2 / 3 of the rate
        added = 0 if gone else branch[image] / (1 - 0.66)
        np.testing.assert_allclose(last[image] - before[image], added, atol=1e-4)


def test_zero_init_starts_branches_with_a_shortcut_at_zero():
    norms = norms_starting_at_zero(capture_modules("mobilenet_v3_small", 32, zero_init=True))
    assert norms == {f"block{i}/project_norm" for i in (3, 5, 6, 8, 10, 11)}
    assert not norms_starting_at_zero(capture_modules("mobilenet_v3_small", 32))


def test_width_mult_scales_every_layer_but_the_classifier():
    """timm's mobilenetv3_small_075 has these widths up to the last convolution."""
    _, shapes = capture_shapes("mobilenet_v3_small", 64, width_mult=0.75)
    widths = [shapes[f"block{i}"][-1] for i in range(1, 12)]
    assert widths == [16, 24, 24, 32, 32, 32, 40, 40, 72, 72, 72]
    assert (shapes["stem"][-1], shapes["top"][-1], shapes["hidden_layer"][-1]) == (16, 432, 768)


def test_bfloat16_leaves_logits_and_parameters_in_float32():
    logits, _ = capture_shapes("mobilenet_v3_small", 32, dtype="bfloat16")
    assert logits.dtype == jnp.float32
    modules = capture_modules("mobilenet_v3_small", 32, dtype="bfloat16", axis_name="batch")
    assert modules["block1/depthwise"].dtype == modules["block1/se"].dtype == jnp.bfloat16
    assert modules["block1/depthwise_norm"].axis_name == "batch"
    assert modules["hidden_layer"].dtype == modules["head"].dtype == jnp.float32


def test_norm_is_a_field():
    shapes = variable_shapes("mobilenet_v3_small", norm="none")
    assert not shapes["batch_stats"]


def test_errors():
    with pytest.raises(UserError, match="unknown padding 'tensorflow'"):
        capture_shapes("mobilenet_v3_small", 32, padding="tensorflow")
    with pytest.raises(UserError, match="unknown drop_path_mode 'pixel'"):
        capture_shapes("mobilenet_v3_small", 32, drop_path_mode="pixel")
