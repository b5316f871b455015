"""The searched 15-layer network: figure 7 by hand, published counts, errors."""

from __future__ import annotations

import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import nas
from flax_cnns.models.registry import create_model
from tests.models.counting import count_params
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, variable_shapes

# Figure 7, from the image up: height, width and number of filters of each layer.
BOXES = [
    *((3, 3, 36), (3, 3, 48), (3, 3, 36), (5, 5, 36), (3, 7, 48), (7, 7, 48), (7, 7, 48)),
    *((7, 3, 36), (7, 1, 36), (7, 7, 36), (5, 7, 36), (7, 7, 48), (7, 5, 48), (7, 5, 48)),
    (7, 5, 48),
]
# Input channels of each layer, by the connections in the figure.
ENTER = [3, 36, 84, 120, 72, 168, 216, 132, 168, 324, 336, 240, 360, 180, 276]
WIDTHS = [n for _, _, n in BOXES]


def count(enter: list[int]) -> int:
    layers = sum(h * w * c * n + 2 * n for (h, w, n), c in zip(BOXES, enter))
    return layers + 48 * 10 + 10


@pytest.mark.parametrize(
    ("name", "enter"),
    [
        ("nas_v1", ENTER),
        ("nas_v1_no_skips", [3, *WIDTHS[:-1]]),
        ("nas_v1_dense", [3, *(sum(WIDTHS[:i]) for i in range(1, 15))]),
    ],
)
def test_count_by_hand(name, enter):
    assert PUBLISHED[name].params == count(enter)


def test_table_1():
    assert count(ENTER) == pytest.approx(4.2e6, rel=0.001)
    assert set(nas.VARIANTS) == {"nas_v1", "nas_v1_no_skips", "nas_v1_dense"}


def test_every_layer_keeps_the_size():
    logits, shapes = capture_shapes("nas_v1", 32)
    for i, width in enumerate(WIDTHS, 1):
        assert shapes[f"conv{i}"] == (2, 32, 32, width)
    assert logits.shape == (2, 10)
    features, shapes = capture_shapes("nas_v1", 5, 7, num_classes=None)
    assert (features.shape, shapes["conv15"]) == ((2, 48), (2, 5, 7, 48))


def test_no_layer_is_left_out():
    """Section 3.3 sends layers that no other layer takes to the softmax; there are none."""
    taken = {source for row in nas.FIGURE_7 for source in row.sources}
    assert taken == set(range(15))


@pytest.mark.parametrize(("norm", "leaves"), [("none", {"kernel", "bias"}), ("layer", None)])
def test_norms(norm, leaves):
    shapes = variable_shapes("nas_v1", norm=norm)
    assert not shapes["batch_stats"]
    kinds = {path.rpartition("/")[2] for path in pytree.flatten(shapes["params"])}
    assert kinds == (leaves or {"kernel", "bias", "scale"})


# Filter height, width, number of filters, sources and strides. Layers 3 and 5 are unread.
SKIPPING = dict(
    table=[
        [[3, 1], 24, [0]],
        [[5, 7], 36, [1]],
        [[1, 1], 48, [1, 2]],
        [[7, 3], 64, [0]],
        [[3, 3], 24, [2, 4]],
    ],
    strides=[[2, 1], [1, 2], [1, 1], [3, 2], [1, 1]],
)
PLAIN = dict(table=[[[3, 3], 36, [0]], [[5, 5], 48, [1]], [[1, 3], 24, [2]]])


def test_count_by_hand_of_other_tables():
    convs = 3 * 1 * 3 * 24 + 5 * 7 * 24 * 36 + (24 + 36) * 48 + 7 * 3 * 3 * 64 + 9 * (36 + 64) * 24
    norms = 2 * (24 + 36 + 48 + 64 + 24)
    head = (48 + 24) * 10 + 10
    assert count_params(create_model("nas_v1", **SKIPPING)) == convs + norms + head
    plain = 9 * 3 * 36 + 25 * 36 * 48 + 3 * 48 * 24 + 2 * (36 + 48 + 24) + 24 * 10 + 10
    assert count_params(create_model("nas_v1", **PLAIN)) == plain


def test_smaller_maps_are_padded():
    _, shapes = capture_shapes("nas_v1", 13, **SKIPPING)
    assert [shapes[f"conv{i}"] for i in range(1, 6)] == [
        *((2, 7, 13, 24), (2, 7, 7, 36), (2, 7, 13, 48), (2, 5, 7, 64), (2, 7, 7, 24))
    ]
    features, _ = capture_shapes("nas_v1", 13, num_classes=None, **SKIPPING)
    assert features.shape == (2, 48 + 24)  # layers 3 and 5
    padded = nas.concatenate_padded([np.ones((1, 2, 1, 1)), np.ones((1, 1, 2, 2))])
    np.testing.assert_array_equal(padded[0, ..., 0], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(padded[0, ..., 1], [[1, 1], [0, 0]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(table=[[[3, 3], 8, [1]]]), "layer 1 must take earlier layers, or 0"),
        (dict(table=[[[3, 3], 8, []]]), "layer 1 must take earlier layers, or 0"),
        (PLAIN | dict(strides=[[1, 1]]), "strides: expected 3 pairs, got 1"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError, match=message):
        capture_shapes("nas_v1", 8, **fields)
    with pytest.raises(UserError, match="table must be a sequence of one or more"):
        create_model("nas_v1", table=[])
