"""Which class of a network a name means: a class name, another known name, or a number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from flax_cnns.errors import UserError, did_you_mean

_SHOWN = 3  # names in a message


def match_classes(
    names: Sequence[str],
    class_names: Sequence[str],
    aliases: Mapping[str, int] = {},
    *,
    where: str,
    owner: str,
) -> np.ndarray:
    """Returns i64 [len(names)]: the class that each name means.

    All names must follow one rule. The first rule that fits all of them is taken:

    1. They are class names.
    2. They are class names but for capitals and for spaces, `_` and `-`.
    3. They are in `aliases`, which has other names of the classes.
    4. They are numbers of classes, 0 to K - 1. Not if class names are numbers: the digits 3, 5, 7
       have no class "0".

    `where` (a folder) and `owner` (the network) are for the message. Raises UserError, which names
    those that the best rule leaves, and the nearest names.
    """
    rules: list[Mapping[str, int]] = [{name: k for k, name in enumerate(class_names)}]
    plain = [_simplify(name) for name in class_names]
    simple = {name: k for k, name in enumerate(plain) if plain.count(name) == 1}
    rules.append({name: simple[_simplify(name)] for name in names if _simplify(name) in simple})
    rules.append(aliases)
    if not any(name.isdecimal() for name in class_names):
        rules.append({name: int(name) for name in names if _is_number(name, len(class_names))})
    for rule in rules:
        if all(name in rule for name in names):
            return np.array([rule[name] for name in names], np.int64)
    best = max(rules, key=lambda rule: sum(name in rule for name in names))
    raise UserError(_describe([n for n in names if n not in best], class_names, where, owner))


def _simplify(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold()


def _is_number(name: str, count: int) -> bool:
    return name.isascii() and name.isdecimal() and int(name) < count


def _describe(missing: list[str], class_names: Sequence[str], where: str, owner: str) -> str:
    shown = ", ".join(map(repr, missing[:_SHOWN]))
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    verb = "is no class" if len(missing) == 1 else "are no classes"
    return f"{where}: {shown}{more} {verb} of {owner}{did_you_mean(missing[0], class_names)}"
