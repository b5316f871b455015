"""ResNeXt: published counts and MACs, table 1's shapes, CIFAR's three stages."""

from __future__ import annotations

import pytest

from flax_cnns import create_model, model_info
from flax_cnns.analysis.cost import cost
from flax_cnns.models import resnext
from tests.models.captured import captured

PUBLISHED = {
    # torchvision 0.28.0, ResNeXt*_Weights.IMAGENET1K_V1.meta["num_params"]
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "resnext101_32x4d": 44_177_704,  # timm 1.0.31, built without weights
}


def of_section_5_3(groups: int) -> int:
    """Parameters of 29 layers with groups of 64 channels in the first stage, ten classes."""
    count, before = 9 * 3 * 64 + 2 * 64, 64
    for inner, out in ((64 * groups, 256), (128 * groups, 512), (256 * groups, 1024)):
        for block in range(3):
            count += before * inner + 9 * inner * inner // groups + inner * out
            count += 2 * (2 * inner + out)  # norms
            count += (before * out + 2 * out) * (block == 0)  # the projection
            before = out
    return count + 1024 * 10 + 10


DERIVED = {f"resnext29_{groups}x64d": of_section_5_3(groups) for groups in (8, 16)}


@pytest.mark.parametrize("name", resnext.VARIANTS)
def test_count(name):
    assert model_info(name).params == (PUBLISHED | DERIVED)[name]


def test_the_paper_s_rounded_counts():
    """Table 7 (34.4 M, 68.1 M), table 1 (25.0 M)."""
    rounded = {"resnext29_8x64d": 34.4, "resnext29_16x64d": 68.1, "resnext50_32x4d": 25.0}
    for name, millions in rounded.items():
        assert model_info(name).params / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("name", "gmacs", "tolerance"),
    [
        # torchvision 0.28.0, the weights' meta["_ops"]
        *(("resnext50_32x4d", 4.230, 5e-4), ("resnext101_32x8d", 16.414, 5e-4)),
        *(("resnext101_64x4d", 15.460, 5e-4), ("resnext101_32x4d", 8.01, 0.01)),  # timm's table
    ],
)
def test_published_macs(name, gmacs, tolerance):
    assert cost(create_model(name)).macs / 1e9 == pytest.approx(gmacs, rel=tolerance)


def test_table_1():
    logits, shapes = captured("resnext50_32x4d", 224)
    for i, (side, width) in enumerate(((56, 128), (28, 256), (14, 512), (7, 1024)), 1):
        assert shapes[f"stage{i}/block2/conv2"] == (2, side, side, width)
        assert shapes[f"stage{i}"] == (2, side, side, 2 * width)
    assert shapes["stage2/block1/conv1"] == (2, 56, 56, 256)  # the stride is the 3x3's
    assert logits.shape == (2, 1000)


def test_cifar_has_three_stages_without_pooling():
    logits, shapes = captured("resnext29_8x64d", 32)
    assert shapes["stem"] == (2, 32, 32, 64)
    for i, (side, width) in enumerate(((32, 256), (16, 512), (8, 1024)), 1):
        assert shapes[f"stage{i}/block1/conv2"] == (2, side, side, 2 * width)
        assert shapes[f"stage{i}"] == (2, side, side, width)
    assert "stage4" not in shapes
    assert logits.shape == (2, 10)
