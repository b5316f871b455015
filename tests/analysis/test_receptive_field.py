"""Receptive fields, against published tables, sums by hand and what networks really depend on."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns.analysis.explain.features import features, list_outputs
from flax_cnns.analysis.receptive_field import (
    ReceptiveField,
    explain_missing_fields,
    find_receptive_fields,
    trace_outputs,
)
from flax_cnns.models.registry import create_model


def _shapes(model, size=None):
    images = jax.ShapeDtypeStruct((1, *(size or model.input_size)), jnp.float32)
    key = jax.random.key(0)
    return jax.eval_shape(lambda x: model.init(key, x, train=False), images), images


def _find(model, size=None):
    return find_receptive_fields(model, *_shapes(model, size))


def _square(size, stride, padding):
    return ReceptiveField((size, size), (stride, stride), (-padding, -padding))


# Araujo, Norris and Sim: github.com/google-research/receptive_field, RECEPTIVE_FIELD_TABLE.md:
# size, stride, padding. Theirs are the same networks: VGG-16 and Inception-v3 with VALID padding
# where the papers have it.
_VGG16 = {
    "stage1/conv1": (3, 1, 1),
    "stage1": (6, 2, 2),
    "stage2/conv1": (10, 2, 4),
    "stage2": (16, 4, 6),
    "stage3/conv1": (24, 4, 10),
    "stage3/conv2": (32, 4, 14),
    "stage3": (44, 8, 18),
    "stage4/conv1": (60, 8, 26),
    "stage4/conv2": (76, 8, 34),
    "stage4": (100, 16, 42),
    "stage5/conv1": (132, 16, 58),
    "stage5/conv2": (164, 16, 74),
    "stage5": (212, 32, 90),
}
_INCEPTION_V3 = {
    "mixed5b": (63, 8, 18),
    "mixed5c": (95, 8, 34),
    "mixed5d": (127, 8, 50),
    "mixed6a": (159, 16, 58),
    "mixed6b": (351, 16, 154),
    "mixed6c": (543, 16, 250),
    "mixed6d": (735, 16, 346),
    "mixed6e": (927, 16, 442),
    "mixed7a": (1055, 32, 490),
    "mixed7b": (1183, 32, 554),
    "mixed7c": (1311, 32, 618),
}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vgg16", _VGG16),
        pytest.param("inception_v3", _INCEPTION_V3, marks=pytest.mark.slow),
    ],
)
def test_published_sizes_strides_and_padding(name, published):
    found = _find(create_model(name))
    assert {path: found[path] for path in published} == {
        path: _square(*numbers) for path, numbers in published.items()
    }


@pytest.mark.slow
def test_tensorflows_padding_depends_on_the_size_of_the_image():
    # The same table: mobilenet_v1 at 224 and 321, and the row Conv2d_13_pointwise.
    model = create_model("keras_mobilenet")
    for side, padding in ((224, 126), (321, 157)):
        last = [field for field in _find(model, (side, side, 3)).values() if field][-1]
        assert last == _square(315, 32, padding)


def test_alexnet_is_in_the_table():
    # alexnet_v2 in the table has 195 too; its conv1 has no padding and ours 2: 64 + 2.
    alexnet = _find(create_model("alexnet"))
    assert alexnet["conv5"] == _square(163, 16, 66)
    assert alexnet["pool5"] == _square(195, 32, 66)


@pytest.mark.slow
def test_resnets_by_hand():
    # Stem 7 at stride 2, pool 3 at 4: 11 pixels. A 3x3 convolution adds 2 of its input's strides.
    # resnet50 has its stride in the 3x3, so that the first of a stage adds half as much.
    v15 = 11 + 2 * (3 * 4 + (4 + 3 * 8) + (8 + 5 * 16) + (16 + 2 * 32))
    assert v15 == 427
    assert _find(create_model("resnet50"))["stage4"] == _square(427, 32, 213)
    # resnet50_v1 has its stride in the 1x1 before: 3 at 4, 4 at 8, 6 at 16, 3 at 32. The table's
    # resnet_v1_50 has its stride at the end of a stage, and the same sum.
    v1 = 11 + 2 * (3 * 4 + 4 * 8 + 6 * 16 + 3 * 32)
    assert v1 == 483
    assert _find(create_model("resnet50_v1"))["stage4"] == _square(483, 32, 241)


class Mixed(nn.Module):
    """Branches, dilation, odd padding, strides that differ, pooling with and without padding."""

    @nn.compact
    def __call__(self, x, train=False):
        conv = layers.Conv
        x = conv(3, (3, 5), strides=(2, 1), padding="SAME", name="stem")(x)
        x = layers.max_pool(nn.relu(x), 3, 2, ceil=True)
        left = nn.Conv(3, (3, 3), kernel_dilation=(2, 3), padding="SAME", name="left")(x)
        right = nn.Conv(3, (1, 7), feature_group_count=3, padding=((0, 0), (5, 1)), name="right")(x)
        x = self.join(jnp.concatenate([left, right, x], axis=-1))
        x = layers.avg_pool(x, 3, 2, padding="SAME")
        x = conv(4, (1, 1), strides=2, name="sparse")(x)
        y = jnp.pad(x[:, 1:, :-1], ((0, 0), (1, 0), (0, 1), (0, 0)))
        return conv(2, (2, 2), padding="VALID", name="last")(x + y)

    def join(self, x):
        return nn.Conv(4, (1, 1), name="join")(x)


@pytest.fixture(scope="module")
def mixed():
    model = Mixed()
    shapes = _shapes(model, (69, 52, 3))[0]
    return model, jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)


def test_what_a_network_depends_on_is_its_receptive_field(mixed):
    """A row or column of NaN reaches exactly the outputs that see it.

    Near the border, a window may meet less of the image, because another layer's padding is there.
    """
    model, variables = mixed
    height, width = 69, 52
    images = np.ones((height + width, height, width, 3), np.float32)
    for row in range(height):
        images[row, row] = np.nan
    for column in range(width):
        images[height + column, :, column] = np.nan
    paths = ["stem", "left", "right", "join", "sparse", "last"]
    outputs = features(model, variables, jnp.asarray(images), paths)
    fields = find_receptive_fields(model, variables, jnp.asarray(images))
    for path in paths:
        reached = np.isnan(outputs[path]).any(axis=-1)
        for side, seen in enumerate((reached[:height].any(axis=2), reached[height:].any(axis=1))):
            inside = 0  # seen: [pixel position]
            for position in range(seen.shape[1]):
                begin = fields[path].start[side] + position * fields[path].stride[side]
                end = begin + fields[path].size[side]
                pixels = np.flatnonzero(seen[:, position])
                assert begin <= pixels[0] <= pixels[-1] < end, (path, side, position)
                if begin >= 0 and end <= len(seen):
                    inside += 1
                    assert (pixels[0], pixels[-1]) == (begin, end - 1), (path, side, position)
            assert inside > 0, (path, side)


def test_fields_are_found_from_shapes_and_by_the_paths_of_features(mixed):
    model, _ = mixed
    variables, images = _shapes(model, (69, 52, 3))
    found = find_receptive_fields(model, variables, images)
    assert list(found) == list(list_outputs(model, variables, images))
    assert found["stem"] == ReceptiveField((3, 5), (2, 1), (-1, -2))
    # Rows: 3 + 2 * 2 behind the pooling at stride 4; the dilated 3 adds 2 * 2 * 4.
    assert found["left"].size == (7 + 16, 7 + 2 * 3 * 2)
    assert found["left"].start == (-1 - 8, -2 - 6)


def test_factors_of_the_whole_image_do_not_widen_a_field():
    class Gated(nn.Module):
        how: str

        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(4, (3, 3), name="conv")(x)
            match self.how:
                case "squeeze_excite":
                    return layers.SqueezeExcite(name="after")(x)
                case "group_norm":
                    return nn.GroupNorm(2, name="after")(x)
                case "spread":  # the mean is added, so that all positions see everything
                    return x + x.mean((1, 2), keepdims=True)
                case "pooled":
                    return x.mean((1, 2))
                case "attention":
                    tokens = x.reshape(len(x), -1, 4)
                    return nn.MultiHeadDotProductAttention(2, name="after")(tokens)
                case "upsampled":
                    return nn.ConvTranspose(3, (2, 2), strides=(2, 2), name="after")(x)

    def find(how):
        model = Gated(how)
        shapes = _shapes(model, (8, 12, 3))
        return find_receptive_fields(model, *shapes), explain_missing_fields(model, *shapes)

    for how in ("squeeze_excite", "group_norm"):
        assert find(how)[0][""] == find(how)[0]["conv"] == _square(3, 1, 1)
    for how in ("spread", "pooled", "attention"):
        fields, reasons = find(how)
        assert fields[""] is None
        assert reasons[""] == "no positions: the whole image"
        assert fields["conv"] == _square(3, 1, 1)
    fields, reasons = find("upsampled")
    assert (fields["after"], reasons["after"]) == (None, "a transposed convolution")


def test_scanned_and_unrolled_networks_have_the_same_fields():
    sizes = dict(depths=(3, 1, 1), widths=(4, 8, 8))
    plain, scanned = (create_model("cifar_resnet20", scan=s, **sizes) for s in (False, True))
    assert _find(plain) == _find(scanned)


def test_a_scan_of_ones_own_follows_each_run():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Conv(3, (3, 3), name="conv")(x), None

    class Repeats(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            axes = dict(variable_axes={"params": 0}, split_rngs={"params": True})
            x, _ = nn.scan(Block, **axes, length=5)(name="blocks")(x, None)
            return nn.Conv(2, (1, 1), name="last")(x)

    assert _find(Repeats(), (16, 16, 3))["last"] == _square(11, 1, 5)


def test_pooling_is_traced_where_it_runs():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.GroupNorm(1, name="norm")(layers.max_pool(x, 3, 2))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            return layers.global_avg_pool(layers.SqueezeExcite(name="gate")(x))

    model = Net()
    pools = [o for o in trace_outputs(model, *_shapes(model, (9, 9, 3))) if not o.is_module]
    assert [(o.path, o.kind, o.output.shape) for o in pools] == [
        ("", "max_pool", (1, 4, 4, 3)),
        ("", "avg_pool", (1, 2, 2, 3)),
        ("gate", "global_avg_pool", (1, 3)),
        ("", "global_avg_pool", (1, 3)),
    ]
    assert pools[1].field == _square(5, 4, 0)
