"""Spaces of a search: what they refuse, conditions, and their description."""

from __future__ import annotations

import math

import pytest

from flax_cnns.config import default_config, spaces
from flax_cnns.config.spaces import choice, integer, log_uniform, uniform
from flax_cnns.errors import UserError


def decay_kernels(rate):
    return ((r".*/kernel", rate), (r".*", 0.0))


SPACE = {
    "schedule.learning_rate": log_uniform(1e-4, 1.0),
    "optimizer.name": choice("sgd", "adam"),
    "optimizer.momentum": uniform(0.8, 0.99, when={"optimizer.name": "sgd"}),
    "optimizer.weight_decay": log_uniform(1e-6, 1e-2, to_value=decay_kernels),
    "data.augment.pad_crop": integer(0, 4),
    "model.depths": choice((1, 1, 1), (2, 2, 2)),
}


def test_a_good_space_passes_and_is_described_as_json():
    spaces.check_space(default_config(), SPACE)
    described = spaces.describe_space(SPACE)
    assert described["schedule.learning_rate"] == {
        "kind": "float", "low": 1e-4, "high": 1.0, "log": True
    }  # fmt: skip
    assert described["optimizer.momentum"]["when"] == {"optimizer.name": ["sgd"]}
    made = [rules[0][1] for rules in described["optimizer.weight_decay"]["to_value"]]
    assert made == [1e-6, pytest.approx(1e-4), 1e-2]  # the middle of the logarithms
    assert described["model.depths"]["values"] == [[1, 1, 1], [2, 2, 2]]
    assert described == spaces.describe_space(dict(SPACE))


def test_a_condition_looks_at_the_config_with_what_was_drawn():
    momentum = SPACE["optimizer.momentum"]
    assert spaces.is_active(momentum, {"optimizer": {"name": "sgd"}})
    assert not spaces.is_active(momentum, {"optimizer": {"name": "adam"}})
    assert spaces.is_active(SPACE["optimizer.name"], {})
    either = uniform(0, 1, when={"optimizer.name": ("sgd", "lars"), "train.ema": 0})
    assert spaces.is_active(either, {"optimizer": {"name": "lars"}, "train": {"ema": 0.0}})
    assert not spaces.is_active(either, {"optimizer": {"name": "lars"}, "train": {"ema": 0.9}})


