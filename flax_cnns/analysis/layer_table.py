"""The table of a network's layers: parameters, MACs, activations, output and receptive field.

CS231n's lectures and the papers of VGG and GoogLeNet have such tables. Pooling functions have rows
too, although they have no parameters. Activations are the outputs of the rows, as the lectures
count them: the output of a ReLU, a sum or a concatenation has no row, so it is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import LayerCost, cost
from flax_cnns.analysis.receptive_field import ReceptiveField, TracedOutput, trace_outputs

Shape = tuple[int, ...]
IMAGES = "images"  # path of the row for the network's input


class LayerRow(NamedTuple):
    """One layer, or with `group_layers` one part of a network."""

    path: str  # of the module; pooling is called max_pool, avg_pool ... inside its module
    kind: str
    output_shape: Shape | None  # of the first call; None if evaluation does not run the layer
    params: int
    macs: int  # of the whole batch, summed over all calls
    activations: int  # values in the outputs of all calls
    bytes: int  # of these values, at their own dtypes
    field: ReceptiveField | str  # a text says why there is none


class LayerTable(NamedTuple):
    """The rows in the order of the program. The first row is the images."""

    rows: tuple[LayerRow, ...]
    outputs: dict[str, TracedOutput]  # of all modules, by path

    @property
    def params(self) -> int:
        return sum(row.params for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def activations(self) -> int:
        return sum(row.activations for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)


def tabulate_layers(model: nn.Module, images_shape: Sequence[int] | None = None) -> LayerTable:
    """Returns the table of `model(images, train=False)`; computes only shapes.

    `images_shape` is [N H W C]; the default is one image of `model.input_size`. There is a row for
    each module with parameters or MACs of its own, and for each pooling.
    """
    shape = (1, *model.input_size) if images_shape is None else tuple(images_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    traced = list(_expand_stacks(trace_outputs(model, variables, images)))
    costs = {layer.path: layer for layer in cost(model, shape).layers}
    calls: dict[str, list[TracedOutput]] = {}
    for path, each in _name_rows(traced):
        if not each.is_module or path in costs:
            calls.setdefault(path, []).append(each)
    values = math.prod(shape)
    rows = [LayerRow(IMAGES, "input", shape, 0, 0, values, 4 * values, _every_pixel())]
    rows += [_make_row(path, calls.get(path, []), costs.get(path)) for path in {**calls, **costs}]
    outputs = {each.path: each for each in traced if each.is_module}
    return LayerTable(tuple(rows), outputs)


def group_layers(table: LayerTable, depth: int) -> LayerTable:
    """Returns a table whose rows are the parts at most `depth` names deep, with their sums."""
    groups: dict[str, list[LayerRow]] = {}
    for row in table.rows:
        groups.setdefault("/".join(row.path.split("/")[:depth]), []).append(row)
    rows = []
    for path, inside in groups.items():
        last = inside[-1]
        if len(inside) > 1 and path in table.outputs:
            output = table.outputs[path]
            last = last._replace(
                kind=output.kind, output_shape=output.output.shape, field=output.field
            )
        rows.append(
            last._replace(
                path=path,
                params=sum(row.params for row in inside),
                macs=sum(row.macs for row in inside),
                activations=sum(row.activations for row in inside),
                bytes=sum(row.bytes for row in inside),
            )
        )
    return LayerTable(tuple(rows), table.outputs)


def _every_pixel() -> ReceptiveField:
    return ReceptiveField((1, 1), (1, 1), (0, 0))


def _expand_stacks(traced: Iterable[TracedOutput]) -> Iterator[TracedOutput]:
    """Gives each block of a stack such as `block2-4` its own output, as `cost` does."""
    for each in traced:
        for path in (paths := pytree.expand_stack(each.path)):
            yield each._replace(path=path, runs=each.runs // len(paths))


def _name_rows(traced: Sequence[TracedOutput]) -> Iterator[tuple[str, TracedOutput]]:
    """Yields (path of the row, output). A module that only pools gives its path to the pooling."""
    taken = {each.path for each in traced if each.is_module}
    pools: dict[str, int] = {}  # name -> how many
    for each in traced:
        if not each.is_module:
            name = _join(each.path, each.kind)
            pools[name] = pools.get(name, 0) + 1
    numbers: dict[str, int] = {}
    for each in traced:
        if each.is_module or (each.path and _is_alone(each, traced)):
            yield each.path, each
        else:
            name = _join(each.path, each.kind)
            path = name
            while path in taken or (path == name and pools[name] > 1):
                numbers[name] = numbers.get(name, 0) + 1
                path = f"{name}{numbers[name]}"
            taken.add(path)
            yield path, each


def _is_alone(pool: TracedOutput, traced: Sequence[TracedOutput]) -> bool:
    inside = [
        each
        for each in traced
        if each.path.startswith(f"{pool.path}/") or (each.path == pool.path and not each.is_module)
    ]
    return len(inside) == 1


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _make_row(path: str, calls: Sequence[TracedOutput], layer: LayerCost | None) -> LayerRow:
    params, macs = (layer.params, layer.macs) if layer else (0, 0)
    if not calls:
        kind = layer.kind if layer else ""
        shape = layer.output_shape if layer else None
        return LayerRow(path, kind, shape, params, macs, 0, 0, "runs only in training")
    first = calls[0]
    kind = layer.kind if layer else first.kind
    sizes = [each.runs * math.prod(each.output.shape) for each in calls]
    stored = sum(n * each.output.dtype.itemsize for n, each in zip(sizes, calls))
    shape = first.output.shape
    return LayerRow(path, kind, shape, params, macs, sum(sizes), stored, first.field)
