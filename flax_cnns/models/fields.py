"""Annotations with bounds for the fields of networks, and the check of values against them.

A network declares `dropout: Rate = 0.5` or `depths: Counts`, and `create_model` refuses a value
that does not fit, in one line. The check knows `int`, `float`, `bool`, `str`, callables, dtypes,
`Sequence`, tuples, NamedTuples (the rows of a table) and unions of these. Fields with any other
annotation, and the elements of a bare `tuple` or `Sequence`, are not checked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import jax.numpy as jnp

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Dtype

DTYPES = ("float32", "bfloat16", "float16")

# ---------------------------------------------------------------------------- annotations


@dataclasses.dataclass(frozen=True)
class Between:
    """Bounds of a number: `low <= number < high`."""

    low: float
    high: float

    def allows(self, value: float) -> bool:
        return self.low <= value < self.high

    def describe(self, value: Any) -> str:
        return f"from {self.low:g} to below {self.high:g}"


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Bounds of a number: `low <= number <= high`, or `low < number` if `above`.

    `high` catches typos: a network of that size would take hours or terabytes.
    """

    low: int
    high: float = 100_000
    above: bool = False

    def allows(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def describe(self, value: Any) -> str:
        low = "above 0" if self.above or self.low == 1 else f"of at least {self.low}"
        return low + self.describe_end(value)

    def describe_end(self, value: Any) -> str:
        """Describes the upper bound if `value` exceeds it, else returns ""."""
        beyond = isinstance(value, int | float) and self.high < value < math.inf
        return f", at most {self.high:,}" if beyond else ""


@dataclasses.dataclass(frozen=True)
class NotEmpty:
    """Bound of a sequence: it has at least one item."""

    def allows(self, value: Sequence) -> bool:
        return len(value) > 0

    def describe(self, value: Any) -> str:
        return "of one or more" if value in ((), []) else ""


@dataclasses.dataclass(frozen=True)
class DescribedAs:
    """Text that describes valid values in messages, in place of the type and the bounds."""

    name: str

    def allows(self, value: Any) -> bool:
        return True


Rate = Annotated[float, Between(0, 1)]  # a rate of dropping, or the momentum of statistics
Positive = Annotated[float, AtLeast(0, math.inf, above=True)]
Factor = Annotated[float, AtLeast(0, 1000, above=True)]  # multiplies widths or depths
Count = Annotated[int, AtLeast(1)]
CountOrZero = Annotated[int, AtLeast(0)]
Counts = Annotated[Sequence[Count], NotEmpty()]  # usually one per stage
Classes = Annotated[int, AtLeast(1, 10_000_000), DescribedAs("a positive number or None")]
ImageSize = Annotated[tuple[Count, Count, Count], DescribedAs("(height, width, channels)")]

# ---------------------------------------------------------------------------- checking


class _InvalidValue(Exception):
    """A value does not fit its annotation."""


def _is_number(value: Any, kind: type) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    number: Any = value  # numbers.Real does not declare `abs`
    return abs(number) < math.inf


_SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", lambda v: _is_number(v, Integral)),
    float: ("a number", lambda v: _is_number(v, Real)),
    bool: ("True or False", lambda v: isinstance(v, bool)),
    str: ("a string", lambda v: isinstance(v, str)),
    Callable: ("a function or a module", callable),
}


def check_values(name: str, network: type, values: dict[str, Any]) -> dict[str, Any]:
    """Checks `values` for fields of the class `network`, and returns what its instances hold.

    Lists become tuples, and names of dtypes become dtypes. Raises `UserError` for the first value
    that its annotation does not allow. The message begins with `name`.
    """
    hints = _hints(network)
    return {field: _check(name, field, value, hints[field]) for field, value in values.items()}


def _check(name: str, field: str, value: Any, hint: Any) -> Any:
    try:
        return _convert(value, hint)
    except _InvalidValue:
        if hint == Dtype:
            near = did_you_mean(str(value), DTYPES)
            raise UserError(f"unknown {field} {value!r}{near}") from None
        raise UserError(
            f"{name}: {field} must be {_describe(hint, value)}, got {value!r}"
        ) from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _parse(hint: Any) -> tuple[Any, tuple, tuple]:
    """Splits an annotation into (kind, arguments, bounds); a kind is `int`, `Sequence`, ..."""
    bounds: tuple = ()
    if get_origin(hint) is Annotated:
        hint, bounds = hint.__origin__, hint.__metadata__
    kind = get_origin(hint) or hint
    return Union if kind is UnionType else kind, get_args(hint), bounds


def _is_row(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _convert(value: Any, hint: Any) -> Any:
    """Converts `value` to what a field annotated with `hint` holds, or raises `_InvalidValue`."""
    kind, args, bounds = _parse(hint)
    if hint == Dtype:
        return _convert_dtype(value)
    if kind is Union:
        value = _convert_union(value, args)
    elif kind is NoneType and value is not None:
        raise _InvalidValue
    elif kind in (Sequence, tuple) or _is_row(kind):
        value = _convert_sequence(value, kind, args)
    elif kind in _SCALARS and not _SCALARS[kind][1](value):
        raise _InvalidValue
    if not all(bound.allows(value) for bound in bounds):
        raise _InvalidValue
    return int(value) if kind is int else value


def _convert_dtype(value: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise _InvalidValue from None
    if dtype.name not in DTYPES:
        raise _InvalidValue
    return dtype


def _convert_union(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except _InvalidValue:
            continue
    raise _InvalidValue


def _convert_sequence(value: Any, kind: Any, args: Sequence[Any]) -> tuple:
    if not isinstance(value, tuple | list):
        raise _InvalidValue
    if _is_row(kind):
        args = tuple(_hints(kind).values())
    elif not args:  # a bare `tuple` or `Sequence` holds anything
        return tuple(value)
    elif kind is Sequence or args[-1] is ...:
        args = (args[0],) * len(value)
    if len(value) != len(args):
        raise _InvalidValue
    values = [_convert(v, hint) for v, hint in zip(value, args)]
    return kind(*values) if _is_row(kind) else tuple(values)


def _describe(hint: Any, value: Any) -> str:
    """Describes valid values, with the bound that the invalid `value` exceeds."""
    kind, args, bounds = _parse(hint)
    if names := [bound.name for bound in bounds if isinstance(bound, DescribedAs)]:
        ends = [bound.describe_end(value) for bound in bounds if isinstance(bound, AtLeast)]
        return "".join(names + ends)
    limits = [bound.describe(value) for bound in bounds]
    if kind is Union:
        return ", or ".join(_describe(arg, value) for arg in args if arg is not NoneType)
    if _is_row(kind):
        return f"{kind.__name__}({', '.join(kind._fields)})"
    if kind in (Sequence, tuple) and not args:
        return " ".join(["a sequence", *filter(None, limits)])
    if kind is tuple and args[-1] is not ...:
        return f"({', '.join(_describe(arg, None) for arg in args)})"
    if kind in (Sequence, tuple):
        odd = (
            [v for v in value if not _is_valid(v, args[0])]
            if isinstance(value, tuple | list)
            else []
        )
        each = f"each {_describe(args[0], odd[0] if odd else None)}"
        return f"{' '.join(['a sequence', *filter(None, limits)])}, {each}"
    if kind not in _SCALARS:  # not checked, but named as an element
        return f"a value of {getattr(kind, '__name__', kind)}"
    return " ".join([_SCALARS[kind][0], *limits])


def _is_valid(value: Any, hint: Any) -> bool:
    try:
        _convert(value, hint)
    except _InvalidValue:
        return False
    return True
