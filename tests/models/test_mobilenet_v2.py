"""MobileNet v2: counts from the paper's table, shapes and MACs, and each field."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import mobilenet_v2
from flax_cnns.models.mobilenet_v2 import Row
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import (
    capture_modules,
    capture_shapes,
    cost_of,
    norms_starting_at_zero,
    variable_shapes,
)

# Table 2's widths for each width multiplier: stem, seven stages, last convolution.
WIDTHS = {
    "025": (8, 8, 8, 8, 16, 24, 40, 80, 1280),
    "035": (16, 8, 8, 16, 24, 32, 56, 112, 1280),
    "050": (16, 8, 16, 16, 32, 48, 80, 160, 1280),
    "075": (24, 16, 24, 24, 48, 72, 120, 240, 1280),
    "100": (32, 16, 24, 32, 64, 96, 160, 320, 1280),
    "140": (48, 24, 32, 48, 88, 136, 224, 448, 1792),
}
DEPTHS = (1, 2, 3, 4, 3, 3, 1)


def count_table_2(widths: tuple[int, ...]) -> int:
    """Returns the parameters; norms have a scale and a shift per channel."""
    stem, *stages, top = widths
    count = 27 * stem + 2 * stem
    channels = stem
    for i, (width, depth) in enumerate(zip(stages, DEPTHS)):
        for _ in range(depth):
            inner = channels if i == 0 else 6 * channels
            count += 0 if i == 0 else channels * inner + 2 * inner
            count += 9 * inner + 2 * inner + inner * width + 2 * width
            channels = width
    return count + channels * top + 2 * top + top * 1000 + 1000


@pytest.mark.parametrize("name", mobilenet_v2.VARIANTS)
def test_count(name):
    multiplier = name[-3:] if name[-3:] in WIDTHS else "100"
    assert PUBLISHED[name].params == count_table_2(WIDTHS[multiplier])


@pytest.mark.parametrize(
    ("name", "size", "macs", "parameters"),
    [  # millions, from the authors' table of released networks; its parameters exclude norms'
        ("mobilenet_v2_140", 224, 582, 6.06),
        ("mobilenet_v2", 224, 301, 3.47),  # 300 in that table, 0.301 GMACs in torchvision's
        ("mobilenet_v2", 96, 56, 3.47),
        ("mobilenet_v2_075", 224, 209, 2.61),
        ("mobilenet_v2_050", 224, 97, 1.95),
        ("mobilenet_v2_035", 224, 59, 1.66),
    ],
)
def test_published_macs(name, size, macs, parameters):
    counted = cost_of(name, input_size=(size, size, 3))
    assert counted.macs / 1e6 == pytest.approx(macs, abs=0.5)
    bare = sum(layer.params for layer in counted.layers if layer.kind != "BatchNorm")
    assert bare / 1e6 == pytest.approx(parameters, abs=0.005)


@pytest.mark.parametrize("name", ["mobilenet_v2", "keras_mobilenetv2"])
@pytest.mark.parametrize(
    ("size", "sides"), [(224, (112, 112, 56, 28, 14, 14, 7, 7)), (97, (49, 49, 25, 13, 7, 7, 4, 4))]
)
def test_output_shape_of_each_stage(name, size, sides):
    logits, shapes = capture_shapes(name, size)
    stem, *stages, top = WIDTHS["100"]
    assert shapes["stem"] == (2, sides[0], sides[0], stem)
    for i, (side, width) in enumerate(zip(sides[1:], stages), 1):
        assert shapes[f"stage{i}"] == (2, side, side, width)
    assert shapes["top"] == (2, sides[-1], sides[-1], top)
    assert logits.shape == (2, 1000)


def test_blocks_are_inverted_residuals():
    """Blocks are wide inside, where the stride is; the first stage does not expand."""
    _, shapes = capture_shapes("mobilenet_v2", 224)
    assert "stage1/block1/expand" not in shapes
    assert shapes["stage2/block1/expand"] == (2, 112, 112, 96)
    assert shapes["stage2/block1/depthwise"] == (2, 56, 56, 96)
    assert shapes["stage2/block2/expand"] == (2, 56, 56, 144)
    assert capture_shapes("mobilenet_v2", 1)[1]["top"] == (2, 1, 1, 1280)


@pytest.mark.parametrize(
    ("name", "padding", "momentum", "epsilon", "dropout"),
    [
        ("mobilenet_v2", 1, 0.9, 1e-5, 0.2),
        ("mobilenetv2_100", 1, 0.9, 1e-5, 0.0),
        ("keras_mobilenetv2", "SAME", 0.999, 1e-3, 0.0),
    ],
)
def test_arithmetic_of_each_source(name, padding, momentum, epsilon, dropout):
    modules = capture_modules(name, 32)
    convs = [m for m in modules.values() if isinstance(m, nn.Conv) and m.kernel_size == (3, 3)]
    norms = [m for m in modules.values() if isinstance(m, nn.BatchNorm)]
    assert (len(convs), len(norms)) == (18, 52)
    assert {m.padding for m in convs} == {padding}
    assert {(m.momentum, m.epsilon) for m in norms} == {(momentum, epsilon)}
    assert {m.rate for m in modules.values() if isinstance(m, nn.Dropout)} == {dropout}


TINY = dict(
    width_mult=0.25,
    table=(Row(1, 16, 1, 2), Row(2, 32, 4, 2)),
    num_classes=3,
    input_size=(16, 16, 3),
    dropout=0.0,
)
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def tiny():
    """Returns (network, variables, images)."""
    model = create_model("mobilenet_v2", **TINY)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    return model, init_variables(model, jax.random.key(0)), images


@pytest.mark.slow
def test_scan_and_remat_change_nothing(tiny):
    model, variables, images = tiny

    def run(**fields):
        copy = model.clone(**fields)
        return quick_jit(lambda v: copy.apply(v, images, train=True, mutable="batch_stats"))(
            variables
        )

    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), run(scan=True, remat=True), run())


def test_drop_path_changes_no_name_and_drops_images_in_training(tiny):
    """Of five blocks, those with rate 0 or without a shortcut are never dropped."""
    model, variables, images = tiny
    dropping = model.clone(drop_path=0.9)
    shapes = jax.eval_shape(lambda: init_variables(dropping, jax.random.key(0)))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)

    @quick_jit
    def run(variables, key):
        evaluations = [m.apply(variables, images) for m in (model, dropping)]
        training = dict(train=True, rngs={"dropout": key}, mutable=True, capture_intermediates=True)
        _, state = dropping.apply(variables, images, **training)
        return evaluations, state["intermediates"]["stage2"]

    (plain, evaluated), stage = run(variables, jax.random.key(3))
    np.testing.assert_allclose(evaluated, plain, atol=1e-6)  # "sample" leaves evaluation alone
    last, before = (np.asarray(stage[f"block{i}"]["__call__"][0]) for i in (4, 3))
    dropped = [bool((a == b).all()) for a, b in zip(last, before)]
    assert any(dropped)
    branch = np.asarray(stage["block4"]["project_norm"]["__call__"][0])
    rate = 0.9 * 4 / 5  # EfficientNet's schedule: i / N
    for image, gone in enumerate(dropped):
        added = 0 if gone else branch[image] / (1 - rate)
        np.testing.assert_allclose(last[image] - before[image], added, atol=1e-4)
    for mode in ("batch", "pixel"):
        copy = model.clone(drop_path=0.5, drop_path_mode=mode)
        trace = partial(jax.eval_shape, lambda c=copy: c.apply(variables, images))
        if mode == "batch":
            assert trace().shape == (4, 3)
        else:
            with pytest.raises(UserError, match="unknown drop_path_mode 'pixel'"):
                trace()


def test_zero_init_starts_branches_with_a_shortcut_at_zero():
    norms = norms_starting_at_zero(capture_modules("mobilenet_v2", 32, zero_init=True))
    repeats = [(i, j) for i, depth in enumerate(DEPTHS, 1) for j in range(2, depth + 1)]
    assert norms == {f"stage{i}/block{j}/project_norm" for i, j in repeats}
    assert not norms_starting_at_zero(capture_modules("mobilenet_v2", 32))


def test_bfloat16_leaves_logits_and_parameters_in_float32():
    logits, _ = capture_shapes("mobilenet_v2_025", 32, dtype="bfloat16")
    assert logits.dtype == jnp.float32
    modules = capture_modules("mobilenet_v2_025", 32, dtype="bfloat16", axis_name="batch")
    assert modules["stage2/block1/depthwise"].dtype == jnp.bfloat16
    assert modules["stage2/block1/depthwise_norm"].axis_name == "batch"
    assert modules["head"].dtype == jnp.float32


def test_norm_is_a_field():
    shapes = variable_shapes("mobilenet_v2", norm="none")
    assert not shapes["batch_stats"]
    assert all(p.endswith(("kernel", "head/bias")) for p in pytree.flatten(shapes["params"]))


def test_errors():
    with pytest.raises(UserError, match="unknown padding 'tensorflow'"):
        capture_shapes("mobilenet_v2", 32, padding="tensorflow")
