"""Names as other people give them (classes, files, folders), shown as they are.

`[red]` is no color for a terminal, `$x$` no formula for a picture, and what is not UTF-8 or cannot
be encoded is shown as an escape: `caf\\xe9`.
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
    """The text with escapes for bytes that are not UTF-8 and for control characters; tabs and ends
    of lines stay."""
    return _NOT_SHOWN.sub(lambda found: _escape(found[0]), text)


def make_console(**options: Any) -> rich.console.Console:
    """A rich console that takes no text as markup; styles are passed as arguments."""
    escape_unencodable()
    return rich.console.Console(markup=False, emoji=False, **options)


def escape_unencodable() -> None:
    """Makes standard output and standard error escape what their encoding lacks, so that printing a
    name never fails."""
    for stream in (sys.stdout, sys.stderr):
        strict = getattr(stream, "errors", None) in ("strict", "surrogateescape")  # this: LANG=C
        if strict and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def open_log(path: Path) -> TextIO:
    """Opens a file to append what a run prints; it takes every name."""
    return path.open("a", encoding="utf-8", errors=_ERRORS)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte of a file's name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _escape_all(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_escape, error.object[error.start : error.end])), error.end


codecs.register_error(_ERRORS, _escape_all)
