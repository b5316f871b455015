"""The entries of the table of config fields: a field, and a section of fields."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax_cnns.config.checks import Check

IN_ALL_RUNS = object()  # `older_runs` of a field that the first version already had


class Field(NamedTuple):
    """A config field."""

    default: Any
    check: Check
    meaning: str
    older_runs: Any = IN_ALL_RUNS  # the value that leaves a run without the field unchanged
    # Whether the field turns on a regularizer: configs/ablations/regularizers.py compares them all.
    regularizer: bool = False


class Section(NamedTuple):
    """A group of config fields and further sections."""

    meaning: str
    fields: dict[str, Field | Section]


def section(meaning: str, **fields: Field | Section) -> Section:
    """Makes a `Section` with its fields as keyword arguments."""
    return Section(meaning, fields)
