"""Handles the user's own parts in the configs of studies."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from flax_cnns.errors import UserError
from flax_cnns.runs.references import OPAQUE, PART_FIELDS, find_references, name_of


def refuse_opaque(config: Any, why: str) -> None:
    """Raises UserError if the config has an opaque object, which child processes cannot import.

    `why` is the reason in the message.
    """
    for kind, references in find_references(config).items():
        for reference in references:
            if reference.startswith(OPAQUE):
                name = name_of(reference)
                raise UserError(
                    f"config.{PART_FIELDS[kind]}: {name} exists in one process only, but {why};"
                    f" give an importable 'package.module:{name}'"
                )


def find_names(config: Any) -> set[str]:
    """Returns the names of a config's own parts, as `own.NAME.FIELD` uses them."""
    references = find_references(config)
    return {name_of(ref) for kind, refs in references.items() if kind != "model" for ref in refs}


def remove_fields(config: ConfigDict, names: set[str]) -> None:
    """Removes `own.NAME` for each of `names` from a config."""
    with config.unlocked():
        for name in names & set(config.get("own", {})):
            del config.own[name]
