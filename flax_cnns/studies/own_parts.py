"""What studies ask of a user's own parts in a config."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from flax_cnns.errors import UserError
from flax_cnns.runs.references import OPAQUE, PART_FIELDS, find_references, name_of


def refuse_opaque(config: Any, why: str) -> None:
    """Raises `UserError` for an object of one process, which a study cannot have; `why` says so."""
    for kind, references in find_references(config).items():
        for reference in references:
            if reference.startswith(OPAQUE):
                name = name_of(reference)
                raise UserError(
                    f"config.{PART_FIELDS[kind]}: {name} is an object of one process, and {why};"
                    f" name it 'package.module:{name}'"
                )


def find_names(config: Any) -> set[str]:
    """The names by which `own.NAME.FIELD` may mean the own parts of a config."""
    found = find_references(config)
    return {name_of(one) for kind, of in found.items() if kind != "model" for one in of}


def remove_fields(config: ConfigDict, gone: set[str]) -> None:
    """Removes the fields of own parts that a config no longer names."""
    with config.unlocked():
        for name in gone & set(config.get("own", {})):
            del config.own[name]
