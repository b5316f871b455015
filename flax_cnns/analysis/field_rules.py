"""Rules by which each operation of a program moves, widens or ends a receptive field.

field_tracker.py follows the height and the width of the images through a program. A value that
depends on the images has two extents, one along the height and one along the width. An extent is

- a `Span`: output i along `axis` sees the pixels from `start + i * stride` on, `size` of them,
- `WHOLE`: the value has no positions of its own, because it is a sum, a product or a list of
  values at all positions,
- `Unknown`: no rule covers an operation on the way.

A value that does not depend on the images has no extents. The result of an operation without a rule
is `Unknown`, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from jax.extend import core


class Span(NamedTuple):
    """The pixels that the positions of one axis of an array see: an interval for each position."""

    axis: int  # of the array
    size: int
    stride: int
    start: int


class Whole(NamedTuple):
    """The extent of values without positions."""


class Unknown(NamedTuple):
    """The extent of values whose pixels no rule gives."""

    reason: str


WHOLE = Whole()
Extent = Span | Whole | Unknown
Field = tuple[Extent, Extent]  # height, width
Value = Field | None  # None: does not depend on the images


def collect_names(text: str) -> frozenset[str]:
    """Returns the names in a text of several lines."""
    return frozenset(text.split())


_ELEMENTWISE = collect_names("""
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh device_put digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne
    neg nextafter not or population_count pow pvary real reduce_precision rem
    round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square stop_gradient sub tan tanh xor
""")
_REDUCTIONS = collect_names("""
    reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin
