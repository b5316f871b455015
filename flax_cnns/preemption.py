"""SIGTERM and SIGUSR1: save within a step, leave with 75.

Several processes agree on a step to stop at; an evaluation that is under way they finish.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved; the same command again goes on


class Preempted(SystemExit):
    """The run saved and left because of SIGTERM or SIGUSR1; the process exits with 75."""

    def __init__(self, step: int):
        super().__init__(EXIT_PREEMPTED)
        self.step = step


class Signals:
    """SIGTERM and SIGUSR1 ask the run to save and leave. With several processes JAX's own service
    sees the SIGTERM of any of them and picks a step at which all stop."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        several = jax.process_count() > 1
        # A Python handler for SIGTERM would switch JAX's service off; SIGUSR1 is passed on to it.
        handlers = {signal.SIGUSR1: self._pass_on if several else self._ask}
        if not several:
            handlers[signal.SIGTERM] = self._ask
        self._old = {number: signal.signal(number, h) for number, h in handlers.items()}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, *_: Any) -> None:
        self.asked.set()

    def _pass_on(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked.is_set()

    def asked_now(self) -> bool:
        """For between two batches of an evaluation, where several processes cannot agree."""
        return jax.process_count() == 1 and self.asked.is_set()
