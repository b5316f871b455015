"""The default config, and configs that set only the fields that differ from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_cnns.config.fields import FIELDS, make_defaults
from flax_cnns.config.flat import flatten
from flax_cnns.errors import UserError, did_you_mean


def default_config() -> Any:
    """Returns a ConfigDict of all fields with their defaults (docs/config.md)."""
    from ml_collections import ConfigDict  # imported here: the table and the checks do not need it

    return ConfigDict(make_defaults())


def complete(config: Any) -> Any:
    """Returns a new ConfigDict: a copy of a ConfigDict, or the defaults updated with a mapping such
    as `{"model": {"name": "resnet18"}, "seed": 1}`.

    Raises `UserError` if a field is unknown, or if `config` is neither a ConfigDict nor a mapping.
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
    """Sets the field `path` of a ConfigDict to a value of any type. Adds missing sections."""
    from ml_collections import ConfigDict

    *sections, field = path.split(".")
    with config.unlocked(), config.ignore_type():
        section = config
        for name in sections:
            if name not in section:
                section[name] = ConfigDict()
            section = section[name]
        section[field] = value
