"""Names of folders and the classes that they mean."""

from __future__ import annotations

import pytest

from flax_cnns.data.match_classes import match_classes
from flax_cnns.errors import UserError

CLASSES = ("tench", "Egyptian cat", "T-shirt/top")


def match(names, class_names=CLASSES, aliases=None):
    return match_classes(names, class_names, aliases or {}, where="photos", owner="net").tolist()


def test_class_names_simplified_names_ids_and_numbers():
    assert match(["Egyptian cat", "tench"]) == [1, 0]
    assert match(["egyptian_cat", "t shirt/top", "Tench"]) == [1, 2, 0]
    assert match(["n02", "n01"], aliases={"n01": 0, "n02": 1}) == [1, 0]
    assert match(["2", "0"]) == [2, 0]
    # In the order of strings, 10 comes before 2: the names count, not their order.
    digits = tuple(map(str, range(11)))
    assert match(["0", "1", "10", "2"], digits) == [0, 1, 10, 2]
    assert match(["0", "1", "10", "2"], [f"class {k}" for k in range(11)]) == [0, 1, 10, 2]
    # A run's classes in the order of strings: "10" is its class 2.
    assert match(["10", "2"], ("0", "1", "10", "2")) == [2, 3]


def test_a_number_is_no_index_if_classes_are_numbers():
    with pytest.raises(UserError, match="photos: '0' is no class of net; known: 3, 5, 7"):
        match(["0"], ("3", "5", "7"))


def test_two_names_that_differ_only_in_capitals_are_not_simplified():
    assert match(["Crane", "crane"], ("Crane", "crane")) == [0, 1]
    with pytest.raises(UserError, match="'CRANE' is no class"):
        match(["CRANE"], ("Crane", "crane"))


def test_the_message_names_what_is_left_and_the_nearest():
    with pytest.raises(UserError) as error:
        match(["tench", "cat"])
    assert str(error.value) == "photos: 'cat' is no class of net; did you mean 'Egyptian cat'?"
    with pytest.raises(UserError, match="'a', 'b', 'c' and 1 more are no classes of net"):
        match(["a", "b", "c", "d"])
    with pytest.raises(UserError, match="'3' is no class"):
        match(["0", "3"])
