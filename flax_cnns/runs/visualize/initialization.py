"""The lectures' experiment on initial weights, as a table and a picture."""

from __future__ import annotations

import os
import pathlib

import jax
from rich import box
from rich.table import Table

from flax_cnns.analysis import initialization
from flax_cnns.analysis.initialization import DenseOutputs, Setting
from flax_cnns.analysis.plots import histograms
from flax_cnns.analysis.plots.histograms import choose_evenly
from flax_cnns.names import make_console

MAX_COLUMNS = 6  # layers in the table and in the picture
ERROR_OF_THE_DECK = (
    "The deck's code for He's initialization, randn(Din, Dout) / np.sqrt(2 / Din), must be"
    " randn(Din, Dout) * np.sqrt(2 / Din)."
)


def draw_initialization(
    png: str | os.PathLike,
    *,
    layers: int = 6,
    width: int = 4096,
    images: int = 16,
    as_printed: bool = False,
    seed: int = 0,
) -> dict[Setting, list[DenseOutputs]]:
    """Draws `initialization.measure_dense_stacks` and prints its table. Returns the numbers.

    `as_printed` adds rows with the weights that the deck's code gives. At most `MAX_COLUMNS` layers
    are shown, evenly spaced. Raises UserError.
    """
    settings = initialization.SETTINGS + (initialization.AS_PRINTED if as_printed else ())
    found = initialization.measure_dense_stacks(
        settings, layers=layers, width=width, images=images, key=jax.random.key(seed)
    )
    title = f"Outputs of {layers} dense layers of {width} units for {images} images of N(0, 1)"
    title += "; the outer bars hold the values beyond"
    histograms.draw_dense_stacks(found, pathlib.Path(png), title, most=MAX_COLUMNS)
    shown = choose_evenly(range(layers), MAX_COLUMNS)
    title = "standard deviation of the outputs by layer"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title if len(shown) == layers else f"{title} ({len(shown)} of {layers})",
    )
    table.add_column("weights", no_wrap=True)
    for number in shown:
        table.add_column(str(number + 1), justify="right", no_wrap=True)
    for setting, row in found.items():
        name = "ReLU" if setting.activation == "relu" else setting.activation
        cells = [_short(row[number].std) for number in shown]
        table.add_row(f"{name}, {setting.label}", *cells)
    console = make_console()
    console.print(table)
    printed = (width / 2) ** 0.5
    hint = "" if as_printed else "; --as-printed shows it"
    console.print(
        f"{ERROR_OF_THE_DECK} As printed, the standard deviation of the weights is {printed:.3g}"
        f" instead of {(2 / width) ** 0.5:.3g}{hint}.",
        highlight=False,
        soft_wrap=True,
    )
    return found


def _short(value: float) -> str:
    """Two digits, without zeros in the exponent: 0.29, 1.1e2."""
    return f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