def test_to_value_makes_the_value_of_the_field():
    decay = SPACE["optimizer.weight_decay"]
    assert decay.make_value(1e-3) == ((r".*/kernel", 1e-3), (r".*", 0.0))
    assert uniform(0, 1).make_value(0.5) == 0.5


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, ("expected {field: distribution",)),
        ({"schedule.learning_rates": uniform(0, 1)}, ("'schedule.learning_rate'",)),
        ({"schedule.learning_rate": (0, 1)}, ("log_uniform",)),
        ({"schedule.learning_rate": log_uniform(1.0, 1e-3)}, ("low < high", "low=1.0")),
        ({"schedule.learning_rate": log_uniform(0.0, 1e-3)}, ("low > 0",)),
        ({"schedule.learning_rate": uniform(0, math.nan)}, ("numbers", "nan")),
        ({"data.augment.pad_crop": integer(0, 2.5)}, ("integers", "2.5")),
        ({"optimizer.momentum": uniform(0.5, 1.5)}, ("optimizer.momentum", "1.5")),
        ({"optimizer.weight_decay": log_uniform(1e-5, 1, to_value=str)}, ("made of 1e-05",)),
        ({"optimizer.name": choice("sgd")}, ("at least two",)),
        ({"optimizer.name": choice("sgd", "sgd")}, ("equal",)),
        ({"optimizer.name": choice("sgd", "adamm")}, ("adamm",)),
        ({"model.size": choice(1, {2})}, ("{2}",)),
        ({"seed": integer(0, 5)}, ("seed",)),
        ({"train.test_on": choice("latest", "best")}, ("never tested",)),
        ({"train.ema": uniform(0, 1, when={"optimizer.nme": "sgd"})}, ("'optimizer.name'",)),
        (
            {
                "train.ema": uniform(0, 0.9, when={"optimizer.name": "sgd"}),
                "optimizer.name": choice("sgd", "adam"),
            },
            ("before", "move it up"),
        ),
        (
            {
                "optimizer.name": choice("sgd", "adam"),
                "train.ema": uniform(0, 0.9, when={"optimizer.name": "adamw"}),
            },
            ("never 'adamw'", "'adam'"),
        ),
        # What is not searched and has another value in the config would silently never be drawn.
        (
            {"train.ema": uniform(0, 0.9, when={"optimizer.name": "adam"})},
            ("train.ema is never drawn", "optimizer.name to be adam", "it is sgd in the config"),
        ),
        (
            {
                "optimizer.name": choice("sgd", "adam", when={"mix.mixup": 0.2}),
                "train.ema": uniform(0, 0.9, when={"optimizer.name": "adam"}),
            },
            ("optimizer.name is never drawn",),
        ),
        # A tuple that is a value of the field itself.
        (
            {
                "train.dropout": choice((), (0.25,)),
                "train.ema": uniform(0, 0.9, when={"train.dropout": (0.25,)}),
            },
            ("a tuple means several values of train.dropout; write ((0.25,),)",),
        ),
        (
            {"train.ema": uniform(0, 0.9, when={"train.dropout": ()})},
            ("write ((),) for the value ()",),
        ),
        (
            {"train.ema": uniform(0, 0.9, when={"mix.mixup": ()})},
            ("expected a value of mix.mixup",),
        ),
        ({"train.ema": uniform(0, 0.9, when="sgd")}, ("train.ema: when: expected {field", "'sgd'")),
    ],
)
def test_a_bad_space_is_refused_with_its_path(space, words):
    with pytest.raises(UserError) as caught:
        spaces.check_space(default_config(), space)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_condition_may_ask_for_tuples_and_for_the_value_of_a_field_that_is_not_drawn():
    space = {
        "train.dropout": choice((), (0.25,), (0.5,)),
        "train.ema": uniform(0.5, 0.9, when={"train.dropout": ((0.25,), (0.5,))}),
        "optimizer.name": choice("adam", "lamb", when={"train.dropout": ((),)}),
        # sgd is the config's optimizer, which the trials with dropout have.
        "optimizer.momentum": uniform(0.5, 0.9, when={"optimizer.name": "sgd"}),
    }
    spaces.check_space(default_config(), space)
    ema = space["train.ema"]
    assert spaces.is_active(ema, {"train.dropout": (0.5,)})
    assert not spaces.is_active(ema, {"train.dropout": ()})
    assert spaces.describe_space(space)["train.ema"]["when"] == {"train.dropout": [[0.25], [0.5]]}


def test_fields_that_are_never_drawn_are_found_also_behind_each_other():
    space = {
        "optimizer.name": choice("sgd", "adam", when={"mix.mixup": 0.2}),
        "train.ema": uniform(0, 0.9, when={"optimizer.name": "adam"}),
        "optimizer.momentum": uniform(0.5, 0.9, when={"optimizer.name": "sgd"}),
    }
    assert list(spaces.find_never_drawn(default_config(), space)) == ["optimizer.name", "train.ema"]
    spaces.check_space(default_config(), space, shared=["optimizer.name", "train.ema"])
    config = default_config()
    config.mix.mixup = 0.2
    assert spaces.find_never_drawn(config, space) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25781079474205343, "0.2578"),
        (0.00021234567, "0.0002123"),
        (12, "12"),
        ("sgd", "sgd"),
        (True, "true"),
        (None, "null"),
        (((r".*/kernel", 0.0123456789), (".*", 0.0)), '[[".*/kernel", 0.01235], [".*", 0.0]]'),
    ],
)
def test_drawn_values_have_four_digits_for_people(value, text):
    assert spaces.format_value(value) == text
    assert spaces.format_values({"a.b": value, "c": 1}) == f"a.b={text}, c=1"
