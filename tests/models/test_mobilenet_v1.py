"""MobileNet v1: counts from the paper's table, shapes and MACs, and each field."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.errors import UserError
from flax_cnns.models import mobilenet_v1
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_modules, capture_shapes, variable_shapes

# Table 1: input and output channels of each pair of a depthwise and a 1x1 convolution.
TABLE_1 = [
    *((32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)),
    *([(512, 512)] * 5),
    *((512, 1024), (1024, 1024)),
]


def count_table_1(percent: int) -> int:
    """Returns the parameters for alpha = percent / 100; norms have two per channel."""
    scale = lambda n: n * percent // 100  # noqa: E731
    count = 27 * scale(32) + 2 * scale(32) + scale(1024) * 1000 + 1000
    for inputs, outputs in TABLE_1:
        count += (9 + 2) * scale(inputs) + scale(inputs) * scale(outputs) + 2 * scale(outputs)
    return count


def test_counts_by_hand():
    for percent in (25, 50, 75, 100):
        assert PUBLISHED[f"mobilenet_v1_{percent:03}"].params == count_table_1(percent)
    assert PUBLISHED["mobilenetv1_125"].params == count_table_1(125)


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        # Table 6, and table 7 for smaller images; the tables cut off fractions of a million.
        *(("mobilenet_v1_100", 224, 569), ("mobilenet_v1_075", 224, 325)),
        *(("mobilenet_v1_050", 224, 149), ("mobilenet_v1_025", 224, 41)),
        *(("mobilenet_v1_100", 192, 418), ("mobilenet_v1_100", 160, 290)),
        ("mobilenet_v1_100", 128, 186),
    ],
)
def test_published_macs(name, size, millions):
    model = create_model(name, input_size=(size, size, 3))
    assert cost(model).macs / 1e6 == pytest.approx(millions, abs=0.7)


@pytest.mark.parametrize("name", ["mobilenet_v1_100", "keras_mobilenet"])
@pytest.mark.parametrize(
    ("size", "sides"), [(224, (112, 112, 56, 28, 14, 7)), (97, (49, 49, 25, 13, 7, 4))]
)
def test_output_shape_of_each_stage(name, size, sides):
    logits, shapes = capture_shapes(name, size)
    assert shapes["stem"] == (2, sides[0], sides[0], 32)
    for i, (side, width) in enumerate(zip(sides[1:], (64, 128, 256, 512, 1024)), 1):
        assert shapes[f"stage{i}"] == (2, side, side, width)
    assert shapes["stage4/block1/depthwise"] == (2, sides[4], sides[4], 256)
    assert shapes["stage4/block6"] == (2, sides[4], sides[4], 512)
    assert logits.shape == (2, 1000)
    assert capture_shapes(name, 1)[1]["stage5"] == (2, 1, 1, 1024)


def test_a_block_is_its_definition():
    """Figure 3; with depth_multiplier=2, each channel has two depthwise outputs."""
    norm = layers.make_norm("none", train=False)
    block = mobilenet_v1.Block(3, layers.Conv, norm=norm, activation=nn.relu, depth_multiplier=2)
    x = np.random.RandomState(0).randn(2, 4, 5, 2).astype(np.float32)
    y, variables = block.init_with_output(jax.random.key(0), x)
    depthwise = np.asarray(variables["params"]["depthwise"]["kernel"])[:, :, 0]  # [3 3 4]
    pointwise = np.asarray(variables["params"]["pointwise"]["kernel"])[0, 0]
    around = np.pad(np.repeat(x, 2, axis=-1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(1, 2))
    inner = np.maximum(np.einsum("nhwcij,ijc->nhwc", windows, depthwise), 0)
    np.testing.assert_allclose(y, np.maximum(inner @ pointwise, 0), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "padding", "momentum", "epsilon", "dropout"),
    [("mobilenetv1_100", 1, 0.9, 1e-5, 0.0), ("keras_mobilenet", "SAME", 0.99, 1e-3, 1e-3)],
)
def test_arithmetic_of_each_source(name, padding, momentum, epsilon, dropout):
    modules = capture_modules(name, 32)
    convs = [m for m in modules.values() if isinstance(m, nn.Conv) and m.kernel_size == (3, 3)]
    norms = [m for m in modules.values() if isinstance(m, nn.BatchNorm)]
    assert (len(convs), len(norms)) == (14, 27)
    assert {m.padding for m in convs} == {padding}
    assert {(m.momentum, m.epsilon) for m in norms} == {(momentum, epsilon)}
    assert {m.rate for m in modules.values() if isinstance(m, nn.Dropout)} == {dropout}


TINY = dict(width_mult=0.25, depths=(1, 1, 1, 4, 1), num_classes=3, input_size=(32, 32, 3))
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.slow
def test_scan_remat_and_activation():
    """Scan and remat change nothing; `activation` replaces ReLU6."""
    images = 9 * jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    plain = create_model("mobilenet_v1_100", **TINY)
    variables = init_variables(plain, jax.random.key(0))

    def run(**fields):
        model = plain.clone(**fields)
        apply = quick_jit(lambda v: model.apply(v, images, train=True, mutable="batch_stats"))
        return apply(variables)

    expected = run()
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=2e-4), run(scan=True, remat=True), expected
    )
    unbounded = plain.clone(activation=nn.relu)
    evaluate = quick_jit(
        lambda v: [
            model.apply(v, images, capture_intermediates=True)[1]["intermediates"]["stem"]
            for model in (plain, unbounded)
        ]
    )
    bounded, free = (np.asarray(stem["__call__"][0]) for stem in evaluate(variables))
    assert bounded.max() == 6 < free.max()
    np.testing.assert_allclose(np.minimum(free, 6), bounded, rtol=1e-6)


def test_bfloat16_leaves_logits_and_parameters_in_float32():
    logits, _ = capture_shapes("mobilenet_v1_025", 32, dtype="bfloat16")
    assert logits.dtype == jnp.float32
    modules = capture_modules("mobilenet_v1_025", 32, dtype="bfloat16", param_dtype="float32")
    assert modules["stage1/block1/depthwise"].dtype == jnp.bfloat16
    assert modules["stage1/block1/depthwise_norm"].axis_name is None
    synchronized = capture_modules("mobilenet_v1_025", 32, axis_name="batch")
    assert synchronized["stage1/block1/depthwise_norm"].axis_name == "batch"


def test_norm_is_a_field():
    shapes = variable_shapes("mobilenet_v1_100", norm="none")
    assert not shapes["batch_stats"]
    assert all(p.endswith(("kernel", "head/bias")) for p in pytree.flatten(shapes["params"]))


def test_errors():
    with pytest.raises(UserError, match="unknown padding 'tensorflow'"):
        capture_shapes("mobilenet_v1_025", 32, padding="tensorflow")
