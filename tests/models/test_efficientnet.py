"""EfficientNet: published counts and MACs, table 1's shapes, scaling, and each field."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.errors import UserError
from flax_cnns.models import efficientnet
from flax_cnns.models.efficientnet import compound_scale
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.studies.search.scaled_networks import mobilenet_v1, mobilenet_v2, resnet
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes


def by_hand(stem: int, widths: tuple, depths: tuple, top: int) -> int:
    """Parameters of table 1's network with these widths and depths."""
    count, before = 27 * stem + 2 * stem, stem
    for i, (width, depth) in enumerate(zip(widths, depths)):
        kernel = (3, 3, 5, 3, 5, 5, 3)[i]
        for _ in range(depth):
            inner, squeeze = before * (1 if i == 0 else 6), before // 4
            if i:
                count += before * inner + 2 * inner
            count += kernel**2 * inner + 2 * inner
            count += inner * squeeze + squeeze + squeeze * inner + inner
            count += inner * width + 2 * width
            before = width
    return count + before * top + 2 * top + top * 1000 + 1000


DERIVED = {  # factors 2.2 and 3.6, 4.3 and 5.3, rounded by hand; timm has 87.41 M and 480.31 M
    "efficientnet_b8": by_hand(
        72, (32, 56, 88, 176, 248, 424, 704), (4, 8, 8, 11, 11, 15, 4), 2816
    ),
    "efficientnet_l2": by_hand(
        136, (72, 104, 176, 344, 480, 824, 1376), (6, 11, 11, 16, 16, 22, 6), 5504
    ),
}


@pytest.mark.parametrize(
    ("name", "millions"), [("efficientnet_b8", 87.41), ("efficientnet_l2", 480.31)]
)
def test_derived_count(name, millions):
    params = PUBLISHED[name].params
    assert params == DERIVED[name]
    assert params / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("padding", ["torch", "same"])
@pytest.mark.parametrize(
    ("size", "sides"), [(224, (112, 56, 28, 14, 14, 7, 7)), (65, (33, 17, 9, 5, 5, 3, 3))]
)
def test_output_shape_of_each_stage(padding, size, sides):
    """Sides and widths of table 1."""
    logits, shapes = capture_shapes("efficientnet_b0", size, padding=padding)
    assert shapes["stem"] == (2, sides[0], sides[0], 32)
    for i, (side, width) in enumerate(zip(sides, (16, 24, 40, 80, 112, 192, 320))):
        assert shapes[f"stage{i + 1}"] == (2, side, side, width)
    assert shapes["top"] == (2, sides[-1], sides[-1], 1280)
    assert logits.shape == (2, 1000)


def test_squeeze_is_a_fourth_of_the_blocks_input():
    _, shapes = capture_shapes("efficientnet_b0", 64)
    assert shapes["stage3/block1/se/reduce"] == (2, 24 // 4)
    assert shapes["stage3/block2/se/reduce"] == (2, 40 // 4)
    assert shapes["stage3/block2/se/expand"] == (2, 240)


def test_lite_has_fixed_ends_and_no_squeeze():
    """Lite4 has factors 1.4 and 1.8.

    They do not apply to stem and top, nor to the depths of the first and last stage.
    """
    model = create_model("efficientnet_lite4")
    assert model.compute_sizes() == (
        [1, 4, 4, 6, 6, 8, 1],
        [24, 32, 56, 112, 160, 272, 448],
        [32, 1280],
    )
    _, shapes = capture_shapes("efficientnet_lite4", 64)
    assert not [path for path in shapes if "/se" in path]
    assert shapes["stem"] == (2, 32, 32, 32)


# ------------------------------------------------------------------------- scaling


def test_compound_scale_is_equation_3():
    scale = compound_scale(1)
    assert scale == (1.1, 1.2, 1.15)
    assert scale._fields == ("width_mult", "depth_mult", "resolution_mult")
    assert compound_scale(0) == (1, 1, 1)
    np.testing.assert_allclose(compound_scale(3), (1.331, 1.728, 1.520875))
    other = compound_scale(2, alpha=1.3, beta=1.0, gamma=1.25)
    np.testing.assert_allclose(other, (1.0, 1.69, 1.5625))
    np.testing.assert_allclose(1.2 * 1.1**2 * 1.15**2, 2, rtol=0.05)  # the constraint
    with pytest.raises(UserError, match="negative phi"):
        compound_scale(1, beta=0.9)


@pytest.mark.slow
def test_operations_double_with_phi():
    """By equation 3 operations grow by 1.92 per phi. The test compares phi = 2 with 1: from B0 to
    phi = 1 they grow more, because every stage gains a block."""

    def macs(phi):
        scale = compound_scale(phi)
        resolution = round(224 * scale.resolution_mult)
        return cost(
            efficientnet.make_efficientnet(
                width_mult=scale.width_mult, depth_mult=scale.depth_mult, resolution=resolution
            )
        ).macs

    assert macs(2) / macs(1) == pytest.approx(1.92, rel=0.06)


def test_the_modules_table_of_formula_and_released_networks():
    """Recomputes both halves of the table in the module's docstring."""
    rows = [line.split() for line in efficientnet.__doc__.splitlines() if line[:5] == "    B"]
    assert [row[0] for row in rows] == [f"B{i}" for i in range(1, 8)]
    for name, phi, *numbers in rows:
        *formula, w, d, r = map(float, numbers)
        scale = compound_scale(float(phi))
        np.testing.assert_allclose(formula[:2], scale[:2], atol=0.006)
        assert formula[2] == round(224 * scale.resolution_mult)
        assert efficientnet.POINTS[name.lower()][:3] == (w, d, r)


def test_any_factors():
    model = efficientnet.make_efficientnet(width_mult=2.0, depth_mult=3.1, resolution=600)
    b7 = create_model("efficientnet_b7")
    assert model.input_size == (600, 600, 3)
    assert model.compute_sizes() == b7.compute_sizes()
    small = efficientnet.make_efficientnet(
        width_mult=0.5, depth_mult=0.5, resolution=32, num_classes=3, dropout=0.5
    )
    assert (small.num_classes, small.dropout) == (3, 0.5)
    assert small.compute_sizes() == ([1, 1, 1, 2, 2, 2, 1], [8, 16, 24, 40, 56, 96, 160], [16, 640])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "factors", "gmacs"),
    [  # table 3, which has 14.7 and 16.2 the other way around
        *((mobilenet_v1, (1, 1, 224), 0.6), (mobilenet_v1, (2, 1, 224), 2.2)),
        *((mobilenet_v1, (1, 1, 448), 2.2), (mobilenet_v1, (1.2, 1.4, 291), 2.3)),
        *((mobilenet_v2, (1, 1, 224), 0.3), (mobilenet_v2, (1, 4, 224), 1.2)),
        *((mobilenet_v2, (2, 1, 224), 1.1), (mobilenet_v2, (1, 1, 448), 1.2)),
        *((resnet, (1, 1, 224), 4.1), (resnet, (1, 1, 448), 16.4)),
        *((resnet, (1, 4, 224), 14.7), (resnet, (2, 1, 224), 16.2)),
    ],
)
def test_table_3_scales_mobilenet_and_resnet(build, factors, gmacs):
    width_mult, depth_mult, resolution = factors
    model = build(width_mult=width_mult, depth_mult=depth_mult, resolution=resolution)
    assert model.input_size == (resolution, resolution, 3)
    model = model.clone(kernel_init=nn.initializers.zeros)  # quicker to trace
    assert cost(model).macs / 1e9 == pytest.approx(gmacs, rel=0.08)  # 1.4 blocks become 2


