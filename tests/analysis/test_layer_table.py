"""The table of layers, against the published tables and sums by hand."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import pytest

from flax_cnns import layers
from flax_cnns.analysis.layer_table import group_layers, tabulate_layers
from flax_cnns.models.registry import create_model
from tests.models.test_googlenet import RIGHT_OPS, RIGHT_PARAMS, TABLE1

# The lecture's table of VGG-16: output, memory in thousands of values, parameters, in its order.
# Its sum of the memory column, 24M, is wrong: the rows sum to 15.2M.
_LECTURE = """
224 3 150 0
224 64 3200 1728
224 64 3200 36864
112 64 800 0
112 128 1600 73728
112 128 1600 147456
56 128 400 0
56 256 800 294912
56 256 800 589824
56 256 800 589824
28 256 200 0
28 512 400 1179648
28 512 400 2359296
28 512 400 2359296
14 512 100 0
14 512 100 2359296
14 512 100 2359296
14 512 100 2359296
7 512 25 0
1 4096 4 102760448
1 4096 4 16777216
1 1000 1 4096000
"""


def test_vgg16_is_the_lectures_table():
    table = tabulate_layers(create_model("vgg16"))
    published = [tuple(map(int, line.split())) for line in _LECTURE.split("\n") if line]
    assert len(table.rows) == len(published)
    for row, (side, depth, thousands, weights) in zip(table.rows, published):
        bias = depth if weights else 0
        assert row.output_shape in ((1, side, side, depth), (1, depth))
        assert row.params == weights + bias, row.path
        assert row.activations == pytest.approx(1000 * thousands, rel=0.025), row.path
        assert row.bytes == 4 * row.activations
    assert table.params == 138_357_544
    # By hand, as fractions of 224 * 224 = 50,176 positions.
    maps = 3 + 2 * 64 + 64 / 4 + 2 * 128 / 4 + 128 / 16 + 3 * 256 / 16 + 256 / 64 + 3 * 512 / 64
    maps += 512 / 256 + 3 * 512 / 256 + 512 / 1024
    assert table.activations == 50_176 * maps + 2 * 4096 + 1000 == 15_237_608
    assert table.macs == 15_470_264_320  # published: 15.5 G


@pytest.mark.slow
def test_googlenet_is_table_1():
    """Parameters in Ki and operations in millions of the rows at depth 1; where the paper's own
    columns disagree with its widths, the right values stand in tests/models/test_googlenet.py."""
    table = group_layers(tabulate_layers(create_model("googlenet_2014")), 1)
    rows = {row.path: row for row in table.rows}
    for path, (side, depth, _, widths, params, ops) in TABLE1.items():
        row = rows[path]
        assert row.output_shape == (1, side, side, depth)
        # Table 1 counts no biases. They are one for each of the six convolutions' outputs.
        weights = (row.params - sum(widths)) / 1024
        assert weights == pytest.approx(RIGHT_PARAMS.get(path, params), rel=0.01), path
        assert row.macs / 1e6 == pytest.approx(RIGHT_OPS.get(path, ops), rel=0.01), path
    # Row 1 has 2.7K and 34M in the paper.
    assert rows["conv1"].params - 64 == 7 * 7 * 3 * 64 == 9408
    assert rows["conv1"].macs == 9408 * 112 * 112
    # Rows 2 to 4: 112K parameters and 360M operations with the 1x1 before.
    both = [rows["conv2_reduce"], rows["conv2"]]
    assert round((sum(r.params for r in both) - 64 - 192) / 1024) == 112
    assert round(sum(r.macs for r in both) / 1e6) == 360
    sizes = [(rows[f"pool{i}"].output_shape, rows[f"pool{i}"].kind) for i in range(1, 5)]
    shapes = [(56, 64), (28, 192), (14, 480), (7, 832)]
    assert sizes == [((1, side, side, depth), "max_pool") for side, depth in shapes]
    assert rows["global_avg_pool"].activations == 1024
    assert table.params == 6_998_552
    # 5x5 windows at every module: 59 = 27 + 4 * 8 and so on, 16 and 32 pixels apart.
    fields = [59, 91, 171, 235, 299, 363, 427, 587, 715]
    assert [rows[path].field.size[0] for path in TABLE1] == fields


class Tiny(nn.Module):
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        shared = nn.Conv(4, (3, 3), dtype=self.dtype, name="shared")
        x = nn.Conv(4, (1, 1), dtype=self.dtype, name="first")(x)
        x = shared(shared(x))
        x = layers.max_pool(layers.max_pool(x, 2, 2), 2, 2)
        if train or self.is_initializing():
            nn.Dense(7, name="aux")(x)
        return nn.Dense(5, name="head")(layers.global_avg_pool(x))


def test_calls_pooling_and_layers_of_training():
    table = tabulate_layers(Tiny(), (2, 8, 12, 3))
    found = {row.path: (row.params, row.activations) for row in table.rows}
    assert found == {
        "images": (0, 2 * 8 * 12 * 3),
        "first": (16, 2 * 8 * 12 * 4),
        "shared": (148, 2 * 2 * 8 * 12 * 4),  # two calls
        "max_pool1": (0, 2 * 4 * 6 * 4),
        "max_pool2": (0, 2 * 2 * 3 * 4),
        "global_avg_pool": (0, 2 * 4),
        "head": (25, 2 * 5),
        "aux": (35, 0),
    }
    rows = {row.path: row for row in table.rows}
    assert rows["aux"].field == "runs only in training"
    assert table.macs == 2 * 8 * 12 * (12 + 2 * 9 * 16) + 2 * 20


def test_bytes_are_those_of_the_compute_dtype():
    rows = tabulate_layers(Tiny(dtype=jnp.bfloat16), (1, 8, 8, 3)).rows
    assert [(row.path, row.bytes // row.activations) for row in rows if row.activations] == [
        ("images", 4),
        ("first", 2),
        ("shared", 2),
        ("max_pool1", 2),
        ("max_pool2", 2),
        ("global_avg_pool", 4),
        ("head", 4),
    ]


def test_a_scan_has_the_activations_of_all_its_runs():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Conv(3, (3, 3), name="conv")(x), None

    class Repeats(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            axes = dict(variable_axes={"params": 0}, split_rngs={"params": True})
            return nn.scan(Block, **axes, length=5)(name="blocks")(x, None)[0]

    _, conv = tabulate_layers(Repeats(), (1, 16, 16, 3)).rows
    assert conv.params == 5 * (9 * 9 + 3)
    assert conv.activations == 5 * 16 * 16 * 3
    assert conv.field.size == (11, 11)
