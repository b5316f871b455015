"""ResNeXt: published counts and MACs, table 1's shapes, CIFAR's three stages."""

from __future__ import annotations

import pytest

from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes


def of_section_5_3(groups: int) -> int:
    """Counts parameters of 29 layers, with groups of 64 channels in the first stage, 10 classes."""
    count, before = 9 * 3 * 64 + 2 * 64, 64
    for inner, out in ((64 * groups, 256), (128 * groups, 512), (256 * groups, 1024)):
        for block in range(3):
            count += before * inner + 9 * inner * inner // groups + inner * out
            count += 2 * (2 * inner + out)  # norms
            count += (before * out + 2 * out) * (block == 0)  # the projection
            before = out
    return count + 1024 * 10 + 10


@pytest.mark.parametrize("groups", [8, 16])
def test_count_by_hand(groups):
    assert PUBLISHED[f"resnext29_{groups}x64d"].params == of_section_5_3(groups)


def test_the_paper_s_rounded_counts():
    """They are in table 7 (34.4 M, 68.1 M) and table 1 (25.0 M)."""
    rounded = {"resnext29_8x64d": 34.4, "resnext29_16x64d": 68.1, "resnext50_32x4d": 25.0}
    for name, millions in rounded.items():
        assert PUBLISHED[name].params / 1e6 == pytest.approx(millions, abs=0.06)


def test_table_1():
    logits, shapes = capture_shapes("resnext50_32x4d", 224)
    for i, (side, width) in enumerate(((56, 128), (28, 256), (14, 512), (7, 1024)), 1):
        assert shapes[f"stage{i}/block2/conv2"] == (2, side, side, width)
        assert shapes[f"stage{i}"] == (2, side, side, 2 * width)
    assert shapes["stage2/block1/conv1"] == (2, 56, 56, 256)  # the stride is the 3x3's
    assert logits.shape == (2, 1000)


def test_cifar_has_three_stages_without_pooling():
    logits, shapes = capture_shapes("resnext29_8x64d", 32)
    assert shapes["stem"] == (2, 32, 32, 64)
    for i, (side, width) in enumerate(((32, 256), (16, 512), (8, 1024)), 1):
        assert shapes[f"stage{i}/block1/conv2"] == (2, side, side, 2 * width)
        assert shapes[f"stage{i}"] == (2, side, side, width)
    assert "stage4" not in shapes
    assert logits.shape == (2, 10)
