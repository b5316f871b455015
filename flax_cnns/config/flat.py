"""Configs as plain data: nested dicts as in JSON, or flat dicts by field path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flax_cnns.errors import UserError


def to_plain(config: Any) -> dict[str, Any]:
    """Converts a ConfigDict or mapping to nested dicts and lists as in JSON: tuples become lists.

    Raises `UserError` if JSON cannot hold a value.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else config
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise UserError(f"config: expected numbers, strings, tuples and dicts: {error}") from None


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a mapping or ConfigDict: `{"model": {"name": "x"}}` -> `{"model.name": "x"}`."""
    flat: dict[str, Any] = {}
    for name, value in (config.to_dict() if hasattr(config, "to_dict") else config).items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, path + ".") if isinstance(value, Mapping) else {path: value})
    return flat


def set_field(config: dict[str, Any], path: str, value: Any) -> None:
    """Sets `config["a"]["b"]` for the path "a.b". Adds missing sections."""
    *sections, field = path.split(".")
    for name in sections:
        config = config.setdefault(name, {})
    config[field] = value


def list_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Lists the fields in which two plain configs differ, such as `"seed: 0 there, 1 here"`: "here"
    means `ours`, and "there" means `theirs`."""
    here, there, missing = flatten(ours), flatten(theirs), object()

    def describe(value: Any) -> str:
        return "absent" if value is missing else repr(value)

    return [
        f"{name}: {describe(there.get(name, missing))} there,"
        f" {describe(here.get(name, missing))} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name, missing) != there.get(name, missing)
    ]
