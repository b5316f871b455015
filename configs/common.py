"""The default config. A recipe starts from `get_config()` and sets the fields that differ.

flax_cnns/config/fields.py lists all fields with their defaults, allowed values and meanings, and
explains durations (`"20 epochs"`, `"500 steps"`) and rules (tuples of `(regex, value)`). A new run
refuses a field that differs from its default but has no effect, given the other fields, such as
momentum with adam.
"""

from ml_collections import ConfigDict

from flax_cnns.config import make_defaults


def get_config() -> ConfigDict:
    """Returns a ConfigDict of all fields with their defaults."""
    return ConfigDict(make_defaults())


def check_mode(mode: str, *modes: str) -> None:
    """Raises ValueError if `mode`, from `--config=file.py:mode`, is not one of `modes`."""
    if mode and mode not in modes:
        raise ValueError(f"unknown mode {mode!r} of this config; it has {', '.join(modes)}")