# ------------------------------------------------------------------------- fields


def test_epsilon_and_momentum_are_the_sources():
    def of(name):
        model = create_model(name)
        return model.momentum, model.epsilon, model.padding

    assert of("efficientnet_b4") == (0.9, 1e-5, "torch")
    assert of("efficientnet_b5") == (0.99, 1e-3, "torch")
    assert of("tf_efficientnet_lite0") == of("keras_efficientnetb4") == (0.99, 1e-3, "same")


SMALL = dict(width_mult=0.25, depth_mult=0.5, num_classes=3, input_size=(32, 32, 3))


def test_stochastic_depth_changes_no_name_and_needs_its_stream():
    images = jnp.zeros((2, 32, 32, 3))
    model, still = (create_model("efficientnet_b0", **SMALL, drop_path=p) for p in (0.2, 0.0))
    assert create_model("efficientnet_b0").drop_path == 0.2
    shapes = [jax.eval_shape(m.init, jax.random.key(0), images) for m in (model, still)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])

    def train(variables, **rngs):
        fields = dict(train=True, mutable="batch_stats", rngs=rngs)
        return model.clone(dropout=0.0).apply(variables, images, **fields)

    with pytest.raises(UserError, match="dropout"):
        jax.eval_shape(train, shapes[0])
    logits, _ = jax.eval_shape(lambda v, key: train(v, dropout=key), shapes[0], jax.random.key(0))
    assert logits.shape == (2, 3)


def test_initial_values_are_the_released_codes():
    """A depthwise kernel has variance 2 / 9, by its 3x3 window; "he" would also divide by C."""
    kernel = efficientnet.paper_init(jax.random.key(0), (3, 3, 1, 4096))
    assert float(jnp.var(kernel)) == pytest.approx(2 / 9, rel=0.05)
    kernel = efficientnet.paper_init(jax.random.key(0), (1, 1, 64, 512))
    assert float(jnp.var(kernel)) == pytest.approx(2 / 512, rel=0.05)
    assert create_model("tf_efficientnet_b0").kernel_init == "paper"


def test_zero_init_is_only_where_a_shortcut_is():
    model = create_model("efficientnet_b0", **SMALL, zero_init=True, init=nn.initializers.zeros)
    flat = pytree.flatten(init_variables(model, jax.random.key(0))["params"])
    zero = {path for path in flat if path.endswith("scale") and not flat[path].any()}
    # Stem of width 8, stages of 8, 8, 16, 24, 32, 48, 80: the first stage has a shortcut too.
    blocks = ("stage1/block1", "stage4/block2", "stage5/block2", "stage6/block2")
    assert zero == {f"{block}/project_norm/scale" for block in blocks}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(padding="valid"), "unknown padding 'valid'"),
        (dict(drop_path_schedule="cosine"), "unknown drop_path_schedule"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError, match=message):
        capture_shapes("efficientnet_b0", 32, **fields)
