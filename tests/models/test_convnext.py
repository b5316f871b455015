"""ConvNeXt: published counts and MACs, shapes of stages, and what each field does."""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import convnext
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.weights import convert
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, variable_shapes


def count_section_3(depths: tuple[int, ...], widths: tuple[int, ...]) -> int:
    """Returns the parameters by hand: stem, blocks, downsampling, last norm and 1000 classes."""
    count = 4 * 4 * 3 * widths[0] + 3 * widths[0]
    for depth, c in zip(depths, widths):
        block = (49 * c + c) + 2 * c + (4 * c * c + 4 * c) + (4 * c * c + c) + c
        count += depth * block
    for before, after in itertools.pairwise(widths):
        count += 2 * before + 4 * before * after + after
    return count + 2 * widths[-1] + 1000 * widths[-1] + 1000


def test_xlarge_by_hand_and_by_timms_rounded_count():
    by_hand = count_section_3((3, 3, 27, 3), (256, 512, 1024, 2048))
    assert PUBLISHED["convnext_xlarge"].params == by_hand
    assert by_hand / 1e6 == pytest.approx(350.2, abs=0.05)  # timm's table
    tiny = count_section_3((3, 3, 9, 3), (96, 192, 384, 768))
    assert tiny == PUBLISHED["convnext_tiny"].params  # checks the formula


@pytest.mark.parametrize(
    ("size", "sides"), [(224, (56, 28, 14, 7)), (111, (27, 13, 6, 3)), (32, (8, 4, 2, 1))]
)
def test_output_shape_of_each_stage(size, sides):
    """Sizes round down."""
    logits, shapes = capture_shapes("convnext_tiny", size)
    for i, side in enumerate(sides):
        assert shapes[f"stage{i + 1}"] == (2, side, side, 96 * 2**i)
        if i:
            before = (2, sides[i - 1], sides[i - 1], 96 * 2 ** (i - 1))
            assert shapes[f"downsample{i}/norm"] == before
            assert shapes[f"downsample{i}"] == (2, side, side, 96 * 2**i)
    assert shapes["stem/conv"] == shapes["stem"] == shapes["stage1"]
    assert shapes["stage3/block9/expand"] == (2, sides[2], sides[2], 4 * 384)
    assert shapes["norm"] == (2, 768)
    assert logits.shape == (2, 1000)


def block(**fields):
    return convnext.Block(layers.Conv, layers.make_norm("channel", train=False), **fields)


