"""The cost of a network: parameters, multiply-accumulates (MACs) and output shape of every layer.

MACs are counted per module, from the shapes of kernels and outputs, as papers count them. They do
not depend on how a convolution is lowered or compiled. A multiplication and its addition are one
MAC and two FLOPs. Convolutions and dense layers count; norms, activations and pooling do not. A
module may count its own MACs by a method `macs`, which is called with the module's arguments.
Attention does this for its two products.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flax_cnns import tree as pytree

Shape = tuple[int, ...]


class LayerCost(NamedTuple):
    """The cost of one module of a network."""

    path: str  # stage1/block1/conv1; "" is the network itself
    kind: str  # class of the module
    output_shape: Shape | None  # of one call; None if there is no call or if it has several outputs
    params: int  # without submodules; of all repeats if `nn.scan` stacks them under one name
    macs: int  # of all calls


class Cost(NamedTuple):
    """The cost of a network, with a row for each module that has parameters or MACs of its own.

    Rows are in the order in which the modules run. Blocks that a network stacks with `scan=True`
    have a row each.
    """

    layers: tuple[LayerCost, ...]
    params: int
    macs: int  # for the whole batch

    def __str__(self) -> str:
        rows = [("layer", "kind", "output", "parameters", "MACs")]
        for layer in self.layers:
            shape = "-" if layer.output_shape is None else " ".join(map(str, layer.output_shape))
            counts = f"{layer.params:,}", f"{layer.macs:,}" if layer.macs else "-"
            rows.append((layer.path or ".", layer.kind, f"[{shape}]", *counts))
        rows.append(("total", "", "", f"{self.params:,}", f"{self.macs:,}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        align = ("<", "<", "<", ">", ">")
        return "\n".join(
            "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths)).rstrip()
            for row in rows
        )


def cost(model: nn.Module, images_shape: Sequence[int] | None = None, **call: Any) -> Cost:
    """Counts parameters and MACs of `model(images)`; computes only shapes.

    `images_shape` is [N H W C] or any other shape that the module accepts; the default is one image
    of `model.input_size`. `call` holds further arguments of the module's call. If the module has an
    argument `train`, its default here is False.

    Every call of a module counts, also in `nn.scan`, `nn.vmap` and `nn.jit`. Every branch of
    `nn.cond` and `nn.switch` counts. The body of `nn.while_loop` counts once. Layers that run only
    in training (auxiliary heads) have parameters but no MACs.
    """
    shape = (1, *model.input_size) if images_shape is None else tuple(images_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    if "train" in inspect.signature(type(model).__call__).parameters:
        call = {"train": False} | call
    # The initialization also shows the kinds of modules that evaluation does not run.
    kinds: dict[str, str] = {}
    with nn.intercept_methods(partial(_record_kind, kinds)):
        variables = jax.eval_shape(
            lambda key, x: model.init(key, x, **call), jax.random.key(0), images
        )
    boundary = _Boundary()
    with nn.intercept_methods(boundary):
        mutable = [name for name in variables if name != "params"]
        program = jax.make_jaxpr(
            lambda variables, x: model.apply(variables, x, mutable=mutable, **call)
        )(variables, images)
    macs: dict[str, int] = defaultdict(int)
    for call_number, times in _runs(program.jaxpr, boundary.sizes):
        path, each = boundary.macs[call_number]
        for name in (names := pytree.expand_stack(path)):
            macs[name] += times * each // len(names)
    params: dict[str, int] = defaultdict(int)
    for path, leaf in pytree.flatten(nn.meta.unbox(variables.get("params", {}))).items():
        for name in (names := pytree.expand_stack(path)):
            params[name.rpartition("/")[0]] += math.prod(leaf.shape) // len(names)
    # Several modules may share a scope. The row has the kind of the module whose MACs are counted;
    # if there is none, the kind of the outermost module.
    ran = {name: path for name, path in _named(boundary.outputs) if name in params or name in macs}
    rows = tuple(
        LayerCost(
            name,
            (boundary.kinds.get(ran[name]) if name in ran else None) or kinds.get(name, ""),
            boundary.outputs[ran[name]] if name in ran else None,
            params[name],
            macs[name],
        )
        for name in [*ran, *(name for name in list(params) if name not in ran)]
    )
    return Cost(rows, sum(row.params for row in rows), sum(row.macs for row in rows))


def _named(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (name, path) for each path. A path in a stack, such as `block2-4/conv`, gives one name
    for each block.

    The names of a stack are ordered block by block.
    """

    def find_stack(path: str) -> str:
        parts = path.split("/")
        inside = (i for i, part in enumerate(parts, 1) if len(pytree.expand_stack(part)) > 1)
        return "/".join(parts[: next(inside, None)])

    for _, group in itertools.groupby(paths, find_stack):
        stacked = list(group)
        for names in zip(*map(pytree.expand_stack, stacked)):
            yield from zip(names, stacked)


