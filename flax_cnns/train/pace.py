"""Clocks of the training loop."""

from __future__ import annotations

import time


class Stopwatch:
    """Measures seconds, starting when it is created."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last lap."""
        since, self._since = self._since, time.perf_counter()
        return self._since - since


class Pace:
    """Images per second. Time between `lap` and `restart` is not counted."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.steps, self.seconds = batch_size, 0, 0.0
        self.restart()

    def restart(self, steps: int = 0) -> None:
        """Starts to measure again, with `steps` steps counted already."""
        self.since, self.new = time.perf_counter(), steps

    def lap(self) -> float | None:
        """Returns the images per second since the last lap; None if no step was counted."""
        new, seconds = self.new, time.perf_counter() - self.since
        self.restart()
        if new <= 0:
            return None
        self.steps, self.seconds = self.steps + new, self.seconds + seconds
        return new * self.batch_size / seconds

    def mean(self) -> float | None:
        """Returns the images per second of all laps; None if no step was counted."""
        return self.steps * self.batch_size / self.seconds if self.steps else None
