"""Rows of sweep() from parts: single parts, pairs, leave-one-out and grids."""

from __future__ import annotations

import re

import pytest

from configs.common import get_config
from flax_cnns.config.spaces import uniform
from flax_cnns.config.sweeps import combine_parts, leave_one_out, list_parts, make_grid, pair_parts
from flax_cnns.errors import UserError
from flax_cnns.studies.ablation import plan

PARTS = {
    "flip": {"data.augment": {"flip": True}},
    "crop": {"data.augment.pad_crop": 3},
    "mixup": {"mix.mixup": 0.2},
    "strong": {"mix.mixup": 1.0},
}


def test_single_parts_and_pairs():
    assert list_parts(PARTS)[:2] == [
        ("flip", {"data.augment.flip": True}),
        ("crop", {"data.augment.pad_crop": 3}),
    ]
    # Of the six pairs, mixup with strong sets one field twice.
    assert [row[0] for row in pair_parts(PARTS)] == [
        *("flip+crop", "flip+mixup", "flip+strong", "crop+mixup", "crop+strong")
    ]
    assert pair_parts(PARTS, ["mixup", "flip"]) == [
        ("flip+mixup", {"data.augment.flip": True, "mix.mixup": 0.2})
    ]
    assert pair_parts(PARTS, iter(["mixup", "flip"])) == pair_parts(PARTS, ["mixup", "flip"])


def test_leave_one_out():
    parts = {name: PARTS[name] for name in ("flip", "crop", "mixup")}
    rows = dict(leave_one_out(parts))
    assert list(rows) == ["together", "without-flip", "without-crop", "without-mixup"]
    for name in parts:
        (path, value), *_ = combine_parts(parts, [name])[1].items()
        assert rows["together"][path] == value
        assert rows[f"without-{name}"].keys() == rows["together"].keys() - {path}


def test_a_grid_is_the_product_of_its_values():
    rows = make_grid(
        {"schedule.learning_rate": [0.1, 0.01], "train.dropout": [(0.1,), 0]}, {"mix.mixup": 0.2}
    )
    assert [row[0] for row in rows] == [
        "learning_rate=0.1,dropout=0.1",
        "learning_rate=0.1,dropout=0",
        "learning_rate=0.01,dropout=0.1",
        "learning_rate=0.01,dropout=0",
    ]
    assert rows[2][1] == {
        "mix.mixup": 0.2,
        "schedule.learning_rate": 0.01,
        "train.dropout": (0.1,),
    }
    assert make_grid({"a.rate": ["x/y"], "b.rate": [1e-05]})[0][0] == "a.rate=x_y,b.rate=1e-05"


def test_the_rows_are_rows_of_an_ablation():
    """The names fit into folders, and the overrides are valid."""
    sweep = [("none", {}), *list_parts(PARTS), *pair_parts(PARTS)]
    sweep += make_grid({"schedule.learning_rate": [0.1, 1e-05], "model.name": ["lenet5"]})
    rows = plan.make_rows(get_config(), sweep)
    assert rows[-1].config.schedule.learning_rate == 1e-05
    assert rows[5].config.data.augment.pad_crop == 3


def test_spaces_of_parts_are_joined():
    parts = {"a": ({"x": 1}, {"x": "range a"}), "b": ({"y": 2}, {"y": "range b"}), "c": {"z": 3}}
    assert combine_parts(parts, ["a", "b", "c"], "all") == (
        "all",
        {"x": 1, "y": 2, "z": 3},
        {"x": "range a", "y": "range b"},
    )
    assert leave_one_out(parts)[2] == ("without-b", {"x": 1, "z": 3}, {"x": "range a"})
    # Two parts may give a field the same space, and not two.
    rates = [uniform(0.0, high) for high in (1.0, 1.0, 2.0)]
    parts = {str(i): ({}, {"train.ema": rate}) for i, rate in enumerate(rates)}
    assert combine_parts(parts, ["0", "1"])[2]["train.ema"].high == 1.0
    with pytest.raises(
        UserError, match=r"the part '2' and one before it give train\.ema different"
    ):
        combine_parts(parts, ["0", "2"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: leave_one_out(PARTS), "'mixup' and 'strong' give mix.mixup different values"),
        (lambda: leave_one_out({"flip": {}}), "leave-one-out needs two parts or more, got 1"),
        (lambda: combine_parts(PARTS, ["flop"]), "there is no part 'flop'; the parts: flip, crop"),
        (lambda: list_parts({"a": 3}), "part a: expected {field: value, ...} or (overrides, space"),
        (lambda: make_grid({"train.ema": []}), "a grid needs one field or more"),
        (lambda: pair_parts(PARTS, ["flip", "crap"]), "there is no part 'crap'; the parts: flip,"),
        (lambda: make_grid({"optimizer.name": "sgd"}), "optimizer.name: expected a list of values"),
        (lambda: make_grid({"train.ema": 0.9}), "train.ema: expected a list of values, got 0.9"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()
