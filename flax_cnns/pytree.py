"""Trees as `{"params/stage1/block2/conv1/kernel": leaf}`, and the one idiom for choosing leaves.

The idiom is a sequence of rules `(regex, value)`. A rule decides a path when its regex matches the
whole path; the first such rule wins; every path must be decided. It serves freezing, learning
rates, weight decay and grafting alike.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
            why = f"the nearest path is {nearest(pattern.pattern, paths)!r}"
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
    named = [prefix + name for path in flat for name in members(path)]
    values = match(rules, named, what=what)

    def value(path: str, leaf: Any) -> Any:
        first, *rest = [values[prefix + name] for name in members(path)]
        if all(other == first for other in rest):
            return first
        return np.asarray([first, *rest]).reshape(-1, *(1,) * (np.ndim(leaf) - 1))

    found = [value(path, leaf) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


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


# ---- stacks: blocks that are alike as one, for networks that scan over them

_STACK = re.compile(r"(\w+?)(\d+)-(\d+)")


def members(path: str) -> list[str]:
    """What a stacked leaf holds, in order: `"stage1/block2-4/kernel"` -> `["stage1/block2/kernel",
    "stage1/block3/kernel", "stage1/block4/kernel"]`. Any other path -> itself alone."""

    def names(part: str) -> list[str]:
        if not (found := _STACK.fullmatch(part)) or int(found[2]) > int(found[3]):
            return [part]
        return [f"{found[1]}{i}" for i in range(int(found[2]), int(found[3]) + 1)]

    return ["/".join(parts) for parts in itertools.product(*map(names, path.split("/")))]


def stack_blocks(tree: PyTree) -> PyTree:
    """The tree with `block2` ... `blockN` of every stage as one `block2-N`, its
    N - 1 blocks along a new first axis.

    Only where there are two at least, alike in names, shapes and dtypes. `block1`, which may have a
    stride, is left alone, and so is what is stacked already. Takes any pytree (a whole `TrainState`
    or optimizer state) of arrays or `ShapeDtypeStruct`s; NumPy's stay NumPy's.
    """
    return _over_dicts(_stack, tree)


def unstack_blocks(tree: PyTree) -> PyTree:
    """The inverse of `stack_blocks`, to the bit; needs only the names. NumPy's leaves are views."""
    return _over_dicts(_unstack, tree)


def _over_dicts(convert: Any, tree: PyTree) -> PyTree:
    """The outermost dicts of a pytree (a NamedTuple of them, say) converted."""
    is_dict = lambda node: isinstance(node, dict)  # noqa: E731
    return jax.tree.map(lambda x: convert(x) if is_dict(x) else x, tree, is_leaf=is_dict)


def _stack(node: dict[str, Any]) -> dict[str, Any]:
    last = next(i for i in itertools.count(1) if f"block{i + 1}" not in node)
    repeats = [f"block{i}" for i in range(2, last + 1)]
    if len(repeats) < 2 or any(_form(node[name]) != _form(node["block2"]) for name in repeats):
        return {name: stack_blocks(child) for name, child in node.items()}
    stacked = jax.tree.map(lambda *leaves: _join(leaves), *(node[name] for name in repeats))
    rest = {name: stack_blocks(child) for name, child in node.items() if name not in repeats}
    return rest | {f"block2-{last}": stacked}


def _form(tree: PyTree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _unstack(node: dict[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, child in node.items():
        for i, member in enumerate(names := members(name)):
            own = jax.tree.map(lambda x, i=i: _take(x, i), child) if len(names) > 1 else child
            named[member] = unstack_blocks(own)
    return named


def _join(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return _shape_like(first, (len(leaves), *first.shape))
    return (np if isinstance(first, np.ndarray) else jnp).stack(leaves)


def _take(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return _shape_like(leaf, leaf.shape[1:])
    return leaf[i, ...]  # a view, and an array even of one number


def _shape_like(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
