"""Prints the table of a network's layers, of a run or of a network by name."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from flax_cnns.analysis.layer_table import LayerRow, LayerTable, group_layers, tabulate_layers
from flax_cnns.analysis.receptive_field import ReceptiveField
from flax_cnns.config.checks import is_reference
from flax_cnns.errors import UserError
from flax_cnns.files import replace_atomically
from flax_cnns.models import registry
from flax_cnns.names import make_console
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.load import make_network_of_run
from flax_cnns.runs.references import check_trust, import_reference


class SizedNetwork(NamedTuple):
    """A network and the shape of its images."""

    title: str
    model: nn.Module
    image_shape: tuple[int, int, int]  # H W C


def find_network(name: str, size: str = "", *, trust: bool = False) -> SizedNetwork:
    """Returns the registered network `name`, or the user's own "package.module:Name".

    `size` is SIDE or HEIGHTxWIDTH in pixels; "" is the network's own. Raises UserError.
    """
    if not is_reference(name):
        return _resize(name, registry.create_model(name), size)
    check_trust({"model": {"name": name}}, trust, f"--model={name}")
    own: Any = import_reference(name, "--model")
    if not isinstance(own, nn.Module):
        try:
            inspect.signature(own).bind()
            own = own()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--model={name}: expected a flax.linen module, or a class or function that makes"
                f" one without arguments: {error}"
            ) from None
    if not isinstance(own, nn.Module):
        raise UserError(f"--model={name}: expected a flax.linen module, got {type(own).__name__}")
    return _resize(name, own, size)


def find_network_of_run(
    run: str | os.PathLike, size: str = "", *, trust: bool = False
) -> SizedNetwork:
    """Returns the network of a run with the size of its images, or another `size`.

    No weights are read. Raises UserError.
    """
    folder, _ = workdirs.split_checkpoint(run)
    network = make_network_of_run(folder, trust=trust)
    title = f"{folder.name}: {network.config.model.name} on {network.dataset.name}"
    return _resize(title, network.model, size, network.dataset.image_shape)


def _resize(
    title: str, model: nn.Module, size: str, image_shape: Sequence[int] | None = None
) -> SizedNetwork:
    shape = image_shape or getattr(model, "input_size", None)
    if size:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
        if not match or "0" in match.groups():
            raise UserError(f"--size: expected SIDE or HEIGHTxWIDTH in pixels, got {size!r}")
        shape = int(match[1]), int(match[2] or match[1]), shape[2] if shape else 3
    if shape is None:
        raise UserError(f"{title}: the network has no field input_size; give --size=HEIGHTxWIDTH")
    height, width, channels = shape
    fields = {field.name for field in dataclasses.fields(model) if field.init}
    if size and "input_size" in fields:
        model = model.clone(input_size=(height, width, channels))
    if getattr(model, "axis_name", None):  # the axis exists only inside a step
        model = model.clone(axis_name=None)
    return SizedNetwork(title, model, (height, width, channels))


def make_layer_table(network: SizedNetwork, *, batch: int = 1, depth: int = 0) -> LayerTable:
    """Returns the table for `batch` images; `depth` > 0 sums up parts that are deeper.

    Raises UserError if the network cannot take images of this size.
    """
    if depth < 0:
        raise UserError(f"--depth: expected 0 (everything) or more, got {depth}")
    shape = (batch, *network.image_shape)
    try:
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        jax.eval_shape(lambda x: network.model.init(jax.random.key(0), x, train=False), images)
    except UserError:
        raise
    except Exception as error:  # of any kind, from the network's own code
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        side = "x".join(map(str, network.image_shape))
        raise UserError(f"{network.title} cannot take images of {side}: {line}") from None
    table = tabulate_layers(network.model, shape)
    return group_layers(table, depth) if depth else table


def print_layer_table(table: LayerTable, title: str, *, console: Console | None = None) -> None:
    """Prints the table with its totals."""
    console = console or make_console(width=None if sys.stdout.isatty() else 160)
    shown = Table(box=None, pad_edge=False)
    shown.add_column("layer", overflow="fold")
    for column in ("kind", "output"):
        shown.add_column(column, no_wrap=True)
    for column in ("parameters", "MACs", "activations", "memory", "sees", "stride"):
        shown.add_column(column, no_wrap=True, justify="right")
    for row in table.rows:
        shown.add_row(*map(Text, _format(row)))
    counts = (f"{n:,}" for n in (table.params, table.macs, table.activations))
    shown.add_row(*map(Text, ("total", "", "", *counts, decimal(table.bytes), "", "")))
    say = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    say(title)
    console.print(shown)
    for reason in dict.fromkeys(row.field for row in table.rows if isinstance(row.field, str)):
        if not reason.startswith(("no positions", "runs only")):
            say(f"?: the receptive field is not known behind {reason}")


def _format(row: LayerRow) -> tuple[str, ...]:
    shape = "-" if row.output_shape is None else f"[{' '.join(map(str, row.output_shape))}]"
    counts = (f"{n:,}" if n else "-" for n in (row.params, row.macs, row.activations))
    memory = decimal(row.bytes) if row.bytes else "-"
    if isinstance(row.field, ReceptiveField):
        sees, stride = _pair(row.field.size), _pair(row.field.stride)
    else:
        sees = "image" if row.field.startswith("no positions") else "?"
        sees, stride = sees if row.output_shape else "-", "-"
    return (row.path or ".", row.kind, shape, *counts, memory, sees, stride)


def _pair(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


COLUMNS = (
    "layer kind output parameters macs activations bytes receptive_height receptive_width"
    " stride_height stride_width start_height start_width"
)


def write_layer_table(table: LayerTable, path: str | os.PathLike) -> None:
    """Writes the rows, without totals, as a CSV. Raises UserError if the file cannot be written.

    The six columns of the receptive field are empty where there is none.
    """
    try:
        with replace_atomically(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS.split())
            for row in table.rows:
                shape = "x".join(map(str, row.output_shape or ()))
                counts = row.params, row.macs, row.activations, row.bytes
                found = isinstance(row.field, ReceptiveField)
                field = [n for pair in row.field for n in pair] if found else [""] * 6
                writer.writerow([row.path, row.kind, shape, *counts, *field])
    except OSError as error:
        raise UserError(f"--csv: cannot write {path}: {error.strerror}") from None
