"""Trees as paths; rules that decide every leaf, and what they say where they do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import pytree
from flax_cnns.errors import UserError

TREE = {
    "stem": {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)},
    "stage1": {"block1": {"kernel": np.ones((2, 2)), "scale": np.ones(2)}},
    "head": {"kernel": np.zeros((4, 10)), "bias": np.zeros(10)},
}
PATHS = list(pytree.flatten(TREE))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_flatten_gives_paths_in_the_order_of_jax_and_unflatten_takes_them_back():
    flat = pytree.flatten(TREE)
    assert list(flat) == [
        "head/bias",
        "head/kernel",
        "stage1/block1/kernel",
        "stage1/block1/scale",
        "stem/bias",
        "stem/kernel",
    ]
    assert all(a is b for a, b in zip(flat.values(), jax.tree.leaves(TREE)))
    same(pytree.unflatten(flat), TREE)


def test_flatten_takes_any_tree_and_drops_none():
    assert pytree.flatten({"a": [1, (2, None)], "b": None}) == {"a/0": 1, "a/1/0": 2}


def test_count_takes_arrays_and_shapes():
    assert pytree.count(TREE) == 12 + 4 + 4 + 2 + 40 + 10
    assert pytree.count(jax.eval_shape(lambda: {"a": jnp.zeros((3, 5)), "b": jnp.zeros(())})) == 16
    assert pytree.count({}) == 0


def test_the_first_rule_that_matches_the_whole_path_decides():
    rules = [(r"head/.*", "head"), (r".*kernel", "kernel"), (r".*", "rest")]
    assert pytree.match(rules, PATHS, what="test") == {
        "head/bias": "head",
        "head/kernel": "head",
        "stage1/block1/kernel": "kernel",
        "stage1/block1/scale": "rest",
        "stem/bias": "rest",
        "stem/kernel": "kernel",
    }


def test_decide_gives_the_rule_and_its_groups():
    rules = [(r"(.*)/bias", r"\1/b"), (r".*", None)]
    index, value, match = pytree.decide(rules, PATHS, what="test")["stem/bias"]
    assert (index, value, match.expand(value)) == (0, r"\1/b", "stem/b")


def test_mask_sees_the_prefix_and_keeps_the_structure():
    rules = [(r"params/(stem|head)/.*", True), (r".*", False)]
    assert pytree.mask(rules, TREE, what="test", prefix="params/") == {
        "stem": {"kernel": True, "bias": True},
        "stage1": {"block1": {"kernel": False, "scale": False}},
        "head": {"kernel": True, "bias": True},
    }


def test_partition_and_merge_are_inverse():
    keep = pytree.mask([(r"stage1/.*|.*bias", True), (r".*", False)], TREE, what="test")
    kept, rest = pytree.partition(TREE, keep)
    assert list(pytree.flatten(kept)) == [
        "head/bias",
        "stage1/block1/kernel",
        "stage1/block1/scale",
        "stem/bias",
    ]
    assert "stage1" not in rest
    same(pytree.merge(kept, rest), TREE)
    same(pytree.merge(rest, kept), TREE)


@pytest.mark.parametrize("everything", [True, False])
def test_partition_may_leave_nothing(everything):
    full, empty = pytree.partition(TREE, jax.tree.map(lambda _: everything, TREE))
    if not everything:
        full, empty = empty, full
    assert empty == {}
    same(pytree.merge(full, empty), TREE)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(r"head/.*", 1)], r"test: no rule decides stage1/.*; close the rules with \('\.\*', v"),
        ([], "test: no rule decides head/bias, .* … \\(6 in all\\); close the rules"),
        (
            [(r"haed/.*", 1), (r".*", 0)],
            r"test: the rule 'haed/\.\*' decides nothing; the nearest path is 'head/",
        ),
        (
            [(r".*", 0), (r"head/.*", 1)],
            r"'head/\.\*' decides nothing; earlier rules decide all that it matches \(head/bias",
        ),
        ([(r"head", 1), (r".*", 0)], "'head' decides nothing"),  # the whole path, not its start
        ([(r"(head", 1)], r"test: '\(head' is no regular expression"),
        ([(3, 1)], "test: 3 is no regular expression"),
        ([r"head/.*"], r"test: a rule is a pair \(regex, value\), got 'head/\.\*'"),
        ([("ab")], "test: a rule is a pair"),
        ([(r"head/.*", 1, 2)], "test: a rule is a pair"),
        ([7], "test: a rule is a pair"),
    ],
)
def test_misuse(rules, message):
    with pytest.raises(UserError, match=message):
        pytree.match(rules, PATHS, what="test")


@pytest.mark.parametrize("catch_all", [r".*", r"(.*)"])
def test_a_closing_catch_all_may_have_nothing_left(catch_all):
    rules = [(r"(head|stem|stage1)/.*", 1), (catch_all, 0)]
    assert set(pytree.match(rules, PATHS, what="test").values()) == {1}


def test_nearest():
    assert pytree.nearest(r"(params/)?stage1/blok1/kernel", PATHS) == "stage1/block1/kernel"
    assert pytree.nearest("x", []) is None
