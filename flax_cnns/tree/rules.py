"""The one idiom for choosing leaves of a tree: a sequence of rules `(regex, value)`.

A rule decides a path when its regex matches the whole path; the first such rule wins; every path
must be decided. It serves freezing, learning rates, weight decay and grafting alike.
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


def find_first_match(rules: Iterable[Sequence], path: str) -> tuple[int, re.Match] | None:
    """(index, match) of the first rule whose regex, its first item, matches the whole path; None
    where there is none."""
    for index, rule in enumerate(rules):
        if match := re.fullmatch(rule[0], path):
            return index, match
    return None


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
        if found := find_first_match(compiled, path):
            index, match = found
            decided[path] = (index, compiled[index][1], match)
            used.add(index)
    for index, (pattern, _) in enumerate(compiled):
        last_catch_all = index == len(compiled) - 1 and pattern.pattern in (".*", "(.*)")
        if index not in used and not last_catch_all:
            shadowed = [path for path in paths if pattern.fullmatch(path)]
            why = f"the nearest path is {find_nearest(pattern.pattern, paths)!r}"
            if not paths:
                why = "there are no paths to decide"
            if shadowed:
                why = f"earlier rules decide all that it matches ({shadowed[0]} ...)"
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
    """A tree like `tree` with each leaf's value by the rules, which see `prefix + path`.

    They see the named path of every block of a stack. Where values differ inside it, they become an
    array that goes along the stack and broadcasts to its leaf.
    """
    flat = flatten(tree)
    named = [prefix + name for path in flat for name in expand_stack(path)]
    values = match(rules, named, what=what)

    def value(path: str, leaf: Any) -> Any:
        first, *rest = [values[prefix + name] for name in expand_stack(path)]
        if all(other == first for other in rest):
            return first
        return np.asarray([first, *rest]).reshape(-1, *(1,) * (np.ndim(leaf) - 1))

    found = [value(path, leaf) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def expand_per_parameter(spec: tuple, params: PyTree, *, what: str, default: Any) -> PyTree:
    """`()`, `(number,)` or rules (regex, value) -> a tree of values in the shape of `params`.

    The regexes see `"params/" + path`; in a stack of blocks that of each block, and where the
    values differ they are an array along the stack (`mask`). Raises `UserError` for a rule
    that decides nothing.
    """
    if isinstance(spec, (int, float)):
        spec = (spec,)
    if not spec:
        return jax.tree.map(lambda _: default, params)
    if len(spec) == 1 and isinstance(spec[0], (int, float)):
        return jax.tree.map(lambda _: spec[0], params)
    return mask(spec, params, what=what, prefix="params/")
