"""Receptive fields: which pixels of the image each position of a map sees, by module path.

Araujo, Norris and Sim 2019, "Computing Receptive Fields of Convolutional Neural Networks",
https://distill.pub/2019/computing-receptive-fields/. The network is traced to a program, once and
without running it. Then an interval of pixels is followed through the program's operations
(field_rules.py). A window of k taps, d apart, on positions that are s pixels apart and see r pixels
gives positions that see r + (k - 1) d s pixels. Where branches meet, the result is the smallest
interval that contains all of them.

By the literature's convention, two things do not widen a field although they depend on the whole
image: a factor, such as the gate of squeeze-and-excitation, and the statistics of a norm.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain.features import Variables, number_calls, unroll
from flax_cnns.analysis.field_rules import Field, Span, Unknown
from flax_cnns.analysis.field_tracker import Step, Tracker
from flax_cnns.types import Array


class ReceptiveField(NamedTuple):
    """The pixels that each position of a map sees; pairs are (height, width).

    Position (i, j) sees the rows from `start[0] + i * stride[0]` to that plus `size[0] - 1`, and
    the columns accordingly. These may lie outside the image, where the padding is.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    start: tuple[int, int]


class TracedOutput(NamedTuple):
    """The output of a module or of a pooling function."""

    path: str  # of the module; for a pooling function, of the module that calls it
    kind: str  # the module's class, or the name of the pooling
    is_module: bool
    output: jax.ShapeDtypeStruct
    field: ReceptiveField | str  # a text says why there is none
    runs: int = 1  # iterations of a scan; the output and its field are those of the last one


def find_receptive_fields(
    model: nn.Module, variables: Variables, images: Array | jax.ShapeDtypeStruct
) -> dict[str, ReceptiveField | None]:
    """Returns {path: receptive field of that module's output}, in evaluation.

    `images` are [N H W C]. `variables` and `images` may be shapes (`jax.ShapeDtypeStruct`), because
    nothing is computed. The paths are those of `explain.features.list_outputs`. The value is None

    - for an output without positions, behind global pooling, flattening or attention, where
      everything sees the whole image,
    - behind an operation whose receptive field is not known, such as a transposed convolution.

    `explain_missing_fields` gives the reason.
    """
    outputs = trace_outputs(model, variables, images)
    return {
        path: None if isinstance(each.field, str) else each.field
        for path, each in _by_path(outputs).items()
    }


def explain_missing_fields(
    model: nn.Module, variables: Variables, images: Array | jax.ShapeDtypeStruct
) -> dict[str, str]:
    """Returns {path: reason} of the modules whose receptive field is None."""
    outputs = trace_outputs(model, variables, images)
    return {
        path: each.field for path, each in _by_path(outputs).items() if isinstance(each.field, str)
    }


def _by_path(outputs: tuple[TracedOutput, ...]) -> dict[str, TracedOutput]:
    modules = [each for each in outputs if each.is_module]
    return dict(zip(number_calls([each.path for each in modules]), modules))


def trace_outputs(
    model: nn.Module, variables: Variables, images: Array | jax.ShapeDtypeStruct
) -> tuple[TracedOutput, ...]:
    """Returns the outputs of all modules and of pooling, in the order of the program.

    Pooling is a reduction over windows, or a mean or maximum over all positions. Those inside norms
    are left out.
    """
    return _trace(*unroll(model, variables), images)


@tracing.once_per_shape
def _trace(model: nn.Module, variables: Variables, images: Any) -> tuple[TracedOutput, ...]:
    marks = _Marks()

    def forward(variables: Variables, images: Array) -> Any:
        # Mutable "intermediates" make `layers.Stage` run its blocks one by one, without a scan.
        return model.apply(variables, images, train=False, mutable=["intermediates"])[0]

    with nn.intercept_methods(marks):
        program = jax.make_jaxpr(forward)(variables, images).jaxpr
    found: dict[int | tuple[int, int], TracedOutput] = {}

    def see(step: Step) -> None:
        if (number := marks.find(step)) is not None:
            path, module = marks.calls[number]
            output = _describe(path, type(module).__name__, True, step)
            before = found.pop(number, None)
            found[number] = output._replace(runs=before.runs + 1) if before else output
        elif kind := _find_pooling(step):
            path, module = marks.find_module(step)
            if not isinstance(module, _NORMS):
                found[id(step.equation), len(found)] = _describe(path, kind, False, step)

    leaves = len(jax.tree.leaves(variables))
    start: Field = (Span(1, 1, 1, 0), Span(2, 1, 1, 0))
    Tracker(see).run(program, [*[None] * leaves, start])
    return tuple(found.values())


_NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm, nn.RMSNorm)


class _Marks:
    """An interceptor that marks the output of each module, and what runs inside the module."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, nn.Module]] = []  # by number, in the order of the returns
        self._entered: list[tuple[str, nn.Module]] = []

    def __call__(self, function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name != "__call__":
            return function(*args, **kwargs)
        call = "/".join(context.module.path), context.module
        self._entered.append(call)
        with jax.named_scope(f"flax_cnns.module {len(self._entered) - 1}"):
            y = function(*args, **kwargs)
        if not isinstance(y, jax.Array):
            return y
        self.calls.append(call)
        return checkpoint_name(y, f"flax_cnns.output {len(self.calls) - 1}")

    def find(self, step: Step) -> int | None:
        """Returns the number of the call whose output the step marks."""
        if step.equation.primitive.name != "name":
            return None
        mark = re.fullmatch(r"flax_cnns\.output (\d+)", step.equation.params["name"])
        return int(mark[1]) if mark else None

    def find_module(self, step: Step) -> tuple[str, nn.Module]:
        """Returns path and module of the innermost call in which the step runs."""
        scopes = (re.fullmatch(r"flax_cnns\.module (\d+)", name) for name in step.scopes[::-1])
        return self._entered[next((int(scope[1]) for scope in scopes if scope), 0)]


def _describe(path: str, kind: str, is_module: bool, step: Step) -> TracedOutput:
    aval: Any = step.equation.outvars[0].aval
    field = step.results[0]
    assert field is not None  # `Tracker` reports only steps that depend on the images
    output = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return TracedOutput(path, kind, is_module, output, _finish(field))


def _finish(field: Field) -> ReceptiveField | str:
    height, width = field
    for extent in field:
        if isinstance(extent, Unknown):
            return extent.reason
    if not (isinstance(height, Span) and isinstance(width, Span)):
        return "no positions: the whole image"
    return ReceptiveField(
        (int(height.size), int(width.size)),
        (int(height.stride), int(width.stride)),
        (int(height.start), int(width.start)),
    )


_WINDOWS = {
    "reduce_window_max": "max_pool",
    "reduce_window_min": "min_pool",
    "reduce_window_sum": "avg_pool",
    "reduce_window": "pool",
}
_GLOBAL = {"reduce_sum": "global_avg_pool", "reduce_max": "global_max_pool"}


def _find_pooling(step: Step) -> str | None:
    """Returns the kind of pooling that the step is, None if it is another operation."""
    name, field = step.equation.primitive.name, step.operands[0]
    spans = [extent for extent in field or () if isinstance(extent, Span)]
    if len(spans) < 2:
        return None
    if kind := _WINDOWS.get(name):
        window = step.equation.params["window_dimensions"]
        return kind if any(window[span.axis] > 1 for span in spans) else None
    if kind := _GLOBAL.get(name):
        axes = step.equation.params["axes"]
        return kind if all(span.axis in axes for span in spans) else None
    return None
