"""Refuses addresses such as gs://bucket/x where a command expects a path."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from flax_cnns.files import check_local

_NOT_PATHS = ("compilation-cache", "title")  # JAX itself opens a bucket as its cache
_WRITTEN = ("workdir", "out", "save")


def check_paths(arguments: Sequence[str]) -> None:
    """Raises `UserError` if a given flag or one of the `arguments` is an address.

    Also finds an address in a list, and in SOURCE=FILE and NAME=RUN.
    """
    for argument in arguments:
        _check(argument, "", writes=False)
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        # The library checks the fields of a config: a function of the user's own may take a bucket.
        if not flag.present or name in _NOT_PATHS or name.startswith("config"):
            continue
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        for value in values:
            if isinstance(value, str):
                _check(value, f"--{name}", writes=name in _WRITTEN)


def _check(text: str, flag: str, *, writes: bool) -> None:
    check_local(text, flag, writes=writes)
    check_local(text.partition("=")[2], flag, writes=writes)
