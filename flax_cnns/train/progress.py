"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich import progress as bars
from rich.text import Text

from flax_cnns.names import make_console

COMPILING_MESSAGE = "compiling the first step"
ANNOUNCE_AFTER_SECONDS = 5.0  # without a completed first step
MAX_EXTRA_METRICS = 2  # shown of a user's metrics, so that all metrics fit into one line


class Progress:
    """Shows steps, time left, images/s, loss, accuracy and some of a user's metrics.

    Use it as a context manager, or call `close` at the end. On a terminal, it redraws a few lines
    at the bottom in place:

        step 120/680 18 % ━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━ 0:00:09 ETA 0:00:41
        train       loss 0.4321  accuracy 0.9100  2 310 images/s
        validation  loss 0.3012  accuracy 0.9310

    In a file or a pipe, it prints one line per event:

        step 120/680  18 %  loss 0.4321  accuracy 0.9100  2 310 images/s  ETA 0:00:41
        step 120/680  18 %  validation loss 0.3012  accuracy 0.9310  ETA 0:00:41

    Args:
      total_steps: steps of the whole run.
      start: the step from which this session starts; 0, or the checkpoint's.
      primary: whether this process shows anything.
      file: the output; standard output if None.
      extra_metrics: names of further metrics; the first two are shown after the others.

    If the first step takes more than a few seconds, a line announces that it compiles. The time
    left is measured from the end of this session's first step, so it excludes the compilation.
    """

    def __init__(
        self,
        total_steps: int,
        start: int = 0,
        *,
        primary: bool = True,
        file: TextIO | None = None,
        extra_metrics: Sequence[str] = (),
    ) -> None:
        self._names = ("loss", "accuracy", "label_accuracy", *extra_metrics[:MAX_EXTRA_METRICS])
        self._total, self._step, self._primary = total_steps, start, primary
        self._file = file if file is not None else sys.stdout
        self._since: tuple[int, float] | None = None  # (step, clock) after the first step
        self._bar = None
        self._compiling = threading.Timer(ANNOUNCE_AFTER_SECONDS, self.print, [COMPILING_MESSAGE])
        self._compiling.daemon = True
        if primary and self._file.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _Bar(self._file)
            self._task = self._bar.add_task("", total=total_steps, completed=start, eta="")
            self._bar.start()
        elif primary:
            self._compiling.start()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Updates the display. Call it after every step, and with the metrics of every record.

        With metrics, `step` may be the earlier step to which the record belongs.
        """
        if not self._primary:
            return
        self._compiling.cancel()
        self._step = max(self._step, step)
        if self._since is None:
            self._since = (step, time.perf_counter())
        described = _describe(metrics or {}, self._names)
        if self._bar is not None:
            self._bar.compiling = False
            self._bar.newest |= described
            self._bar.update(self._task, completed=self._step, eta=self._eta())
        elif described:
            parts = [f"step {step}/{self._total}  {_percent(step, self._total)}"]
            for split, text in described.items():
                parts.append(text if split == "train" else f"{split} {text}")
            print("  ".join(filter(None, [*parts, self._eta()])), file=self._file, flush=True)

    def print(self, text: str) -> None:
        """Prints a line; on a terminal, above the bar."""
        if not self._primary:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Stops the bar and leaves its last state on the terminal. A second call does nothing."""
        self._compiling.cancel()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _eta(self) -> str:
        assert self._since is not None  # `update` sets it before it calls this
        first, clock = self._since
        remaining = self._total - self._step
        if self._step == first or remaining <= 0:
            return ""
        seconds_per_step = (time.perf_counter() - clock) / (self._step - first)
        return f"ETA {format_duration(remaining * seconds_per_step)}"


class _Bar(bars.Progress):
    """A progress bar of rich with a line of the newest metrics of each split below it."""

    def __init__(self, file: TextIO) -> None:
        self.compiling = True
        self.newest: dict[str, str] = {}
        super().__init__(
            _Column(lambda task: f"step {task.completed:.0f}/{task.total:.0f}"),
            _Column(lambda task: _percent(task.completed, task.total)),
            bars.BarColumn(bar_width=None),
            _Column(lambda task: format_duration(task.elapsed or 0)),
            _Column(lambda task: task.fields["eta"]),
            console=make_console(file=file, force_terminal=True),
            refresh_per_second=4,
            expand=True,
        )

    def get_renderables(self) -> Iterable[Any]:
        yield self.make_tasks_table(self.tasks)
        if self.compiling:
            yield Text(COMPILING_MESSAGE)
        for split, text in self.newest.items():
            yield Text(f"{split:<10}  {text}", no_wrap=True)


class _Column(bars.ProgressColumn):
    def __init__(self, text: Callable[[bars.Task], str]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: bars.Task) -> Text:
        return Text(self._text(task), no_wrap=True)


def _describe(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, str]:
    """Returns the metrics called `names` of each split: {"validation": "loss 0.3012  ..."}."""
    texts = {}
    for split in ("train", "validation", "test"):
        parts = [
            f"{name} {metrics[f'{split}/{name}']:.4f}"
            for name in names
            if f"{split}/{name}" in metrics
        ]
        if split == "train" and "images_per_second" in metrics:
            parts.append(f"{metrics['images_per_second']:,.0f} images/s".replace(",", " "))
        if parts:
            texts[split] = "  ".join(parts)
    return texts


def _percent(step: float, total: float | None) -> str:
    return f"{100 * step / total if total else 100:.0f} %"


def format_duration(seconds: float) -> str:
    """3661.4 -> "1:01:01"."""
    return str(datetime.timedelta(seconds=round(seconds)))
