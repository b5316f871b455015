"""Xception: the paper's count, figure 5's shapes, and what each field does."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import xception
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import (
    capture_modules,
    capture_shapes,
    norms_starting_at_zero,
    variable_shapes,
)

# Figure 5: input channels of each residual block, and the widths of its separable convolutions.
FIGURE_5 = [
    *((64, (128, 128)), (128, (256, 256)), (256, (728, 728))),
    *([(728, (728, 728, 728))] * 8),
    (728, (728, 1024)),
]


def separable(taken: int, given: int) -> int:
    """Counts parameters, with a scale and a shift per channel of the following norm."""
    return 9 * taken + taken * given + 2 * given


def of_figure_5() -> int:
    count = 27 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64
    for taken, widths in FIGURE_5:
        for before, width in zip((taken, *widths), widths):
            count += separable(before, width)
        if len(widths) == 2:  # a projection
            count += taken * widths[-1] + 2 * widths[-1]
    return count + separable(1024, 1536) + separable(1536, 2048) + 2048 * 1000 + 1000


@pytest.mark.parametrize("name", xception.VARIANTS)
def test_count_by_hand(name):
    assert PUBLISHED[name].params == of_figure_5()


SIDES = {  # after stem, entry, middle and exit flow, for images of 299, 224 and the smallest size
    299: (147, 74, 37, 19, 19, 10),
    224: (109, 55, 28, 14, 14, 7),
    7: (1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("name", ["xception", "keras_xception"])
@pytest.mark.parametrize("size", SIDES)
def test_output_shape_of_each_flow(name, size):
    logits, shapes = capture_shapes(name, size)
    stem, *entry, middle, end = SIDES[size]
    assert shapes["stem"] == (2, stem, stem, 64)
    for i, (side, width) in enumerate(zip(entry, (128, 256, 728)), 1):
        assert shapes[f"entry{i}"] == (2, side, side, width)
    assert shapes["middle/block8"] == shapes["middle"] == (2, middle, middle, 728)
    assert shapes["exit/conv1"] == (2, middle, middle, 728)
    assert shapes["exit"] == (2, end, end, 1024)
    assert shapes["top1"] == (2, end, end, 1536)
    assert shapes["top2"] == (2, end, end, 2048)
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize("padding", ["torch", "same"])
@pytest.mark.parametrize("size", [5, 6])
def test_a_block_is_its_definition(padding, size):
    """ReLU, separable 3x3, ReLU, separable 3x3, 3x3/2 max pool; a projection of the input."""
    block = xception.Block(
        (3, 4), layers.Conv, layers.make_norm("none", train=False), stride=2, padding=padding
    )
    x = np.random.RandomState(0).randn(2, size, size, 2).astype(np.float32)
    y, variables = block.init_with_output(jax.random.key(0), x)
    kernels = {
        path: np.asarray(leaf)
        for path, leaf in pytree.flatten(variables["params"]).items()
        if path.endswith("kernel")
    }
    inner = x
    for i in (1, 2):
        around = np.pad(np.maximum(inner, 0), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(1, 2))
        depthwise = kernels[f"conv{i}/depthwise/kernel"][:, :, 0]
        inner = np.einsum("nhwcij,ijc->nhwc", windows, depthwise)
        inner = inner @ kernels[f"conv{i}/pointwise/kernel"][0, 0]
    first = 0 if padding == "same" and size == 6 else 1
    around = np.pad(inner, ((0, 0), (first, 2), (first, 2), (0, 0)), constant_values=-np.inf)
    expected = x[:, ::2, ::2] @ kernels["projection/kernel"][0, 0]
    for i in range(3):
        for j in range(3):
            expected[:, i, j] += around[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_the_first_block_begins_without_a_relu():
    modules = capture_modules("xception", 71)
    begins = {path: m.begins_with_relu for path, m in modules.items() if type(m) is xception.Block}
    assert len(begins) == 12
    assert [path for path, relu in begins.items() if not relu] == ["entry1"]


@pytest.mark.parametrize(
    ("name", "padding", "momentum", "epsilon", "dropout"),
    [("legacy_xception", "torch", 0.9, 1e-5, 0.5), ("keras_xception", "same", 0.99, 1e-3, 0.0)],
)
def test_arithmetic_of_each_source(name, padding, momentum, epsilon, dropout):
    modules = capture_modules(name, 71)
    blocks = [m for m in modules.values() if type(m) is xception.Block]
    norms = [m for m in modules.values() if isinstance(m, nn.BatchNorm)]
    assert {m.padding for m in blocks} == {padding}
    assert {(m.momentum, m.epsilon) for m in norms} == {(momentum, epsilon)}
    assert len(norms) == 40
    assert {m.rate for m in modules.values() if isinstance(m, nn.Dropout)} == {dropout}


TINY = dict(
    stem=(4, 4),
    entry=(8,),
    depth=3,
    exit=(8, 8),
    top=(8,),
    num_classes=3,
    input_size=(15, 15, 3),
    dropout=0.0,
)
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.slow
def test_scan_and_remat_change_nothing():
    model = create_model("xception", **TINY)
    images = jax.random.normal(jax.random.key(1), (4, 15, 15, 3))
    variables = init_variables(model, jax.random.key(0))

    def run(**fields):
        copy = model.clone(**fields)
        return quick_jit(lambda v: copy.apply(v, images, train=True, mutable="batch_stats"))(
            variables
        )

    same = partial(np.testing.assert_allclose, atol=2e-4)
    jax.tree.map(same, run(scan=True, remat=True), run())


def test_zero_init_starts_every_branch_at_zero():
    zero_norms = norms_starting_at_zero(capture_modules("xception", 71, zero_init=True))
    middle = {f"middle/block{i}/norm3" for i in range(1, 9)}
    assert zero_norms == middle | {f"entry{i}/norm2" for i in (1, 2, 3)} | {"exit/norm2"}
    assert not norms_starting_at_zero(capture_modules("xception", 71))


def test_bfloat16_leaves_logits_and_parameters_in_float32():
    logits, _ = capture_shapes("xception", 71, dtype="bfloat16")
    assert logits.dtype == jnp.float32
    modules = capture_modules("xception", 71, dtype="bfloat16", axis_name="batch")
    assert modules["entry1/conv1/depthwise"].dtype == jnp.bfloat16
    assert modules["entry1/norm1"].axis_name == "batch"


def test_norm_is_a_field():
    shapes = variable_shapes("xception", norm="none")
    assert not shapes["batch_stats"]


def test_errors():
    with pytest.raises(UserError, match="unknown padding 'tensorflow'"):
        capture_shapes("xception", 71, padding="tensorflow")
