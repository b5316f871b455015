"""Checks of config values: each returns None, or a string that says what was expected."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any

from flax_cnns.errors import did_you_mean

Check = Callable[[Any], str | None]

DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*")


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Check:
    """A finite number from `low` to `high`; `above` excludes `low`."""

    def check(value: Any) -> str | None:
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        valid = valid and low <= value <= high and abs(value) <= sys.float_info.max
        if valid and not (above and value == low):
            return None
        if high == math.inf:
            return f"a number {'above' if above else 'of at least'} {low:g}"
        return f"a number {f'above {low:g} and at most' if above else f'from {low:g} to'} {high:g}"

    return check


def integer(low: int = 0) -> Check:
    """An integer of at least `low` that fits into 32 bits."""

    def check(value: Any) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            return f"a whole number of at least {low}"
        return None if value < 2**31 else "a whole number below 2**31"

    return check


def one_of(*names: str) -> Check:
    """One of `names`; the message suggests the most similar one."""

    def check(value: Any) -> str | None:
        known = ", ".join(names)
        return None if value in names else f"one of {known}{_near(value, names)}"

    return check


def _near(value: Any, names: tuple[str, ...]) -> str:
    if not isinstance(value, str):  # None, for the pages of fields, would resemble names
        return ""
    hint = did_you_mean(value, names)
    return hint if "did you mean" in hint else ""


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def string(value: Any) -> str | None:
    return None if isinstance(value, str) else "a string"


def nonempty_string(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a name"


def duration(value: Any) -> str | None:
    valid = isinstance(value, str) and DURATION.fullmatch(value)
    return None if valid else "a duration such as '20 epochs' or '500 steps'"


def durations(value: Any) -> str | None:
    valid = isinstance(value, (tuple, list)) and all(duration(v) is None for v in value)
    return None if valid else "durations such as ('30 epochs', '60 epochs')"


def area_range(value: Any) -> str | None:
    """(), or (smallest, largest) with 0 < smallest <= largest <= 1."""
    valid = isinstance(value, (tuple, list)) and len(value) in (0, 2)
    valid = valid and all(isinstance(v, (int, float)) and 0 < v <= 1 for v in value)
    valid = valid and list(value) == sorted(value)
    return (
        None if valid else "() or (smallest, largest) share of the area, both above 0 and at most 1"
    )


def randaugment(value: Any) -> str | None:
    """(), or (number of operations, magnitude)."""
    valid = isinstance(value, (tuple, list)) and len(value) in (0, 2)
    if valid and value:
        valid = integer(1)(value[0]) is None and number(0, 30)(value[1]) is None
    return None if valid else "() or (operations per image, magnitude from 0 to 30) such as (2, 9)"


def rules(of: Check, what: str, *, single: bool = False) -> Check:
    """Rules ((regex, value), ...) whose values pass the check `of`. With `single`, also (value,),
    which applies to every path. `what` describes a value in the message."""

    def check(value: Any) -> str | None:
        expected = f"rules ((regex, {what}), …)" + (f" or ({what},)" if single else "")
        if not isinstance(value, (tuple, list)):
            return expected
        if single and len(value) == 1 and of(value[0]) is None:
            return None
        for rule in value:
            if not isinstance(rule, (tuple, list)) or len(rule) != 2 or of(rule[1]) is not None:
                return expected
            try:
                re.compile(rule[0])
            except (re.error, TypeError) as error:
                return f"{expected}; {rule[0]!r} is not a regular expression ({error})"
        return None

    return check


def weight_over_time(value: Any) -> str | None:
    """A number, or points ((duration, number), …)."""
    if number(-math.inf)(value) is None:
        return None
    valid = isinstance(value, (tuple, list)) and len(value) > 0
    valid = valid and all(
        isinstance(point, (tuple, list))
        and len(point) == 2
        and duration(point[0]) is None
        and number(-math.inf)(point[1]) is None
        for point in value
    )
    return None if valid else "a number"


_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
# Matches "package.module:Name" but not a TFDS version such as "digits:1.0.0".
REFERENCE = re.compile(rf"<opaque>:\w+|{_DOTTED}:{_DOTTED}")


def is_reference(value: Any) -> bool:
    """Whether a value names an object in the user's code, as "package.module:Name"."""
    return isinstance(value, str) and REFERENCE.fullmatch(value) is not None


def reference(value: Any) -> str | None:
    return None if value == "" or is_reference(value) else "'package.module:name' or ''"


def references(value: Any) -> str | None:
    valid = isinstance(value, (tuple, list)) and all(map(is_reference, value))
    return None if valid else "names such as ('package.module:Name',)"


def named_references(value: Any) -> str | None:
    valid = isinstance(value, (tuple, list)) and all(
        isinstance(v, str) and is_reference(re.sub(r"\w+=", "", v, count=1)) for v in value
    )
    return (
        None if valid else "functions such as ('package.module:f1', 'other_name=package.module:f1')"
    )


def optimizer_name(value: Any) -> str | None:
    if is_reference(value):
        return None
    expected = one_of("sgd", "adam", "adamw", "rmsprop", "lamb", "muon")(value)
    return expected and f"{expected}; or 'package.module:factory'"


def best_by(value: Any) -> str | None:
    valid = value == "auto" or (isinstance(value, str) and re.fullmatch(r"validation/\w+", value))
    return None if valid else "auto, or a metric such as 'validation/accuracy'"


def compute_dtype(value: Any) -> str | None:
    if value == "float16":  # its gradients vanish below 6e-8
        return "bfloat16 or float32 (float16 needs a scaled loss, which is not implemented)"
    return one_of("float32", "bfloat16")(value)


batchnorm_mode = one_of("train", "frozen_stats", "frozen")
schedule_name = one_of("constant", "steps", "cosine", "exponential", "one_cycle", "plateau")


def class_list(value: Any) -> str | None:
    valid = isinstance(value, (tuple, list)) and all(
        isinstance(v, (int, str)) and not isinstance(v, bool) for v in value
    )
    return None if valid else "numbers or names of classes such as (0, 3, 'Bag'), () for all"


def per_channel(low: float) -> Check:
    """A number of at least `low` for each channel, or ()."""

    def check(value: Any) -> str | None:
        valid = isinstance(value, (tuple, list)) and all(number(low)(v) is None for v in value)
        return None if valid else "a number per channel such as (0.485, 0.456, 0.406), or ()"

    return check


def channel_count(value: Any) -> str | None:
    valid = value in (0, 1, 3) and not isinstance(value, (bool, float))
    return None if valid else "0 (the data set's own), 1 or 3"


def split_size(value: Any) -> str | None:
    """A fraction below 1, or a whole number of examples."""
    if expected := number()(value):
        return expected
    return None if value < 1 or value % 1 == 0 else "a fraction below 1, a count, or 0"


def source_path(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "a path or None"
