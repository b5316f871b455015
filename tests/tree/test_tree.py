"""Trees as paths, rules for leaves and their error messages, stacks of blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cnns import tree as pytree
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
        ([(r"head/.*", 1)], r"test: no rule decides stage1/.*; end the rules with \('\.\*', v"),
        ([], "test: no rule decides head/bias, .* … \\(6 in all\\); end the rules"),
        (
            [(r"haed/.*", 1), (r".*", 0)],
            r"test: the rule 'haed/\.\*' decides nothing; the nearest path is 'head/",
        ),
        (
            [(r".*", 0), (r"head/.*", 1)],
            r"decides nothing; earlier rules decide every path that it matches \(head/bias",
        ),
        ([(r"head", 1), (r".*", 0)], "'head' decides nothing"),  # a rule matches the whole path
        ([(r"(head", 1)], r"test: '\(head' is not a regular expression"),
        ([(3, 1)], "test: 3 is not a regular expression"),
        ([r"head/.*"], r"test: expected rules \(regex, value\), got 'head/\.\*'"),
        ([("ab")], "test: expected rules"),
        ([(r"head/.*", 1, 2)], "test: expected rules"),
        ([7], "test: expected rules"),
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
    assert pytree.find_nearest(r"(params/)?stage1/blok1/kernel", PATHS) == "stage1/block1/kernel"
    assert pytree.find_nearest("x", []) is None


def block(i, width=2):
    return {"conv1": {"kernel": np.full((3, width), i, np.float32)}, "scale": np.float32(i)}


STAGES = {
    "stage1": {f"block{i}": block(i) for i in range(1, 13)},
    "stage2": {f"block{i}": block(i) for i in range(1, 3)},  # a single repeated block
    "stage3": {f"block{i}": block(i, width=i) for i in range(1, 4)},  # different shapes
    "stage4": {f"block{i}": block(i) for i in range(2, 5)},  # no block1, as if it were frozen
    "head": {"kernel": np.zeros((2, 5))},
}


def test_stacks_say_what_they_hold():
    stacked = pytree.flatten(pytree.stack_blocks(STAGES))
    assert {path.rpartition("/conv1")[0] for path in stacked if "conv1" in path} == {
        *("stage1/block1", "stage1/block2-12"),
        *("stage2/block1", "stage2/block2"),
        *("stage3/block1", "stage3/block2", "stage3/block3"),
        "stage4/block2-4",
    }
    kernel = stacked["stage1/block2-12/conv1/kernel"]
    assert isinstance(kernel, np.ndarray)
    assert kernel.shape == (11, 3, 2)
    np.testing.assert_array_equal(kernel[:, 0, 0], np.arange(2, 13))  # in the order of numbers
    named = [name for path in stacked for name in pytree.expand_stack(path)]
    assert sorted(named) == sorted(pytree.flatten(STAGES))
    same(pytree.stack_blocks(pytree.stack_blocks(STAGES)), pytree.stack_blocks(STAGES))


class State(NamedTuple):
    params: dict
    opt_state: tuple


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda x: jnp.asarray(x, jnp.bfloat16)])
def test_stacking_and_back_is_lossless_in_any_tree(kind):
    params = jax.tree.map(kind, STAGES)
    tree = State(params, optax.adam(0.1).init(params))
    stacked = pytree.stack_blocks(tree)
    assert "block2-12" in stacked.opt_state[0].mu["stage1"]
    same(pytree.unstack_blocks(stacked), tree)
    jax.tree.map(lambda a, b: a.dtype == b.dtype or 1 / 0, pytree.unstack_blocks(stacked), tree)
    same(pytree.unstack_blocks(tree), tree)


def test_stacking_shapes_keeps_dtypes_and_shardings():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding), STAGES
    )
    stacked = pytree.stack_blocks(shapes)
    assert stacked["stage1"]["block2-12"]["scale"] == jax.ShapeDtypeStruct(
        (11,), np.float32, sharding=sharding
    )
    assert pytree.unstack_blocks(stacked) == shapes


def test_rules_see_the_blocks_of_a_stack():
    stacked = pytree.stack_blocks(STAGES)
    rules = [(r"params/stage1/block(3|11)/.*", 1), (r".*/stage4/.*", 2), (r".*", 0)]
    values = pytree.mask(rules, stacked, what="test", prefix="params/")
    kernel = values["stage1"]["block2-12"]["conv1"]["kernel"]
    assert kernel.shape == (11, 1, 1)
    assert kernel.ravel().tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert values["stage1"]["block2-12"]["scale"].shape == (11,)
    assert values["stage4"]["block2-4"] == {"conv1": {"kernel": 2}, "scale": 2}
    with pytest.raises(UserError, match=r"'stage1/block2-12/\.\*' decides nothing"):
        pytree.mask([(r"stage1/block2-12/.*", 1), (".*", 0)], stacked, what="test")
