"""The report of a benchmark: lines as it runs, then a table, a JSON file and a bar chart."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from flax_cnns.analysis.device import describe_environment
from flax_cnns.errors import UserError
from flax_cnns.files import replace_atomically
from flax_cnns.names import make_console


class Bars(NamedTuple):
    """A bar chart: for each label, a bar of each series."""

    labels: list[str]
    series: dict[str, list[float | None]]  # name -> value per label; None: no bar
    axis: str  # label of the value axis
    # Position of a reference line, such as 1 for ratios; it makes the axis logarithmic.
    reference: float | None = None


def check_writable(out: Path) -> None:
    """Makes the file and its folder. Raises UserError, which names --out, if that is impossible."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a"):
            pass
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from None


class BenchmarkReport:
    """Collects results row by row, so that an interrupted benchmark keeps the rows that it has."""

    def __init__(
        self,
        title: str,
        columns: tuple[str, ...],
        out: Path | None,
        flags: dict[str, Any] | None = None,
    ) -> None:
        self.title, self.columns, self.out, self.flags = title, columns, out, flags
        self.rows: list[dict[str, Any]] = []  # all values, for JSON
        self.summary: list[str] = []
        self.bars: Bars | None = None
        self._cells: list[tuple[str, ...]] = []
        if out is not None:  # fails now and not after an hour of measuring
            check_writable(out)
            self._new = not out.stat().st_size

    def print_line(self, text: str) -> None:
        print(text, flush=True)

    def add(self, row: dict[str, Any], cells: tuple[str, ...]) -> None:
        """Adds a result and prints it: `row` for JSON, `cells` for the table."""
        self.rows.append(row)
        self._cells.append(cells)
        texts = (f"{column} {cell}" for column, cell in zip(self.columns[1:], cells[1:]) if cell)
        self.print_line(f"{cells[0]}: {', '.join(texts)}")

    def close(self, *, interrupted: bool = False) -> None:
        """Prints the table; writes the JSON file and the chart."""
        if not self.rows:
            if self.out is not None and self._new:
                self.out.unlink()
            return
        table = Table(title=self.title)
        used = [i for i in range(len(self.columns)) if any(cells[i] for cells in self._cells)]
        for i in used:
            table.add_column(self.columns[i], justify="left" if i == 0 else "right")
        for cells in self._cells:
            table.add_row(*(cells[i] for i in used))
        # The table is wide unless it goes to a terminal: lines of a log need no wrapping.
        make_console(width=None if sys.stdout.isatty() else 200).print(table)
        for line in self.summary:
            self.print_line(line)
        if self.out is None:
            return
        content = {
            "title": self.title,
            "command": shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "flags": self.flags,
            "interrupted": interrupted,
            "environment": describe_environment(),
            "summary": self.summary,
            "rows": self.rows,
        }
        with replace_atomically(self.out) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        written = [str(self.out)]
        if self.bars is not None:
            picture = self.out.with_suffix(".png")
            try:
                draw_bars(self.bars, self.title, picture)
                written.append(str(picture))
            except ModuleNotFoundError as error:  # a GPU machine may lack matplotlib
                self.print_line(f"no chart: {error.name} is not installed")
        self.print_line(f"written: {', '.join(written)}")


def draw_bars(bars: Bars, title: str, png: Path) -> None:
    """Draws horizontal bars, with the first label on top."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    from flax_cnns.analysis.plots import style
    from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes

    colors = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
    colors += (style.VERMILION, style.SKY_BLUE, style.YELLOW, style.GRAY)
    series = {name: values for name, values in bars.series.items() if any(values)}
    height = 0.8 / max(len(series), 1)
    rows = len(bars.labels)
    figure = Figure(figsize=(8.5, 1.6 + rows * max(0.22, 0.2 * len(series))), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(series.items()):
        places = [row - 0.4 + (i + 0.5) * height for row in range(rows)]
        shown = [(place, value) for place, value in zip(places, values) if value]
        drawn_as = dict(height=height, color=colors[i % len(colors)], label=name)
        # Bars of ratios start at the reference and extend to the left if the ratio is smaller.
        start = bars.reference or 0.0
        lengths = [value - start for _, value in shown]
        drawn = axes.barh([place for place, _ in shown], lengths, left=start, **drawn_as)
        axes.bar_label(drawn, [format_number(value) for _, value in shown], padding=3, fontsize=7)
    if bars.reference is not None:
        axes.set_xscale("log")
        axes.axvline(bars.reference, color="black", linewidth=1)
        values = [v / bars.reference for vs in series.values() for v in vs if v]
        low, high = min([0.8, *values]), max([1.25, *values])
        margin = (high / low) ** 0.1
        axes.set_xlim(bars.reference * low / margin, bars.reference * high * margin)
        ticks = (1, 2, 5) if high / low > 3 else (0.6, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2)
        ticks = ticks if high / low < 1000 else (1,)  # powers of ten
        axes.xaxis.set_major_locator(LogLocator(subs=ticks, numticks=12))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12, y=0.01)
    axes.set_yticks(range(rows), [shorten(label, 60) for label in bars.labels], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(bars.axis)
    axes.set_title(textwrap.fill(title, 100), fontsize=10)
    tidy_axes(axes, grid="x")
    if len(series) > 1:
        figure.legend(
            loc="outside lower center", ncols=min(len(series), 4), frameon=False, fontsize=8
        )
    save_picture(figure, png)


def format_number(value: float) -> str:
    """1234.6 -> "1,235", 12.345 -> "12.3": at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_milliseconds(seconds: float) -> str:
    """0.0123 -> "12.3 ms", 12.3 -> "12.3 s"; seconds are used from 10 s on."""
    return f"{1e3 * seconds:,.4g} ms" if seconds < 10 else f"{seconds:,.1f} s"


def format_percent(fraction: float | None) -> str:
    """0.123 -> "12.3%"."""
    return "-" if fraction is None else f"{fraction:.1%}"


def format_gigabytes(size: int | None) -> str:
    """Bytes -> "1.23 GB"."""
    return "-" if size is None else f"{size / 1e9:.2f} GB"
