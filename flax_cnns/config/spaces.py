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
this value, or one of these if the value is a tuple. `to_value` makes the field's value of the drawn
one: a rule that gives kernels a weight decay, for example.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
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
        any(_to_json(flat.get(path)) == _to_json(value) for value in _get_options(wanted))
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
            entry["when"] = {name: list(_get_options(value)) for name, value in each.when.items()}
        if each.to_value is not None:
            drawn = each.ends if each.kind == "choice" else (each.low, _middle(each), each.high)
            entry["to_value"] = [each.make_value(value) for value in drawn]
        described[path] = entry
    return to_plain(described)


def check_space(config: Any, space: Any) -> None:
    """Raises `UserError` if a space does not fit a config, a valid ConfigDict or mapping.

    Refuses a path that is no field, a field that a search sets itself, a range whose ends are
    upside down, a value that the field does not accept, and a condition that can never be true or
    that names a field drawn later.
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
    order = list(space)
    for name, wanted in each.when.items():
        if name not in space:
            if name not in flat:
                raise UserError(
                    f"space(): {path}: when: unknown field {name!r}"
                    f"{did_you_mean(name, [*space, *flat])}"
                )
            continue  # a row of a sweep may set it
        if order.index(name) >= order.index(path):
            raise UserError(f"space(): {path}: when: {name} must be drawn before it; move it up")
        other = space[name]
        if other.kind != "choice":
            raise UserError(
                f"space(): {path}: when: {name} is not a choice; its values are a range"
            )
        known = [_to_json(other.make_value(value)) for value in other.values]
        for option in _get_options(wanted):
            if _to_json(option) not in known:
                near = did_you_mean(_label(option), list(map(_label, known)))
                raise UserError(f"space(): {path}: when: {name} is never {option!r}{near}")


def _get_options(wanted: Any) -> tuple[Any, ...]:
    """Returns the values of a condition: a tuple or list gives several."""
    return tuple(wanted) if isinstance(wanted, (tuple, list)) else (wanted,)


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


def _middle(each: Distribution) -> float | int:
    middle = math.sqrt(each.low * each.high) if each.log else (each.low + each.high) / 2
    return round(middle) if each.kind == "integer" else middle
