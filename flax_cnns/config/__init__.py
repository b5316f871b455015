"""Configs: one table of fields (`fields.py`), what is checked, and what older runs had. No JAX."""

from flax_cnns.config.default import complete, default_config, set_in
from flax_cnns.config.effects import Facts
from flax_cnns.config.fields import DEFAULTS, FIELDS, STRATEGY, make_defaults
from flax_cnns.config.flat import difference, flatten, plain
from flax_cnns.config.validation import (
    check_new,
    find_doubts,
    find_inert_fields,
    note,
    refuse,
    reset_inert_fields,
    validate,
    validate_section,
)
from flax_cnns.config.versions import NEWER, completed, reset_as_in

__all__ = [
    "DEFAULTS",
    "FIELDS",
    "NEWER",
    "STRATEGY",
    "Facts",
    "check_new",
    "complete",
    "completed",
    "default_config",
    "difference",
    "find_doubts",
    "find_inert_fields",
    "flatten",
    "make_defaults",
    "note",
    "plain",
    "refuse",
    "reset_as_in",
    "reset_inert_fields",
    "set_in",
    "validate",
    "validate_section",
]
