"""Networks of NAS-Bench-201: the authors' package, published counts, counts by hand, cells as text.

models/xautodl.py records what the authors' package computes.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import create_model
from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.errors import UserError
from flax_cnns.models.nas_bench_201 import EDGES, EXAMPLE, OPERATIONS, parse_cell, write_cell
from tests.models import cases, foreign, xautodl
from tests.models.counting import count_params
from tests.models.shapes import capture_shapes

NONE, SKIP, CONV1, CONV3, POOL = OPERATIONS


def check(tensors, wanted):
    x, labels = foreign.images(4, 16), np.array([1, 0, 3, 2])
    model = create_model("nas_bench_201_resnet", **xautodl.FIELDS)
    variables = xautodl.convert(tensors)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
    got, apply = cases.run_model(model, variables, x, labels)
    cases.check_outputs(got, wanted)
    flat = pytree.flatten(variables)
    for path in (
        "params/stage3/cell1/edge1_2/conv/kernel",
        "params/stage2/reduction/conv1/norm/bias",
    ):
        changed = flat | {path: foreign.redraw("again", flat[path].shape, "keras")}
        wrong = cases.Outputs(np.asarray(apply(pytree.unflatten(changed))))
        with pytest.raises(AssertionError):
            cases.check_outputs(wrong, cases.Outputs(wanted.logits))


def test_logits_loss_and_gradients_of_the_authors_package():
    check(*cases.load(cases.FOLDER / "nas_bench_201.npz", "torchvision", 1.0))


@pytest.mark.slow
@pytest.mark.oracle
def test_live():
    pytest.importorskip("torch")
    pytest.importorskip("xautodl")
    check(*xautodl.run_theirs())


@pytest.mark.parametrize(
    ("cell", "params", "mmacs"),
    [
        # github.com/D-X-Y/NATS-Bench/issues: 36 gives both numbers of CIFAR-10 with six digits,
        (
            "|skip_connect~0|+|none~0|nor_conv_3x3~1|+|avg_pool_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|",
            802_426,
            113.95137,
        ),
        # 19 gives 0.344 M and 47.10 M.
        (
            "|none~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|skip_connect~1|nor_conv_1x1~2|",
            344_346,
            47.10,
        ),
    ],
)
def test_published_sizes(cell, params, mmacs):
    """Theirs are multiply-adds of convolutions and the dense layer, which they call FLOP."""
    total = cost(create_model("nas_bench_201_resnet", cell=cell), (1, 32, 32, 3))
    assert total.params == params
    assert total.macs / 1e6 == pytest.approx(mmacs, abs=0.005)


def count_by_hand(threes: int, ones: int) -> int:
    """Counts a network of N = 5 cells with some 3x3 and 1x1 convolutions at 16, 32, 64 channels."""
    stem = 3 * 9 * 16 + 2 * 16  # 464
    into_32 = 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32 + 2 * (2 * 32)  # 14,464
    into_64 = 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64 + 2 * (2 * 64)  # 57,600
    end = 2 * 64 + 64 * 10 + 10  # 778
    three = 5 * (9 * (16**2 + 32**2 + 64**2) + 2 * (16 + 32 + 64))  # 243,040
    one = 5 * (16**2 + 32**2 + 64**2 + 2 * (16 + 32 + 64))  # 28,000
    return stem + into_32 + into_64 + end + threes * three + ones * one


@pytest.mark.parametrize(
    ("cell", "params"),
    [
        ((SKIP, NONE, SKIP, NONE, NONE, POOL), count_by_hand(0, 0)),
        ((CONV3, NONE, SKIP, SKIP, NONE, SKIP), count_by_hand(1, 0)),
        ((CONV3, NONE, CONV3, SKIP, NONE, SKIP), count_by_hand(2, 0)),  # nas_bench_201_resnet
        ((CONV3, CONV1, POOL, SKIP, CONV1, CONV3), count_by_hand(2, 2)),
        ((NONE, CONV3, CONV1, SKIP, NONE, NONE), count_by_hand(1, 1)),  # nothing enters node 1
    ],
)
def test_counts_by_hand(cell, params):
    assert count_params(create_model("nas_bench_201_resnet", cell=write_cell(cell))) == params


def test_counts_by_hand_are_numbers():
    assert count_by_hand(0, 0) == 73_306
    assert count_by_hand(6, 0) == 1_531_546
    assert count_by_hand(0, 6) == 241_306


def test_maps_of_figure_1():
    logits, shapes = capture_shapes("nas_bench_201_resnet", 32)
    assert shapes["stem"] == (2, 32, 32, 16)
    assert shapes["stage1/cell5"] == (2, 32, 32, 16)
    assert shapes["stage2/reduction"] == shapes["stage2/cell5"] == (2, 16, 16, 32)
    assert shapes["stage3/cell5"] == (2, 8, 8, 64)
    assert logits.shape == (2, 10)
    _, shapes = capture_shapes("nas_bench_201_resnet", 13, 7, depths=(1, 1), widths=(4, 8))
    assert shapes["stage2/cell1"] == (2, 7, 4, 8)
    _, shapes = capture_shapes("nas_bench_201_resnet", 14, depths=(2,), widths=(4,), stem_stride=2)
    assert shapes["stage1/cell2"] == (2, 7, 7, 4)


def test_a_cell_is_read_and_written():
    assert parse_cell(EXAMPLE) == (CONV3, NONE, CONV3, SKIP, NONE, SKIP)
    assert write_cell(parse_cell(EXAMPLE)) == EXAMPLE
    assert create_model("nas_bench_201_resnet").cell == EXAMPLE
    assert [target for _, target in EDGES] == [1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            EXAMPLE.replace("skip_connect~0", "skip_conect~0"),
            "unknown operation 'skip_conect'; did you mean 'skip_connect'",
        ),
        (
            EXAMPLE.replace("|none~1", ""),
            r"expected 6 edges, \[1, 2, 3\] into the 3 nodes, got 5: \[1, 2, 2\]",
        ),
        (EXAMPLE + "+|none~0|", r"got 7: \[1, 2, 3, 1\]"),
        (EXAMPLE.replace("none~1", "none~0"), "expected none~1 in place of none~0"),
        (
            EXAMPLE.replace("|nor_conv_3x3~0|+", "nor_conv_3x3~0+"),
            "cannot read 'nor_conv_3x3~0'; expected edges such as",
        ),
        (EXAMPLE.replace("~2", ""), r"cannot read '\|skip_connect~0\|none~1\|skip_connect\|'"),
        ("", "cannot read ''"),
    ],
)
def test_texts_that_are_no_cell(text, message):
    with pytest.raises(UserError, match=message):
        create_model("nas_bench_201_resnet", cell=text)


@pytest.mark.parametrize("operations", [[NONE] * 5, [NONE] * 7, [*[NONE] * 5, "conv"]])
def test_operations_that_make_no_cell(operations):
    with pytest.raises(UserError, match=r"edges|unknown operation"):
        write_cell(operations)
