"""What runs of older versions had: fields that they lack, and fields that they did not reset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_cnns.config.fields import FIELDS, IN_ALL_RUNS
from flax_cnns.config.flat import flatten, set_field, to_plain
from flax_cnns.config.validation import reset_inert_fields

# Fields that runs of older versions lack, with the value by which all is as it was then: a run goes
# on, is evaluated and predicts as one with these.
OLDER_RUN_VALUES: dict[str, Any] = {
    path: field.older_runs for path, field in FIELDS.items() if field.older_runs is not IN_ALL_RUNS
}


def add_missing_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A plain config with those fields of `OLDER_RUN_VALUES` that it lacks, and their names."""
    complete = to_plain(config)
    there = flatten(complete)
    added = {path: value for path, value in to_plain(OLDER_RUN_VALUES).items() if path not in there}
    for path, value in added.items():
        set_field(complete, path, value)
    return complete, list(added)


def reset_inert_fields_like(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`theirs`, the plain config of an older run. A field that cannot act there gets its default if
    `ours` has that default: older versions did not reset what they switched off."""
    here = flatten(ours)
    reset = flatten(reset_inert_fields(theirs))
    keep = [name for name, value in reset.items() if here.get(name) != value]
    return reset_inert_fields(theirs, keep)
