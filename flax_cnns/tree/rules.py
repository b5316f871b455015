"""Selects leaves of a tree by a sequence of rules `(regex, value)`.

A rule matches a path if its regex matches the whole path. The first rule that matches decides the
path, and every path must be decided. Freezing, learning rates, weight decay and grafting all use
these rules.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.tree.paths import flatten
from flax_cnns.tree.stacking import expand_stack
from flax_cnns.types import PyTree

Rules = Sequence[tuple[str, Any]]


def find_nearest(pattern: str, paths: Iterable[str]) -> str | None:
    """Returns the path most similar to `pattern` without its regex characters; None if there are no
    paths."""
    literal = re.sub(r"\\[dwsDWSb]|[\\()\[\]^$.*+?|]", "", pattern)
    return max(
        paths, key=lambda path: difflib.SequenceMatcher(None, literal, path).ratio(), default=None
    )


def compile_rules(rules: Rules, *, what: str) -> list[tuple[re.Pattern, Any]]:
    """Compiles the regexes. Raises `UserError` if a rule is not a pair or its regex is invalid.

    Error messages start with `what`, such as "optimizer.trainable".
    """
    compiled = []
    for rule in rules:
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2:
            raise UserError(f"{what}: expected rules (regex, value), got {rule!r}")
        pattern, value = rule
        try:
            compiled.append((re.compile(pattern), value))
        except (re.error, TypeError) as error:
            raise UserError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
    return compiled


def find_first_match(rules: Iterable[Sequence], path: str) -> tuple[int, re.Match] | None:
    """Returns (index, match) of the first rule whose regex, its first item, matches the whole path;
    None if no rule matches."""
    for index, rule in enumerate(rules):
        if match := re.fullmatch(rule[0], path):
            return index, match
    return None


def decide(
    rules: Rules, paths: Iterable[str], *, what: str
) -> dict[str, tuple[int, Any, re.Match]]:
    """Returns `{path: (index of the rule that decides the path, its value, the match)}`.

    Raises `UserError` if no rule decides a path, or if a rule decides no path (a mistyped name).
    Only a catch-all `.*` as the last rule may decide no path. Error messages start with `what`,
    such as "optimizer.trainable".
    """
    paths, compiled = list(paths), compile_rules(rules, what=what)
    decided: dict[str, tuple[int, Any, re.Match]] = {}
    used: set[int] = set()
    for path in paths:
        if first := find_first_match(compiled, path):
            index, match = first
            decided[path] = (index, compiled[index][1], match)
            used.add(index)
    for index, (pattern, _) in enumerate(compiled):
        last_catch_all = index == len(compiled) - 1 and pattern.pattern in (".*", "(.*)")
        if index not in used and not last_catch_all:
            shadowed = [path for path in paths if pattern.fullmatch(path)]
            reason = f"the nearest path is {find_nearest(pattern.pattern, paths)!r}"
            if not paths:
                reason = "there are no paths to decide"
            if shadowed:
                reason = f"earlier rules decide every path that it matches ({shadowed[0]} ...)"
            raise UserError(f"{what}: the rule {pattern.pattern!r} decides nothing; {reason}")
    if undecided := [path for path in paths if path not in decided]:
        shown = ", ".join(undecided[:5]) + (
            f", … ({len(undecided)} in all)" if len(undecided) > 5 else ""
        )
        raise UserError(f"{what}: no rule decides {shown}; end the rules with ('.*', value)")
    return decided


def match(rules: Rules, paths: Iterable[str], *, what: str) -> dict[str, Any]:
    """Returns `{path: value}` by the first rule that matches the whole path. Raises like
    `decide`."""
    return {path: value for path, (_, value, _) in decide(rules, paths, what=what).items()}


def mask(rules: Rules, tree: PyTree, *, what: str, prefix: str = "") -> PyTree:
    """Returns a tree like `tree` in which each leaf is the value that the rules give to `prefix +
    path`.

    The rules see the path of each block of a stack. If the values of a stack's blocks differ, they
    become an array along the stack that broadcasts against the stacked leaf. Raises like `decide`.
    """
    flat = flatten(tree)
    named = [prefix + name for path in flat for name in expand_stack(path)]
    values = match(rules, named, what=what)

    def value(path: str, leaf: Any) -> Any:
        first, *rest = [values[prefix + name] for name in expand_stack(path)]
        if all(other == first for other in rest):
            return first
        return np.asarray([first, *rest]).reshape(-1, *(1,) * (np.ndim(leaf) - 1))

    leaves = [value(path, leaf) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def expand_per_parameter(spec: tuple, params: PyTree, *, what: str, default: Any) -> PyTree:
    """Expands `()`, `(number,)` or rules (regex, value) to a tree of values like `params`.

    `()` gives each parameter the default. The regexes see `"params/" + path`, and stacks of blocks
    are handled as in `mask`. Raises like `decide`.
    """
    if isinstance(spec, (int, float)):
        spec = (spec,)
    if not spec:
        return jax.tree.map(lambda _: default, params)
    if len(spec) == 1 and isinstance(spec[0], (int, float)):
        return jax.tree.map(lambda _: spec[0], params)
    return mask(spec, params, what=what, prefix="params/")
