"""Spaces of a search: which values the fields of a config may take. Does not import JAX.

A config file's function `space()` returns a dict from paths of fields to distributions:

    def space():
        return {
            "schedule.learning_rate": log_uniform(1e-3, 1.0),
            "optimizer.name": choice("sgd", "adam"),
            "optimizer.momentum": uniform(0.8, 0.99, when={"optimizer.name": "sgd"}),
            "optimizer.weight_decay": log_uniform(1e-5, 1e-2, to_value=decay_kernels),
        }

The paths are those of overrides: `model.FIELD` and `own.NAME.FIELD` included. `when` makes a
distribution conditional: the field is drawn only if the config, with what was drawn before it, has
this value, or one of these if the value is a tuple. A value that is itself a tuple is written as a
tuple of one: `when={"train.dropout": ((0.25,),)}`. `to_value` makes the field's value of the drawn
one: a rule that gives kernels a weight decay, for example.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from flax_cnns.config.fields import FIELDS
from flax_cnns.config.flat import flatten, to_plain
from flax_cnns.errors import UserError, did_you_mean

Space = Mapping[str, "Distribution"]  # {path of a field: its distribution}

# Fields that a search sets itself, and why no space may name them.
RESERVED = {
    "seed": "every trial has the config's seed",
    "train.test_on": "trials are never tested",
    "train.best_by": "it says which metric all trials are compared by",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
    """The values that one field may take. Made by `uniform`, `log_uniform`, `integer`, `choice`."""

    kind: Literal["float", "integer", "choice"]
    low: float = 0.0  # both ends are included
    high: float = 0.0
    log: bool = False  # uniform in the logarithm
    values: tuple[Any, ...] = ()  # of a choice
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    to_value: Callable[[Any], Any] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The choice's values as JSON texts, or as they are if they are strings."""
        return tuple(_label(value) for value in self.values)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The drawn values to check: all values of a choice, otherwise low and high."""
        return self.values if self.kind == "choice" else (self.low, self.high)

    def make_value(self, drawn: Any) -> Any:
        """Returns the field's value for a drawn value."""
        return drawn if self.to_value is None else self.to_value(drawn)


def uniform(
    low: float,
    high: float,
    *,
    when: Mapping[str, Any] | None = None,
    to_value: Callable[[float], Any] | None = None,
) -> Distribution:
    """Returns the uniform distribution over [low, high]."""
    return Distribution("float", low, high, when=when or {}, to_value=to_value)


def log_uniform(
    low: float,
    high: float,
    *,
    when: Mapping[str, Any] | None = None,
    to_value: Callable[[float], Any] | None = None,
) -> Distribution:
    """Returns the distribution over [low, high], low > 0, whose logarithm is uniform."""
    return Distribution("float", low, high, log=True, when=when or {}, to_value=to_value)


def integer(
    low: int,
    high: int,
    *,
    log: bool = False,
    when: Mapping[str, Any] | None = None,
    to_value: Callable[[int], Any] | None = None,
) -> Distribution:
    """Returns the uniform distribution over the integers low, ..., high; of their logarithm if
    `log`."""
    return Distribution("integer", low, high, log=log, when=when or {}, to_value=to_value)


def choice(
    *values: Any,
    when: Mapping[str, Any] | None = None,
    to_value: Callable[[Any], Any] | None = None,
) -> Distribution:
    """Returns the distribution over these values, each equally likely."""
    return Distribution("choice", values=values, when=when or {}, to_value=to_value)


def is_active(distribution: Distribution, config: Any) -> bool:
    """Whether the field is drawn, given the config with what was drawn before it."""
    flat = flatten(config)
    return all(
        any(_to_json(flat.get(path)) == _to_json(value) for value in get_options(wanted))
        for path, wanted in distribution.when.items()
    )


def describe_space(space: Space) -> dict[str, dict[str, Any]]:
    """Returns a space as in JSON. Two spaces with equal descriptions have the same values.

    `to_value` is described by the values that it makes of a choice's values, or of the ends and the
    middle of a range.
    """
    described = {}
    for path, each in space.items():
        entry: dict[str, Any] = {"kind": each.kind}
        if each.kind == "choice":
            entry["values"] = list(each.values)
        else:
            entry |= {"low": each.low, "high": each.high, "log": each.log}
        if each.when:
            entry["when"] = {name: list(get_options(value)) for name, value in each.when.items()}
        if each.to_value is not None:
            drawn = each.ends if each.kind == "choice" else (each.low, _middle(each), each.high)
            entry["to_value"] = [each.make_value(value) for value in drawn]
        described[path] = entry
    return to_plain(described)


def get_options(wanted: Any) -> tuple[Any, ...]:
    """Returns the values of a condition: a tuple or list gives several."""
    return tuple(wanted) if isinstance(wanted, (tuple, list)) else (wanted,)


def format_value(value: Any) -> str:
    """Formats a drawn value, or a field's value made of it, for people: numbers with four digits.

    Files keep the exact values.
    """
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(_round(value))


def format_values(values: Mapping[str, Any]) -> str:
    """Formats drawn values: "schedule.learning_rate=0.00213, optimizer.name=adam"."""
    return ", ".join(f"{path}={format_value(value)}" for path, value in values.items())


