"""Parsers of flag values for argparse, which adds the flag's name to their error messages."""

from __future__ import annotations

from argparse import ArgumentTypeError

DTYPES = ("float32", "bfloat16")


def parse_positive_int(text: str) -> int:
    """ "32" -> 32."""
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def parse_size(text: str) -> tuple[int, int]:
    """ "500x375" -> (500, 375): width and height."""
    width, cross, height = text.partition("x")
    if not cross:
        raise ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, such as 500x375, got {text!r}")
    return parse_positive_int(width), parse_positive_int(height)


def parse_dtype(text: str) -> str:
    """Returns `text` if it is one of `DTYPES`."""
    if text not in DTYPES:
        raise ArgumentTypeError(f"expected {' or '.join(DTYPES)}, got {text!r}")
    return text
