"""Shared by all figures: colors, axes, how names are shown, and how a figure is saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from flax_cnns.errors import UserError
from flax_cnns.files import replace_atomically
from flax_cnns.names import escape_unprintable

# Okabe and Ito's colors, which people with any kind of color vision can distinguish: Color
# Universal Design, 2008, https://jfly.uni-koeln.de/color
BLACK = "black"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GRAY = "#999999"  # not one of Okabe and Ito's


def tidy_axes(
    axes: Axes,
    *,
    grid: Literal["both", "x", "y"] = "both",
    hidden: Sequence[str] = ("top", "right"),
) -> None:
    """Draws a pale grid along x, y or both, and removes the frame on the `hidden` sides."""
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[list(hidden)].set_visible(False)


def shorten(text: str, max_length: int) -> str:
    """Shortens the text to `max_length` characters.

    It leaves out the middle, because names often differ at their ends.
    """
    if len(text) <= max_length:
        return text
    end = max_length // 3
    return f"{text[: max_length - end - 1].rstrip()}…{text[-end:].lstrip()}"


def collect_x(axes: Axes) -> set[float]:
    """Returns the x of all points of all lines."""
    return {float(x) for line in axes.get_lines() for x in np.asarray(line.get_xdata())}


def widen_single_point(axes: Axes, right: float = 1.0) -> None:
    """Widens the x axis if all points have the same x; the ticks would be fractions of a step."""
    xs = collect_x(axes)
    if len(xs) == 1:
        (x,) = xs
        axes.set_xlim(x - 1, x + right)


def check_suffix(path: str | os.PathLike) -> None:
    """Raises `UserError` if figures cannot be saved in the format of the path's suffix."""
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in ("", *kinds):
        raise UserError(f"cannot write the picture {path}: use a suffix such as .png, .jpg or .pdf")


def save_picture(figure: Figure, path: str | os.PathLike) -> None:
    """Saves a figure atomically, as a PNG or in the format of its suffix (.jpg, .svg, .pdf).

    Raises `UserError` if the file cannot be written or the suffix is unknown.
    """
    check_suffix(path)
    kind = Path(path).suffix.removeprefix(".") or "png"
    try:
        _show_names(figure)
        with replace_atomically(path) as temporary, warnings.catch_warnings():
            # Letters that the font lacks are drawn as boxes, without a warning.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            FigureCanvasAgg(figure).print_figure(
                temporary, format=kind, dpi=120, bbox_inches="tight"
            )
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error


def _show_names(figure: Figure) -> None:
    """Shows the names of classes and runs literally.

    A dollar sign does not start a formula, and bytes that are not UTF-8 are shown as escapes.
    """
    numbers = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        formatter = axis.get_major_formatter()
        if isinstance(formatter, FuncFormatter):
            axis.set_major_formatter(partial(_format_literally, formatter))
        else:  # matplotlib's own tick labels, which may be formulas
            numbers |= set(map(id, axis.get_ticklabels(which="both")))
    for text in figure.findobj(Text):
        if id(text) not in numbers:
            text.set_text(escape_unprintable(text.get_text()))
            text.set_parse_math(False)


def _format_literally(formatter: FuncFormatter, value: float, at: int | None = None) -> str:
    return escape_unprintable(formatter(value, at))
