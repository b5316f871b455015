"""Prints names of classes, files and folders literally, whatever characters they contain.

`[red]` in a name is not a color on a terminal. Bytes that are not UTF-8, and characters that the
output's encoding lacks, are shown as escapes: `caf\\xe9`.
"""

from __future__ import annotations

import codecs
import re
import sys
from pathlib import Path
from typing import Any, TextIO

import rich.console

_ERRORS = "flax_cnns_names"
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def escape_unprintable(text: str) -> str:
    """Returns the text with escapes for bytes that are not UTF-8 and for control characters other
    than tabs and newlines."""
    return _NOT_SHOWN.sub(lambda match: _escape(match[0]), text)


def make_console(**options: Any) -> rich.console.Console:
    """Returns a rich console that reads no text as markup. Styles are passed as arguments."""
    escape_unencodable()
    return rich.console.Console(markup=False, emoji=False, **options)


def escape_unencodable() -> None:
    """Makes standard output and standard error escape characters that their encoding lacks, so that
    printing a name never fails."""
    for stream in (sys.stdout, sys.stderr):
        # With LANG=C, Python's own setting is "surrogateescape".
        strict = getattr(stream, "errors", None) in ("strict", "surrogateescape")
        if strict and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def open_log(path: Path) -> TextIO:
    """Opens a file to append a run's output to. Characters that cannot be encoded are escaped."""
    return path.open("a", encoding="utf-8", errors=_ERRORS)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python represents a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _escape_all(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_escape, error.object[error.start : error.end])), error.end


codecs.register_error(_ERRORS, _escape_all)
