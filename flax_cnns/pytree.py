"""Trees as `{"params/stage1/block2/conv1/kernel": leaf}`, and the one idiom for choosing leaves.

The idiom is a sequence of rules `(regex, value)`. A rule decides a path when its regex matches the
whole path; the first such rule wins; every path must be decided. It serves freezing, learning
rates, weight decay and grafting alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.types import PyTree

Rules = Sequence[tuple[str, Any]]


def flatten(tree: PyTree) -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a/b": 1}`, in the tree's own order.

    Takes any pytree; `None` leaves vanish.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten` for nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def nearest(pattern: str, paths: Iterable[str]) -> str | None:
    """The path that looks most like `pattern`, regex signs aside; None where there is no path."""
    plain = re.sub(r"\\[dwsDWSb]|[\\()\[\]^$.*+?|]", "", pattern)
    return max(
        paths, key=lambda path: difflib.SequenceMatcher(None, plain, path).ratio(), default=None
    )


def compile_rules(rules: Rules, *, what: str) -> list[tuple[re.Pattern, Any]]:
    """Compiles the regexes. Raises `UserError` for a rule that is no pair or no regex."""
    compiled = []
    for rule in rules:
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2:
            raise UserError(f"{what}: a rule is a pair (regex, value), got {rule!r}")
        pattern, value = rule
        try:
            compiled.append((re.compile(pattern), value))
        except (re.error, TypeError) as error:
            raise UserError(f"{what}: {pattern!r} is no regular expression: {error}") from None
    return compiled


def decide(
    rules: Rules, paths: Iterable[str], *, what: str
) -> dict[str, tuple[int, Any, re.Match]]:
    """For each path the rule that decides it: `{path: (index of the rule, its value, the match)}`.

    `what` opens the error messages ("optimizer.trainable"). Raises `UserError` where a path is
    decided by no rule, or a rule decides no path (a mistyped name); a closing catch-all `.*` may be
    left with nothing to decide.
    """
    paths, compiled = list(paths), compile_rules(rules, what=what)
    decided: dict[str, tuple[int, Any, re.Match]] = {}
    used: set[int] = set()
    for path in paths:
        for index, (pattern, value) in enumerate(compiled):
            if match := pattern.fullmatch(path):
                decided[path] = (index, value, match)
                used.add(index)
                break
    for index, (pattern, _) in enumerate(compiled):
        last_catch_all = index == len(compiled) - 1 and pattern.pattern in (".*", "(.*)")
        if index not in used and not last_catch_all:
            shadowed = [path for path in paths if pattern.fullmatch(path)]
            why = (
                f"earlier rules decide all that it matches ({shadowed[0]} ...)"
                if shadowed
                else f"the nearest path is {nearest(pattern.pattern, paths)!r}"
            )
            raise UserError(f"{what}: the rule {pattern.pattern!r} decides nothing; {why}")
    if undecided := [path for path in paths if path not in decided]:
        shown = ", ".join(undecided[:5]) + (
            f", … ({len(undecided)} in all)" if len(undecided) > 5 else ""
        )
        raise UserError(f"{what}: no rule decides {shown}; close the rules with ('.*', value)")
    return decided


def match(rules: Rules, paths: Iterable[str], *, what: str) -> dict[str, Any]:
    """`{path: value}` by the first rule that matches the whole path; raises as `decide` does."""
    return {path: value for path, (_, value, _) in decide(rules, paths, what=what).items()}


def mask(rules: Rules, tree: PyTree, *, what: str, prefix: str = "") -> PyTree:
    """A tree like `tree` with each leaf's value by the rules, which see `prefix + path`."""
    values = match(rules, [prefix + path for path in flatten(tree)], what=what)
    return jax.tree.unflatten(jax.tree.structure(tree), list(values.values()))


def partition(tree: PyTree, keep: PyTree) -> tuple[dict, dict]:
    """Splits nested dicts by a tree of bools: `(kept, rest)`, each without the other's leaves."""
    flat, chosen = flatten(tree), flatten(keep)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if chosen[path]}),
        unflatten({path: leaf for path, leaf in flat.items() if not chosen[path]}),
    )


def merge(*trees: PyTree) -> dict:
    """Puts together what `partition` split, sorted as JAX flattens dicts."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat.update(flatten(tree))
    return unflatten(dict(sorted(flat.items())))


def count(tree: PyTree) -> int:
    """How many numbers the leaves hold together; takes arrays and `jax.ShapeDtypeStruct`s."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
