"""Finds the values of a space that give a row as it is: its first trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flax_cnns import config as configs
from flax_cnns.config import spaces
from flax_cnns.config.spaces import Distribution
from flax_cnns.errors import UserError


def find_untuned(
    config: Any, space: Mapping[str, Distribution], overrides: set[str]
) -> dict[str, Any] | None:
    """Returns the drawn values that give the config as it is; None if the space cannot give it.

    Raises UserError if the space cannot give a field of `overrides`, the fields that the row sets.
    """
    flat, untuned, is_complete = configs.flatten(config), {}, True
    for path, distribution in space.items():
        if not spaces.is_active(distribution, config):
            continue
        drawn = next(_list_candidates(distribution, flat.get(path)), None)
        if drawn is not None:
            untuned[path] = drawn
        elif path in overrides:
            raise UserError(
                f"the space of {path} does not contain the row's own value {flat.get(path)!r}:"
                " widen it, so that the untuned row is among the trials"
            )
        else:
            is_complete = False
    return untuned if is_complete else None


def _list_candidates(distribution: Distribution, value: Any) -> Iterator[Any]:
    """Yields the drawn values that make a field's value.

    For a range with `to_value` these are numbers inside of the value, such as the rate in a rule.
    """
    wanted = configs.to_plain({"value": value})
    if distribution.kind == "choice":
        candidates: list[Any] = list(distribution.values)
    else:
        low, high = distribution.low, distribution.high
        candidates = [number for number in _list_numbers(value) if low <= number <= high]
        if distribution.kind == "integer":
            candidates = [int(number) for number in candidates if number == int(number)]
    for drawn in candidates:
        try:
            made = configs.to_plain({"value": distribution.make_value(drawn)})
        except UserError:  # JSON cannot hold it
            continue
        if made == wanted:
            yield drawn


def _list_numbers(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [number for each in value for number in _list_numbers(each)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
