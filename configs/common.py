"""Every field there is, with its default. A config starts from `get_config()`, sets what differs.

flax_cnns/config/fields.py is the page that lists them: default, what each may be, what it means.
Durations are texts, `"20 epochs"` or `"500 steps"`; rules are tuples of `(regex, value)`: that page
says more of both. A new run refuses a field that is not at its default and cannot act under the
other choices, such as momentum with adam.
"""

from ml_collections import ConfigDict

from flax_cnns.config import make_defaults


def get_config() -> ConfigDict:
    return ConfigDict(make_defaults())


def check_mode(mode: str, *modes: str) -> None:
    """Raises ValueError for `--config=file.py:mode` with a mode that the file does not have."""
    if mode and mode not in modes:
        raise ValueError(f"unknown mode {mode!r} of this config; it has {', '.join(modes)}")
