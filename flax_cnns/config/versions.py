"""Configs of runs of older versions, which lack newer fields and may set fields without effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_cnns.config.entries import IN_ALL_RUNS
from flax_cnns.config.fields import FIELDS
from flax_cnns.config.flat import flatten, set_field, to_plain
from flax_cnns.config.validation import reset_inert_fields

# The fields that runs of older versions lack. Each has the value with which such a run can be
# resumed, evaluated and used for predictions without a change.
OLDER_RUN_VALUES: dict[str, Any] = {
    path: field.older_runs for path, field in FIELDS.items() if field.older_runs is not IN_ALL_RUNS
}


def add_missing_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns (a plain copy of `config` with the fields of `OLDER_RUN_VALUES` that it lacked, the
    names of these fields)."""
    complete = to_plain(config)
    present = flatten(complete)
    added = {
        path: value for path, value in to_plain(OLDER_RUN_VALUES).items() if path not in present
    }
    for path, value in added.items():
        set_field(complete, path, value)
    return complete, list(added)


def reset_inert_fields_like(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `theirs`, the plain config of an older run. A field without effect is reset to its
    default if `ours` has the default too, because older versions did not reset such fields."""
    here = flatten(ours)
    reset = flatten(reset_inert_fields(theirs))
    keep = [name for name, value in reset.items() if here.get(name) != value]
    return reset_inert_fields(theirs, keep)