""")
_CUMULATIVE = collect_names("cumsum cumprod cummax cummin cumlogsumexp")
_WINDOWS = collect_names("reduce_window reduce_window_sum reduce_window_max reduce_window_min")


def get_shape(var: core.Var | core.Literal) -> tuple[int, ...]:
    """Returns the shape of an operand or a result."""
    return cast(Any, var.aval).shape


# ---------------------------------------------------------------------------- fields


def fail(reason: str) -> Field:
    """Returns the field of values whose pixels are not known."""
    return Unknown(reason), Unknown(reason)


def _change(value: Value, change: Callable[[Span], Extent]) -> Value:
    """Applies `change` to the spans of height and width."""
    if value is None:
        return None
    height, width = (change(each) if isinstance(each, Span) else each for each in value)
    return height, width


def move_axes(value: Value, move: Callable[[int], int]) -> Value:
    """Gives each axis the number that `move` returns for it."""
    return _change(value, lambda span: span._replace(axis=move(span.axis)))


def drop_axes(value: Value, axes: Sequence[int]) -> Value:
    """Removes axes from an array. A value whose positions are removed depends on all of them."""

    def change(span: Span) -> Extent:
        if span.axis in axes:
            return WHOLE
        return span._replace(axis=span.axis - sum(axis < span.axis for axis in axes))

    return _change(value, change)


def join(values: Iterable[Value], factors: Iterable[Value] = ()) -> Value:
    """Returns the field of an array that depends on all `values` at the same position.

    `factors` without positions do not widen it.
    """
    given, scales = [v for v in values if v is not None], [f for f in factors if f is not None]
    if not given:
        given, scales = scales, []
    if not given:
        return None
    height, width = (_join_extents([v[i] for v in given], [f[i] for f in scales]) for i in (0, 1))
    return height, width


def _join_extents(extents: list[Extent], factors: list[Extent]) -> Extent:
    extents = [*extents, *(f for f in factors if f != WHOLE)]
    for each in extents:
        if isinstance(each, Unknown):
            return each
    spans = [each for each in extents if isinstance(each, Span)]
    if len(spans) < len(extents):
        return WHOLE
    axis, stride = spans[0].axis, spans[0].stride
    if any((s.axis, s.stride) != (axis, stride) for s in spans):
        return Unknown("maps of different strides or axes meet")
    start = min(s.start for s in spans)
    return Span(axis, max(s.start + s.size for s in spans) - start, stride, start)


def _slide(span: Span, window: int, step: int, before: int, gap: int = 1) -> Span:
    """Returns the span after a window of `window` taps, `gap` apart, that moves by `step`.

    The first window starts `before` positions ahead of the axis, where the padding is.
    """
    size = span.size + (window - 1) * gap * span.stride
    return Span(span.axis, size, span.stride * step, span.start - before * span.stride)


# ---------------------------------------------------------------------------- rules


def _elementwise(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    match eqn.primitive.name:
        case "mul":  # a gate, or a norm's scale
            whole = [g for g in given if g is not None and _is_whole(g)]
            return join([g for g in given if g is not None and not _is_whole(g)], whole)
        case "div" | "sub":  # a norm's statistics
            return join(given[:1], given[1:])
    return join(given)


def _is_whole(field: Field) -> bool:
    return WHOLE in field


_OTHER_AXIS = "a convolution takes positions as its batch or its channels"


def _conv2d(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    x, kernel = given
    if kernel is not None:
        return fail("a kernel depends on the image")
    g = eqn.params["geometry"]

    def change(span: Span) -> Extent:
        k = span.axis - 1
        if k not in (0, 1):
            return Unknown(_OTHER_AXIS)
        return _slide(span, g.kernel_size[k], g.strides[k], g.padding[k][0], g.dilation[k])

    return _change(x, change)


def _conv(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    x, kernel = given
    if kernel is not None:
        return fail("a kernel depends on the image")
    fields, numbers = eqn.params, eqn.params["dimension_numbers"]
    inputs, outputs = numbers.lhs_spec[2:], numbers.out_spec[2:]
    window = [get_shape(eqn.invars[1])[axis] for axis in numbers.rhs_spec[2:]]

    def change(span: Span) -> Extent:
        if span.axis not in inputs:
            return Unknown(_OTHER_AXIS)
        k = inputs.index(span.axis)
        if fields["lhs_dilation"][k] != 1:
            return Unknown("a transposed convolution")
        moved = _slide(
            span,
            window[k],
            fields["window_strides"][k],
            fields["padding"][k][0],
            fields["rhs_dilation"][k],
        )
        return moved._replace(axis=outputs[k])

    return _change(x, change)


def _window(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    fields = eqn.params

    def change(span: Span) -> Extent:
        k = span.axis
        if fields.get("base_dilation", (1,) * (k + 1))[k] != 1:
            return Unknown("a window over a dilated map")
        sizes = fields["window_dimensions"][k], fields["window_strides"][k]
        return _slide(span, *sizes, fields["padding"][k][0], fields["window_dilation"][k])

    return _change(given[0], change)


def _pad(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    def change(span: Span) -> Extent:
        before, _, inside = eqn.params["padding_config"][span.axis]
        return Unknown("padding inside a map") if inside else _slide(span, 1, 1, before)

    return _change(given[0], change) if given[1] is None else fail("padding by an image's value")


def _slice(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    starts, strides = eqn.params["start_indices"], eqn.params["strides"]

    def change(span: Span) -> Span:
        return _slide(span, 1, strides[span.axis] if strides else 1, -starts[span.axis])

    return _change(given[0], change)


def split(eqn: core.JaxprEqn, given: Sequence[Value]) -> list[Value]:
    found, begin = [], 0
    for size in eqn.params["sizes"]:

        def change(span: Span, begin: int = begin) -> Span:
            return _slide(span, 1, 1, -begin if span.axis == eqn.params["axis"] else 0)

        found.append(_change(given[0], change))
        begin += int(size)
    return found


def _concatenate(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    axis = eqn.params["dimension"]
    lengths = [get_shape(var)[axis] for var in eqn.invars]
    along = [g is not None and any(getattr(e, "axis", None) == axis for e in g) for g in given]
    if not any(along):
        return join(given)
    if sum(g is not None for g in given) > 1:
        return fail("maps are concatenated along height or width")
    before = sum(lengths[: along.index(True)])  # rows or columns that do not depend on the images
    return _change(
        given[along.index(True)],
        lambda span: _slide(span, 1, 1, before if span.axis == axis else 0),
    )


def _reduce(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    return join(drop_axes(value, eqn.params["axes"]) for value in given)


def _cumulate(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    axis = eqn.params["axis"]
    return _change(
        given[0],
        lambda span: Unknown("a cumulative sum over positions") if span.axis == axis else span,
    )


def _sort(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    rank = len(get_shape(eqn.invars[0]))
    axis = eqn.params.get("dimension", eqn.params.get("axis", rank - 1)) % rank
    field = join(given)
    return _change(
        field, lambda span: Unknown("positions are sorted") if span.axis == axis else span
    )


def _transpose(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    return move_axes(given[0], eqn.params["permutation"].index)


def _squeeze(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    return drop_axes(given[0], eqn.params["dimensions"])


def _reverse(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    axes = eqn.params["dimensions"]
    return _change(
        given[0],
        lambda span: Unknown("a map is reversed") if span.axis in axes else span,
    )


def _broadcast(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    before, after = get_shape(eqn.invars[0]), get_shape(eqn.outvars[0])
    axes = eqn.params["broadcast_dimensions"]

    def change(span: Span) -> Extent:
        if before[span.axis] == after[axes[span.axis]]:
            return span._replace(axis=axes[span.axis])
        return WHOLE  # one position is copied to all

    return _change(given[0], change)


def _reshape(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    before, after = get_shape(eqn.invars[0]), get_shape(eqn.outvars[0])
    taken: list[int] = []

    def change(span: Span) -> Extent:
        outside, length = math.prod(before[: span.axis]), before[span.axis]
        for axis, size in enumerate(after):
            if size == length and math.prod(after[:axis]) == outside and axis not in taken:
                taken.append(axis)
                return span._replace(axis=axis)
        # Several axes become one, or one is left out.
        for axis in range(len(after)):
            around = math.prod(after[:axis])
            if outside % max(around, 1) == 0 and around * after[axis] >= outside * length:
                return WHOLE
        return Unknown("positions are split into groups")

    return _change(given[0], change)


def _dot(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    (contracted, batch) = eqn.params["dimension_numbers"]
    if all(given):
        if not any(isinstance(extent, Unknown) for g in given for extent in g or ()):
            return WHOLE, WHOLE  # as in attention
        return join([*given])
    side = 0 if given[0] is not None else 1
    rank = len(get_shape(eqn.invars[side]))
    kept = [k for k in range(rank) if k not in (*contracted[side], *batch[side])]
    others = len(get_shape(eqn.invars[1 - side])) - len(contracted[0]) - len(batch[0])
    first = len(batch[0]) + (others if side else 0)

    def change(span: Span) -> Extent:
        if span.axis in batch[side]:
            return span._replace(axis=list(batch[side]).index(span.axis))
        if span.axis in kept:
            return span._replace(axis=first + kept.index(span.axis))
        return Unknown("a matrix product over positions") if others else WHOLE

    return _change(given[side], change)


def _dynamic_slice(eqn: core.JaxprEqn, given: Sequence[Value]) -> Value:
    before, sizes = get_shape(eqn.invars[0]), eqn.params["slice_sizes"]
    if any(given[1:]):
        return fail("a slice is chosen by the image")
    return _change(
        given[0],
        lambda span: (
            span
            if before[span.axis] == sizes[span.axis]
            else Unknown("a slice whose start is known only at run time")
        ),
    )


RULES: Mapping[str, Callable[[core.JaxprEqn, Sequence[Value]], Value]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_CUMULATIVE, _cumulate),
    **dict.fromkeys(_WINDOWS, _window),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv2d": _conv2d,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "sort": _sort,
    "squeeze": _squeeze,
    "top_k": _sort,
    "transpose": _transpose,
}
