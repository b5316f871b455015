"""What a network costs: parameters, multiply-accumulates and output shape of every layer.

Counted at the boundary of the modules, from the shapes of kernels and outputs, as the papers count:
not from what our convolution is lowered to, nor from what a compiler makes of it. A multiply and
its add are one MAC, two FLOPs. Convolutions and dense layers count, and modules that say so by a
method `macs`, called with what the module is called with: the two products inside attention. Norms,
activations and pooling do not.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flax_cnns import tree as pytree

Shape = tuple[int, ...]


class LayerCost(NamedTuple):
    path: str  # stage1/block1/conv1; "" is the network itself
    kind: str  # the module's class
    output_shape: Shape | None  # of one call; None: not run, or several outputs
    params: int  # its own; of all repeats where `nn.scan` stacks them under one name
    macs: int  # of all its calls


class Cost(NamedTuple):
    """A row for each module that has parameters or MACs of its own, in the order in which they run.

    The blocks that a network with `scan=True` stacks have a row each, as without it.
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
    """Parameters and MACs of `model(images)`; computes shapes only.

    `images_shape` is [N H W C], by default one image of `model.input_size`; any other shape that
    the module takes will do. `call` goes to the module's call; `train=False` where it has that
    argument.

    A module that is called twice, or under `nn.scan`, `nn.vmap` or `nn.jit`, counts as often as it
    runs. Every branch of `nn.cond` and `nn.switch` counts as if taken, the body of `nn.while_loop`
    once. Layers that only training runs (auxiliary heads) have parameters and no MACs.
    """
    shape = (1, *model.input_size) if images_shape is None else tuple(images_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    if "train" in inspect.signature(type(model).__call__).parameters:
        call = {"train": False} | call
    # Kinds from the initialization too: it builds what evaluation does not run.
    kinds: dict[str, str] = {}
    with nn.intercept_methods(lambda f, args, kwargs, at: _note(kinds, f, args, kwargs, at)):
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
    # A module may share its scope with another, or hold plain parameters: then the path's outermost
    # module gives the row its kind, or its own counted layer does.
    ran = {name: path for name, path in _named(boundary.outputs) if name in params or name in macs}
    rows = tuple(
        LayerCost(
            name,
            boundary.kinds.get(ran.get(name)) or kinds.get(name, ""),
            boundary.outputs.get(ran.get(name)),
            params[name],
            macs[name],
        )
        for name in [*ran, *(name for name in list(params) if name not in ran)]
    )
    return Cost(rows, sum(row.params for row in rows), sum(row.macs for row in rows))


def _named(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, path) of each; a stack's `block2-4/conv` becomes block2/conv ..., block by block."""

    def stack(path: str) -> str:
        parts = path.split("/")
        inside = (i for i, part in enumerate(parts, 1) if len(pytree.expand_stack(part)) > 1)
        return "/".join(parts[: next(inside, None)])

    for _, group in itertools.groupby(paths, stack):
        together = list(group)
        for names in zip(*map(pytree.expand_stack, together)):
            yield from zip(names, together)


# ---- MACs of one call, by the shapes of kernel, input and output


def _macs(module: nn.Module, kernel: Shape, x: Shape, y: Shape) -> int:
    match module:
        case nn.Conv():  # kernel [*window in/groups out], a window for each output
            return math.prod(y) * math.prod(kernel[:-1])
        case nn.ConvLocal():  # kernel [*places window*in/groups out]
            return math.prod(y) * kernel[-2]
        case nn.ConvTranspose():  # kernel [*window in out], spread from each input place
            return math.prod(x[:-1]) * math.prod(kernel)
        case nn.Dense():  # kernel [in out]
            return math.prod(y) * kernel[0]
        case nn.DenseGeneral():
            axes = (module.axis,) if isinstance(module.axis, int) else module.axis
            return math.prod(y) * math.prod(x[axis] for axis in axes)
    raise TypeError(type(module).__name__)


_COUNTED = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)


class _Boundary:
    """The interceptor: notes each module's output, and marks that of each counted call.

    How often a call is noted says little: `nn.scan` traces its body twice and runs it n times. So
    the output is marked with the call's number, and the program, which is asked for nothing else,
    tells how often each mark is passed.
    """

    def __init__(self) -> None:
        self.macs: list[tuple[str, int]] = []  # (path, MACs) of each counted call
        self.sizes: list[int] = []  # numbers in its output
        self.outputs: dict[str, Shape | None] = {}  # in the order of the calls
        self.kinds: dict[str, str] = {}
        self._inside: list[nn.Module] = []  # calls that have not returned

    def __call__(self, function: Callable, args: tuple, kwargs: dict, at: Any) -> Any:
        module, path = at.module, "/".join(at.module.path)
        # `super().__call__` of a subclass comes here again, with the same module.
        if at.method_name != "__call__" or any(module is outer for outer in self._inside):
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


def _note(kinds: dict[str, str], function: Callable, args: tuple, kwargs: dict, at: Any) -> Any:
    kinds.setdefault("/".join(at.module.path), type(at.module).__name__)
    return function(*args, **kwargs)


def _runs(jaxpr: Any, sizes: list[int], times: int = 1) -> Iterator[tuple[int, int]]:
    """(number of the call, how often it runs) of each mark in the program."""
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