# ---- MACs of one call, from the shapes of kernel, input and output


def _macs(module: nn.Module, kernel: Shape, x: Shape, y: Shape) -> int:
    match module:
        case nn.Conv():  # kernel [*window in/groups out], one window per output
            return math.prod(y) * math.prod(kernel[:-1])
        case nn.ConvLocal():  # kernel [*positions window*in/groups out]
            return math.prod(y) * kernel[-2]
        case nn.ConvTranspose():  # kernel [*window in out], one window per input position
            return math.prod(x[:-1]) * math.prod(kernel)
        case nn.Dense():  # kernel [in out]
            return math.prod(y) * kernel[0]
        case nn.DenseGeneral():
            axes = (module.axis,) if isinstance(module.axis, int) else module.axis
            return math.prod(y) * math.prod(x[axis] for axis in axes)
    raise TypeError(type(module).__name__)


_COUNTED = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)


class _Boundary:
    """An interceptor that records output shapes, and marks the outputs of counted calls.

    The number of traced calls is not the number of runs: `nn.scan` traces its body twice and runs
    it n times. Therefore each output is marked with the number of its call, and the traced program
    shows how often each mark runs.
    """

    def __init__(self) -> None:
        self.macs: list[tuple[str, int]] = []  # (path, MACs) of each counted call
        self.sizes: list[int] = []  # elements of the output of each counted call
        self.outputs: dict[str, Shape | None] = {}  # by path, in the order of the calls
        self.kinds: dict[str, str] = {}
        self._inside: list[nn.Module] = []  # modules whose call has not returned yet

    def __call__(self, function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        # `super().__call__` in a subclass calls this interceptor again with the same module.
        if context.method_name != "__call__" or any(module is outer for outer in self._inside):
            return function(*args, **kwargs)
        kind = type(module).__name__
        self.kinds.setdefault(path, kind)
        self.outputs.setdefault(path, None)
        self._inside.append(module)
        try:
            y = function(*args, **kwargs)
        finally:
            self._inside.pop()
        self.outputs[path] = getattr(y, "shape", None)
        if hasattr(module, "macs"):
            macs = module.macs(*args, **kwargs)
        elif isinstance(module, _COUNTED):
            x = (*args, *kwargs.values())[0]
            kernel = nn.meta.unbox(module.variables["params"])["kernel"]
            macs = _macs(module, kernel.shape, x.shape, y.shape)
        else:
            return y
        self.kinds[path] = kind
        self.macs.append((path, macs))
        self.sizes.append(y.size)
        return checkpoint_name(y, f"flax_cnns.cost {len(self.macs) - 1}")


def _record_kind(
    kinds: dict[str, str], function: Callable, args: tuple, kwargs: dict, context: Any
) -> Any:
    kinds.setdefault("/".join(context.module.path), type(context.module).__name__)
    return function(*args, **kwargs)


def _runs(jaxpr: Any, sizes: list[int], times: int = 1) -> Iterator[tuple[int, int]]:
    """Yields (number of the call, how often it runs) for each mark in the program."""
    for equation in jaxpr.eqns:
        name, fields = equation.primitive.name, equation.params
        if name == "name" and (mark := re.fullmatch(r"flax_cnns\.cost (\d+)", fields["name"])):
            number = int(mark[1])
            mapped = equation.outvars[0].aval.size // max(sizes[number], 1)  # by nn.vmap
            yield number, times * mapped
        inner_times = times * (fields["length"] if name == "scan" else 1)
        for field in fields.values():
            for inner in field if isinstance(field, (tuple, list)) else (field,):
                inner = getattr(inner, "jaxpr", inner)  # closed or not
                if hasattr(inner, "eqns"):
                    yield from _runs(inner, sizes, inner_times)
