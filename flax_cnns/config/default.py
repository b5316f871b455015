"""The config from which every other one starts, and configs that say only what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_cnns.config.fields import FIELDS, make_defaults
from flax_cnns.config.flat import flatten
from flax_cnns.errors import UserError, did_you_mean


def default_config() -> Any:
    """A ConfigDict of every field with its default (docs/config.md)."""
    from ml_collections import ConfigDict  # late: tables and checks need none

    return ConfigDict(make_defaults())


def complete(config: Any) -> Any:
    """A ConfigDict of its own: a copy of a ConfigDict, or the defaults with the fields of a mapping
    in their places, such as `{"model": {"name": "resnet18"}, "seed": 1}`.

    Raises `UserError` for an unknown field, or if `config` is neither.
    """
    from ml_collections import ConfigDict

    if isinstance(config, ConfigDict):
        return ConfigDict(config.to_dict())
    if not isinstance(config, Mapping):
        raise UserError(f"config: expected a ConfigDict or a dict, got {type(config).__name__}")
    whole = default_config()
    for path, value in flatten(config).items():
        if path not in FIELDS and not path.startswith(("model.", "own.")):
            raise UserError(f"config: unknown field {path!r}{did_you_mean(path, FIELDS)}")
        set_config_field(whole, path, value)
    return whole


def set_config_field(config: Any, path: str, value: Any) -> None:
    """Sets the field `path` of a ConfigDict, whatever its type was; sections of `own` are made."""
    from ml_collections import ConfigDict

    *sections, field = path.split(".")
    with config.unlocked(), config.ignore_type():
        at = config
        for name in sections:
            if name not in at:
                at[name] = ConfigDict()
            at = at[name]
        at[field] = value
