"""SENets: published counts and MACs, place of the squeeze, conventions of Caffe and timm."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import create_model, init_variables, layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import senet
from tests.models.shapes import capture_shapes


def test_names_of_the_paper_are_the_authors_networks():
    for alias, name in senet.ALIASES.items():
        assert create_model(alias) == create_model(name)
    assert senet.ALIASES["se_resnext50_32x4d"] == "legacy_seresnext50_32x4d"


def test_the_squeeze_is_the_last_of_a_branch():
    _, shapes = capture_shapes("seresnet50", 224)
    for i, (side, width) in enumerate(((56, 256), (28, 512), (14, 1024), (7, 2048)), 1):
        assert shapes[f"stage{i}/block1/se/reduce"] == (2, width // 16)
        assert shapes[f"stage{i}/block1/se/expand"] == (2, width)
        assert shapes[f"stage{i}/block1/se"] == (2, side, side, width)


def test_caffe_s_conventions_and_timm_s():
    _, caffe = capture_shapes("legacy_seresnet50", 113)
    _, timm = capture_shapes("seresnet50", 113)
    assert (caffe["stem/conv"][1], timm["stem/conv"][1]) == (57, 57)
    assert (caffe["stem"][1], timm["stem"][1]) == (28, 29)  # the pool
    assert caffe["stage2/block1/conv1"] == (2, 14, 14, 128)
    assert timm["stage2/block1/conv1"] == (2, 29, 29, 128)
    _, caffe = capture_shapes("legacy_seresnet18", 224)
    _, timm = capture_shapes("seresnet18", 224)
    assert caffe["stage1/block1/se/reduce"] == (2, 4)
    assert timm["stage1/block1/se/reduce"] == (2, 8)
    with pytest.raises(UserError, match="2x2 are too small: the smallest is 3x3"):
        capture_shapes("legacy_seresnet18", 2)


def test_senet_154():
    """Appendix: deep stem, halved first 1x1, dropout, 3x3 projections except in the first stage."""
    logits, shapes = capture_shapes("legacy_senet154", 224)
    assert [shapes[f"stem/conv{i}"][-1] for i in (1, 2, 3)] == [64, 64, 128]
    for i, (side, out) in enumerate(((56, 256), (28, 512), (14, 1024), (7, 2048)), 1):
        assert shapes[f"stage{i}/block2/conv1"][-1] == out // 2
        assert shapes[f"stage{i}/block2/conv2"] == (2, side, side, out)
        assert shapes[f"stage{i}/block2"] == (2, side, side, out)
    assert logits.shape == (2, 1000)
    model = create_model("legacy_senet154", depths=(1, 1), num_classes=2)
    tree = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))["params"]
    assert tree["stage1"]["block1"]["projection"]["kernel"].shape == (1, 1, 128, 256)
    assert tree["stage2"]["block1"]["projection"]["kernel"].shape == (3, 3, 256, 512)
    assert tree["stage2"]["block1"]["conv2"]["kernel"].shape == (3, 3, 256 // 64, 512)
    assert (create_model("legacy_senet154").dropout, create_model("senet154").dropout) == (0.2, 0)


def test_the_legacy_basic_block_squeezes_after_a_relu():
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 16))
    module = senet.RectifiedSqueezeExcite(4)
    variables = module.init(jax.random.key(1), x)
    expected = layers.SqueezeExcite(4).apply(variables, np.maximum(x, 0))
    np.testing.assert_array_equal(module.apply(variables, x), expected)


def test_any_resnet_takes_the_squeeze():
    model = create_model("resnet18", depths=(1,), attention=layers.SqueezeExcite)
    paths = pytree.flatten(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))
    assert {path.rpartition("se/")[2] for path in paths if "/se/" in path} == {
        *("reduce/kernel", "reduce/bias", "expand/kernel", "expand/bias")
    }