def check_space(config: Any, space: Any, *, shared: Collection[str] = ()) -> None:
    """Raises `UserError` if a space does not fit a config, a valid ConfigDict or mapping.

    Refuses a path that is no field, a field that a search sets itself, a range whose ends are
    upside down, a value that the field does not accept, and a condition that can never be true or
    that names a field drawn later.

    shared: paths of fields that may be never drawn with this config, because a condition depends on
    a field that the rows of a sweep set.
    """
    if not isinstance(space, Mapping) or not space:
        raise UserError(f"space(): expected {{field: distribution, ...}}, got {space!r}")
    flat = flatten(config)
    for path, each in space.items():
        if not isinstance(path, str) or not isinstance(each, Distribution):
            raise UserError(
                f"space(): expected a field's path and log_uniform, uniform, integer or choice,"
                f" got {path!r}: {each!r}"
            )
        if reason := RESERVED.get(path):
            raise UserError(f"space(): {path} cannot be searched: {reason}")
        is_open = path.startswith("own.") or path.rpartition(".")[0] == "model"
        if path not in FIELDS and not is_open:
            raise UserError(f"space(): unknown field {path!r}{did_you_mean(path, FIELDS)}")
        _check_range(path, each)
        _check_values(path, each)
        _check_condition(path, each, space, flat)
    for path, reason in find_never_drawn(config, space).items():
        if path not in shared:
            raise UserError(f"space(): {path} is never drawn: {reason}")


def find_never_drawn(config: Any, space: Space) -> dict[str, str]:
    """Returns {path: reason} of the fields whose condition the config itself makes false: it
    depends on a field that is not searched, or is never drawn, and has another value."""
    flat = flatten(config)
    found: dict[str, str] = {}
    for path, each in space.items():
        for name, wanted in each.when.items():
            value = _to_json(flat.get(name))
            is_drawn = name in space and name not in found
            if not is_drawn and value not in map(_to_json, get_options(wanted)):
                options = " or ".join(map(_label, get_options(wanted)))
                found[path] = (
                    f"when: expected {name} to be {options}, but it is {_label(value)} in the"
                    " config, and the search does not change it"
                )
    return found


def _check_range(path: str, each: Distribution) -> None:
    if each.kind == "choice":
        if len(each.values) < 2:
            raise UserError(f"space(): {path}: expected at least two values, got {each.values!r}")
        if len(set(each.labels)) < len(each.labels):
            raise UserError(f"space(): {path}: two values are equal: {', '.join(each.labels)}")
        return
    what = "integers" if each.kind == "integer" else "numbers"
    for end in each.ends:
        is_number = isinstance(end, (int, float)) and not isinstance(end, bool)
        if not is_number or not math.isfinite(end) or (each.kind == "integer" and end != int(end)):
            raise UserError(f"space(): {path}: expected {what} as low and high, got {end!r}")
    if each.low >= each.high:
        raise UserError(
            f"space(): {path}: expected low < high, got low={each.low!r}, high={each.high!r}"
        )
    if each.log and each.low <= 0:
        raise UserError(f"space(): {path}: a logarithmic range needs low > 0, got {each.low!r}")


def _check_values(path: str, each: Distribution) -> None:
    if path not in FIELDS:
        return  # the network and the user's parts check their own fields
    for drawn in each.ends:
        value = each.make_value(drawn)
        if expected := FIELDS[path].check(value):
            made = "" if each.to_value is None else f", made of {drawn!r}"
            raise UserError(f"space(): {path}: expected {expected}, got {value!r}{made}")


def _check_condition(path: str, each: Distribution, space: Space, flat: Mapping[str, Any]) -> None:
    if not isinstance(each.when, Mapping):
        raise UserError(f"space(): {path}: when: expected {{field: value}}, got {each.when!r}")
    for name, wanted in each.when.items():
        if name not in space and name not in flat:
            raise UserError(
                f"space(): {path}: when: unknown field {name!r}"
                f"{did_you_mean(name, [*space, *flat])}"
            )
        known = _list_values(path, name, space, flat)
        if isinstance(wanted, (tuple, list)) and _to_json(wanted) in known:
            raise UserError(
                f"space(): {path}: when: a tuple means several values of {name}; write"
                f" ({wanted!r},) for the value {wanted!r}"
            )
        if not get_options(wanted):
            raise UserError(f"space(): {path}: when: expected a value of {name}, got {wanted!r}")
        for option in get_options(wanted):
            if name in space and _to_json(option) not in known:
                near = did_you_mean(_label(option), list(map(_label, known)))
                raise UserError(f"space(): {path}: when: {name} is never {option!r}{near}")


def _list_values(path: str, name: str, space: Space, flat: Mapping[str, Any]) -> list[Any]:
    """Lists the values, as in JSON, that `name` may have when `path` is drawn."""
    if name not in space:
        return [_to_json(flat[name])]
    order, other = list(space), space[name]
    if order.index(name) >= order.index(path):
        raise UserError(f"space(): {path}: when: {name} must be drawn before it; move it up")
    if other.kind != "choice":
        raise UserError(f"space(): {path}: when: {name} is not a choice; its values are a range")
    values = [other.make_value(value) for value in other.values]
    if other.when and name in flat:  # where it is not drawn, it has the config's value
        values.append(flat[name])
    return list(map(_to_json, values))


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_to_json(value))


def _to_json(value: Any) -> Any:
    """Returns the value as JSON gives it back: tuples are lists. Raises UserError if it cannot."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise UserError(
            f"space(): expected numbers, strings, tuples and None as values, got {value!r}"
        ) from None


def _round(value: Any) -> Any:
    """Returns the value with all numbers inside rounded to four digits; tuples are lists."""
    if isinstance(value, (tuple, list)):
        return list(map(_round, value))
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _middle(each: Distribution) -> float | int:
    middle = math.sqrt(each.low * each.high) if each.log else (each.low + each.high) / 2
    return round(middle) if each.kind == "integer" else middle
