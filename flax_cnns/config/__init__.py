"""Configs: the table of fields (`fields.py`), validation, and older runs. Does not import JAX."""

from flax_cnns.config.default import complete, default_config, set_config_field
from flax_cnns.config.effects import RunFacts
from flax_cnns.config.fields import DEFAULTS, FIELDS, STRATEGY, make_defaults
from flax_cnns.config.flat import flatten, list_differences, to_plain
from flax_cnns.config.validation import (
    check_new_run,
    find_inert_fields,
    find_problems,
    format_note,
    raise_problems,
    require_test,
    reset_inert_fields,
    validate,
    validate_section,
)
from flax_cnns.config.versions import OLDER_RUN_VALUES, add_missing_fields, reset_inert_fields_like

__all__ = [
    "DEFAULTS",
    "FIELDS",
    "OLDER_RUN_VALUES",
    "STRATEGY",
    "RunFacts",
    "add_missing_fields",
    "check_new_run",
    "complete",
    "default_config",
    "find_inert_fields",
    "find_problems",
    "flatten",
    "format_note",
    "list_differences",
    "make_defaults",
    "raise_problems",
    "require_test",
    "reset_inert_fields",
    "reset_inert_fields_like",
    "set_config_field",
    "to_plain",
    "validate",
    "validate_section",
]
