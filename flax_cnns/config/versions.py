"""Configs of runs of older versions, which lack newer fields and did not reset unused ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_cnns.config.fields import FIELDS, IN_ALL_RUNS
from flax_cnns.config.flat import flatten, set_field, to_plain
from flax_cnns.config.validation import reset_inert_fields

# The fields that runs of older versions lack, each with the value that keeps such a run the same
# when it is resumed, evaluated or used for predictions.
OLDER_RUN_VALUES: dict[str, Any] = {
    path: field.older_runs for path, field in FIELDS.items() if field.older_runs is not IN_ALL_RUNS
}


def add_missing_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns a plain config with the fields of `OLDER_RUN_VALUES` that it lacked, and their
    names."""
    complete = to_plain(config)
    present = flatten(complete)
    added = {
        path: value for path, value in to_plain(OLDER_RUN_VALUES).items() if path not in present
    }
    for path, value in added.items():
        set_field(complete, path, value)
    return complete, list(added)


def reset_inert_fields_like(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `theirs`, the plain config of an older run, with its fields without effect reset to
    their defaults where `ours` has the default too. Older versions did not reset such fields."""
    here = flatten(ours)
    reset = flatten(reset_inert_fields(theirs))
    keep = [name for name, value in reset.items() if here.get(name) != value]
    return reset_inert_fields(theirs, keep)
