"""Makes the rows of an ablation's `sweep()` from few parts: grids, leave-one-out, pairs.

    PARTS = {"decay": {"optimizer.weight_decay": 5e-4}, "mixup": {"mix.mixup": 0.2}}

    def sweep():
        return [("none", {}), *list_parts(PARTS), *pair_parts(PARTS)]

A part is a name and overrides, `{path: value}`, or (overrides, space) where the space is what
`ablate --tune` searches in rows with this part. A row is (name, overrides) or (name, overrides,
space). A config file puts its baseline in front, because the first row of `sweep()` is the
baseline.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from flax_cnns.config.flat import flatten
from flax_cnns.config.spaces import Distribution, describe_space
from flax_cnns.errors import UserError

Row = tuple[Any, ...]  # (name, overrides) or (name, overrides, space)


def list_parts(parts: Mapping[str, Any]) -> list[Row]:
    """Makes a row of each part alone."""
    return [combine_parts(parts, [name], name) for name in parts]


def combine_parts(parts: Mapping[str, Any], names: Iterable[str], row: str = "") -> Row:
    """Makes a row of several parts together, called `row` or the names joined by "+".

    Raises UserError if there is no such part, or if two of them give a field different values or
    different spaces.
    """
    names = _check_names(parts, names)
    overrides: dict[str, Any] = {}
    space: dict[str, Any] = {}
    first: dict[str, str] = {}  # the part that set a field
    for name in names:
        own, own_space = _split_part(name, parts[name])
        for path, value in flatten(own).items():
            if path in overrides and overrides[path] != value:
                raise UserError(
                    f"sweep(): the parts {first[path]!r} and {name!r} give {path} different"
                    f" values, {overrides[path]!r} and {value!r}; they cannot be in one row"
                )
            overrides[path] = value
            first.setdefault(path, name)
        for path, each in own_space.items():
            if path in space and _describe(space[path]) != _describe(each):
                raise UserError(
                    f"sweep(): the part {name!r} and one before it give {path} different spaces;"
                    " they cannot be in one row"
                )
            space[path] = each
    row = row or "+".join(names)
    return (row, overrides, space) if space else (row, overrides)


def pair_parts(parts: Mapping[str, Any], names: Iterable[str] = ()) -> list[Row]:
    """Makes a row of every two parts, called "A+B", in the order of `parts`.

    `names`: the parts to pair; () takes all. Leaves out two parts that give a field different
    values, such as two strengths of one method. Raises UserError if there is no such part.
    """
    names = _check_names(parts, names)
    chosen = [name for name in parts if not names or name in names]
    rows = []
    for a, b in itertools.combinations(chosen, 2):
        first, second = (flatten(_split_part(name, parts[name])[0]) for name in (a, b))
        if all(first[path] == second[path] for path in first.keys() & second.keys()):
            rows.append(combine_parts(parts, [a, b]))
    return rows


def leave_one_out(parts: Mapping[str, Any], row: str = "together") -> list[Row]:
    """Makes a row of all parts together, called `row`, and for each part a row without it, called
    "without-PART".

    With `row` as the baseline, the differences say what each part adds to the others.
    """
    if len(parts) < 2:
        raise UserError(f"sweep(): leave-one-out needs two parts or more, got {len(parts)}")
    rows = [combine_parts(parts, parts, row)]
    for left_out in parts:
        rest = [name for name in parts if name != left_out]
        rows.append(combine_parts(parts, rest, f"without-{left_out}"))
    return rows


def make_grid(fields: Mapping[str, Iterable[Any]], base: Mapping[str, Any] = {}) -> list[Row]:
    """Makes a row of each combination of values: `{path: [values]}`, the last path fastest.

    A row's name has the last part of each path, "learning_rate=0.1,width_mult=2", or the whole
    path where two paths end alike. `base`: overrides of every row. Raises UserError if there is no
    field, or if a field has no list of values.
    """
    for path, values in fields.items():
        if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
            raise UserError(f"sweep(): {path}: expected a list of values, got {values!r}")
    fields = {path: list(values) for path, values in fields.items()}
    if not fields or not all(fields.values()):
        raise UserError("sweep(): a grid needs one field or more, with one value or more each")
    ends = [path.rpartition(".")[2] for path in fields]
    labels = [end if ends.count(end) == 1 else path for path, end in zip(fields, ends)]
    rows = []
    for values in itertools.product(*fields.values()):
        named = zip(labels, map(_format_value, values))
        name = ",".join(f"{label}={value}" for label, value in named)
        rows.append((name, flatten(base) | dict(zip(fields, values))))
    return rows


def _check_names(parts: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in parts:
            raise UserError(f"sweep(): there is no part {name!r}; the parts: {', '.join(parts)}")
    return names


def _describe(each: Any) -> Any:
    """Returns what two equal distributions have in common."""
    return describe_space({"": each}) if isinstance(each, Distribution) else each


def _split_part(name: str, part: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns (overrides, space) of a part."""
    if isinstance(part, Mapping):
        return part, {}
    if isinstance(part, (tuple, list)) and len(part) == 2:
        overrides, space = part
        if isinstance(overrides, Mapping) and isinstance(space, Mapping):
            return overrides, space
    raise UserError(
        f"sweep(): part {name}: expected {{field: value, ...}} or (overrides, space), got {part!r}"
    )


def _format_value(value: Any) -> str:
    """Formats a value so that it can be a part of a folder's name."""
    if isinstance(value, (tuple, list)):
        return "-".join(map(_format_value, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "_.+-" else "_" for c in text)
