"""Traces some steps of a run with JAX's profiler, and measures where their time goes."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flax_cnns.errors import UserError

# The parts of a step's time, in order, with what each one is.
PARTS = {
    "input": "waiting for the next batch",
    "dispatch": "Python and the runtime, until the call of the step returns",
    "compute": "from then until the devices have finished the step",
    "host": "fetching and logging metrics, callbacks, progress, signals",
}


class StepWindow(NamedTuple):
    """Steps `first` to `last`, both included, numbered as in the log."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"


def parse_window(text: str, flag: str = "--profile") -> StepWindow:
    """Parses "100:110". Raises UserError, which names `flag`."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip(), re.ASCII)
    if not match:
        raise UserError(
            f"{flag}: expected FIRST:LAST, two steps of the run such as 100:110, got {text!r}"
        )
    window = StepWindow(int(match[1]), int(match[2]))
    if window.last < window.first:
        raise UserError(
            f"{flag}={text}: the last step comes before the first; write"
            f" {flag}={window.last}:{window.first}"
        )
    if window.first < 1:
        raise UserError(f"{flag}={text}: a run's first step has number 1")
    return window


class StepTimes(NamedTuple):
    """The seconds of each part of the profiled steps, in the order of the steps."""

    steps: list[int]
    parts: dict[str, list[float]]  # by the names in PARTS
    before: float | None  # mean seconds of the session's steps before the window; None if unknown

    def totals(self) -> list[float]:
        """Returns the seconds of each step."""
        return [sum(times) for times in zip(*self.parts.values())]


class StepProfiler:
    """Profiles a window of steps. The training loop calls its methods.

    In the window, the loop waits for the devices after each step (`jax.block_until_ready`), so that
    the parts of a step can be told apart; outside, nothing changes. The results of the steps are
    the same with and without a profiler.

    Args:
      window: the steps.
      folder: where JAX writes the trace, a new folder that this process alone uses.
      on_end: called with the times after the window's last step, when the trace is in `folder`.
    """

    def __init__(
        self, window: StepWindow, folder: str | os.PathLike, on_end: Callable[[StepTimes], None]
    ):
        self.window, self.folder, self._on_end = window, Path(folder), on_end
        self._times = StepTimes([], {part: [] for part in PARTS}, None)
        self._running = False
        self._annotation: Any = None

    def covers(self, step: int) -> bool:
        """Whether the step is in the window."""
        return self.window.first <= step <= self.window.last

    def start(self, before: float | None) -> None:
        """Starts the trace. `before`: `StepTimes.before`."""
        shutil.rmtree(self.folder, ignore_errors=True)  # of a session that was killed
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a record of every Python call would slow the host down
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
        self._running, self._times = True, self._times._replace(before=before)

    def begin_step(self, step: int) -> None:
        """Begins to measure a step of the window."""
        self._times.steps.append(step)
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()
        self._since = time.perf_counter()

    def mark(self, part: str) -> None:
        """Ends a part of the step; the next part begins."""
        since, self._since = self._since, time.perf_counter()
        self._times.parts[part].append(self._since - since)

    def end_step(self) -> None:
        """Ends the step and its last part. After the window's last step, ends the trace."""
        self.mark("host")
        self._leave_step()
        if self._times.steps[-1] == self.window.last:
            self._running = False
            jax.profiler.stop_trace()
            self._on_end(self._times)

    def close(self) -> None:
        """Ends and deletes the trace if the loop ends inside the window, or before it."""
        is_running, self._running = self._running, False
        if is_running:
            self._leave_step()
            jax.profiler.stop_trace()
        if is_running or not self._times.steps:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _leave_step(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
