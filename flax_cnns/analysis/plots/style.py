"""What all pictures share: colors, axes, names as they are, and how a picture becomes a file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from flax_cnns.errors import UserError
from flax_cnns.files import replace_atomically
from flax_cnns.names import escape_unprintable

# Okabe and Ito's colors, told apart by all kinds of color vision: Color Universal Design, 2008,
# https://jfly.uni-koeln.de/color
BLACK = "black"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GRAY = "#999999"  # not theirs


def tidy_axes(axes: Axes, *, grid: str = "both", hidden: Sequence[str] = ("top", "right")) -> None:
    """A pale grid along x, y or both, and no frame on the `hidden` sides."""
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[list(hidden)].set_visible(False)


def shorten(text: str, most: int) -> str:
    """The text in `most` characters: the middle is left out, as names often differ at their
    ends."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1].rstrip()}…{text[-end:].lstrip()}"


def widen_single_point(axes: Axes, right: float = 1.0) -> None:
    """Widens the x axis if all points have one x: matplotlib would number fractions of it."""
    found = {float(x) for line in axes.get_lines() for x in line.get_xdata()}
    if len(found) == 1:
        (x,) = found
        axes.set_xlim(x - 1, x + right)


def save_picture(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure beside its place, then moves it there; as a PNG, or as its suffix says (.jpg,
    .svg, .pdf). Raises `UserError` where it cannot."""
    kind = Path(path).suffix.removeprefix(".") or "png"
    try:
        _show_names(figure)
        with replace_atomically(path) as beside, warnings.catch_warnings():
            # A name in letters that the font lacks is drawn as boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            FigureCanvasAgg(figure).print_figure(beside, format=kind, dpi=120, bbox_inches="tight")
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error
    except ValueError as error:  # an unknown suffix, with those there are
        raise UserError(f"cannot write the picture {path}: {error}") from None


def _show_names(figure: Figure) -> None:
    """Draws the names of classes and runs as they are: a dollar begins no formula, and a byte that
    is not UTF-8 is shown as an escape."""
    numbers = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(named := axis.get_major_formatter(), FuncFormatter):
            axis.set_major_formatter(
                lambda value, at, named=named: escape_unprintable(named(value, at))
            )
        else:  # matplotlib's own, which may be formulas
            numbers |= set(map(id, axis.get_ticklabels(which="both")))
    for text in figure.findobj(Text):
        if id(text) not in numbers:
            text.set_text(escape_unprintable(text.get_text()))
            text.set_parse_math(False)