def test_a_block_by_hand():
    """Compares with NumPy, for a kernel that is zero except in the middle."""
    random = np.random.RandomState(0)
    x = random.randn(2, 3, 3, 4).astype(np.float32)
    shapes = jax.eval_shape(lambda: block().init(jax.random.key(0), x))["params"]
    p = jax.tree.map(lambda s: random.randn(*s.shape).astype(np.float32), shapes)
    assert set(p) == {"depthwise", "norm", "expand", "project", "layer_scale"}
    middle = np.zeros_like(p["depthwise"]["kernel"])
    middle[3, 3] = p["depthwise"]["kernel"][3, 3]
    p["depthwise"]["kernel"] = middle
    y = x * middle[3, 3, 0] + p["depthwise"]["bias"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y * p["norm"]["scale"] + p["norm"]["bias"]
    y = y @ p["expand"]["kernel"][0, 0] + p["expand"]["bias"]
    erf = np.vectorize(math.erf)
    y = 0.5 * y * (1 + erf(y / np.sqrt(2)))
    y = y @ p["project"]["kernel"][0, 0] + p["project"]["bias"]
    got = block().apply({"params": p}, x)
    np.testing.assert_allclose(got, x + p["layer_scale"] * y, rtol=1e-4, atol=1e-4)


TINY = dict(depths=(1, 3), width=8, num_classes=3, input_size=(16, 16, 3), layer_scale=1.0)
NO_OPTIMIZATION = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def tiny():
    """Returns (variables of TINY, images)."""
    variables = init_variables(create_model("convnext_tiny", **TINY), jax.random.key(0))
    return variables, jax.random.normal(jax.random.key(1), (4, 16, 16, 3))


def logits(variables, images, train=False, **fields):
    model = create_model("convnext_tiny", **TINY | fields)
    rngs = {"dropout": jax.random.key(2)}

    def apply(v):
        return model.apply(v, images, train=train, rngs=rngs if train else None)

    return jax.jit(apply, compiler_options=NO_OPTIMIZATION)(variables)


def test_layer_scale_has_the_given_initial_value_and_can_be_left_out(tiny):
    flat = pytree.flatten(tiny[0]["params"])
    scales = {path: value for path, value in flat.items() if path.endswith("layer_scale")}
    assert len(scales) == 4
    assert all((value == 1.0).all() for value in scales.values())
    assert create_model("convnext_tiny").layer_scale == 1e-6
    bare = create_model("convnext_tiny", **TINY | dict(layer_scale=None))
    shapes = jax.eval_shape(lambda: init_variables(bare, jax.random.key(0)))
    assert set(pytree.flatten(shapes["params"])) == set(flat) - set(scales)


def test_drop_path_is_per_image_and_leaves_evaluation_and_names_alone(tiny):
    variables, images = tiny
    shapes = variable_shapes("convnext_tiny", **TINY, drop_path=0.5)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    plain = logits(variables, images)
    np.testing.assert_array_equal(logits(variables, images, drop_path=0.5), plain)
    dropped = logits(variables, images, train=True, drop_path=0.9)
    changed = (np.abs(dropped - plain) > 1e-3).any(-1)
    assert changed.any()
    # The first block is never dropped, so a network of one block drops nothing.
    one_block = dict(depths=(1,), drop_path=0.9)
    first = {**variables, "params": dict(variables["params"])}
    for name in ("downsample1", "stage2"):
        del first["params"][name]
    first["params"]["norm"] = dict(scale=np.ones(8), bias=np.zeros(8))
    first["params"]["head"] = dict(kernel=np.eye(8, 3), bias=np.zeros(3))
    np.testing.assert_allclose(
        logits(first, images, train=True, **one_block),
        logits(first, images, **one_block),
        rtol=1e-5,
    )


def test_drop_path_needs_its_stream(tiny):
    variables, images = tiny
    model = create_model("convnext_tiny", **TINY, drop_path=0.5)
    with pytest.raises(UserError, match="dropout"):
        jax.eval_shape(partial(model.apply, train=True), variables, images)


@pytest.mark.parametrize(
    "fields",
    [pytest.param(dict(scan=True), marks=pytest.mark.slow), dict(scan=True, remat=True)],
)
def test_scan_and_remat_change_no_result(tiny, fields):
    variables, images = tiny
    training = dict(train=True, drop_path=0.5)
    np.testing.assert_allclose(
        logits(variables, images, **training, **fields),
        logits(variables, images, **training),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(("norm", "statistics"), [("batch", True), ("layer", False)])
def test_other_norms(norm, statistics):
    shapes = variable_shapes("convnext_tiny", **TINY | dict(width=16), norm=norm)
    assert bool(shapes["batch_stats"]) is statistics


def test_kernels_start_as_torchvisions(tiny):
    flat = pytree.flatten(tiny[0]["params"])
    kernels = np.concatenate([np.ravel(v) for path, v in flat.items() if path.endswith("kernel")])
    assert kernels.std() == pytest.approx(0.02, rel=0.05)
    assert all((v == 0).all() for path, v in flat.items() if path.endswith("bias"))


def test_timms_names_of_dense_layers_and_of_convolutions():
    """Identifies one tensor of each kind by its values.

    timm's atto to nano have 1x1 convolutions where its larger networks have dense layers.
    """
    model = create_model("convnext_atto", depths=(1, 1), width=4, num_classes=3)
    shapes = pytree.flatten(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))
    names = {
        "stem/conv": "stem.0",
        "stem/norm": "stem.1",
        "downsample1/norm": "stages.1.downsample.0",
        "downsample1/conv": "stages.1.downsample.1",
        "norm": "head.norm",
        "head": "head.fc",
    }
    parts = [("depthwise", "conv_dw"), ("norm", "norm"), ("expand", "mlp.fc1")]
    for i in (0, 1):
        for ours, theirs in (*parts, ("project", "mlp.fc2")):
            names[f"stage{i + 1}/block1/{ours}"] = f"stages.{i}.blocks.0.{theirs}"
    random, tensors, expected = np.random.RandomState(0), {}, {}
    for path, leaf in shapes.items():
        module, _, kind = path.removeprefix("params/").rpartition("/")
        value = expected[path] = random.randn(*leaf.shape).astype(np.float32)
        if kind == "layer_scale":
            tensors[f"stages.{int(module[5]) - 1}.blocks.0.gamma"] = value
        elif kind == "kernel":
            axes = (3, 2, 0, 1) if value.ndim == 4 else (1, 0)
            tensors[f"{names[module]}.weight"] = value.transpose(axes)
        else:
            tensors[f"{names[module]}.{'weight' if kind == 'scale' else kind}"] = value
    dense = {k: v[:, :, 0, 0] if ".mlp.fc" in k and v.ndim == 4 else v for k, v in tensors.items()}
    for given in (tensors, dense):
        got = pytree.flatten(convert("convnext_atto", given, "timm", depths=(1, 1), width=4))
        assert set(got) == set(expected)
        for path, value in expected.items():
            np.testing.assert_array_equal(got[path], value, err_msg=path)
