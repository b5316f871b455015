"""Handles SIGTERM, SIGUSR1 and Ctrl-C: the run saves after its current step and exits.

The exit code is 75, or 130 after Ctrl-C. Several processes agree on a step to stop at, and finish
an evaluation that has begun. A second Ctrl-C exits at once, without saving.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax

from flax_cnns.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

EXIT_TIMEOUT = 1.0  # seconds after the second Ctrl-C until the process is ended by force


class Preempted(SystemExit):
    """The run saved and stopped because of a signal. The process exits with 75, or 130 after
    Ctrl-C. `by_signal` is False if `stop_when` of `run` stopped it instead."""

    def __init__(self, step: int, code: int = EXIT_PREEMPTED, by_signal: bool = True):
        super().__init__(code)
        self.step, self.by_signal = step, by_signal


class Signals:
    """A context in which SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask the run to save and stop.

    With several processes, JAX's own service sees a SIGTERM to any process and picks a step at
    which all stop. Until `begun` is True, there is nothing to save, and Ctrl-C raises
    KeyboardInterrupt. A second Ctrl-C always raises it. Python runs its signal handlers only after
    a compilation has ended. If that takes long after a second Ctrl-C, a thread ends the process.
    Ctrl-C is left alone if its handler is not Python's own, or if it is ignored, as in a background
    job of a shell script.
    """

    begun = False  # this session has taken a step
    code = EXIT_PREEMPTED  # the exit code of the process

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._left = threading.Event()
        self._interrupts = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        several = jax.process_count() > 1
        # A Python handler for SIGTERM would turn JAX's service off, so SIGUSR1 is passed on to it.
        handlers: dict[int, Callable[..., None]] = {
            signal.SIGUSR1: self._pass_on if several else self._ask
        }
        if not several:
            handlers[signal.SIGTERM] = self._ask
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            handlers[signal.SIGINT] = self._interrupt
            self._watch_interrupts()
        self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._left.set()
        if signal.SIGINT in self._old:
            signal.set_wakeup_fd(self._wakeup_before)
            _WAKEUPS.discard(self._wakeup)
            os.close(self._wakeup)  # ends the thread
        # The run may have been past its last step. A study that trains many runs then has to stop.
        if self.asked.is_set() and callable(before := self._old.get(signal.SIGTERM)):
            before(signal.SIGTERM, None)

    def _ask(self, *_: Any) -> None:
        self.asked.set()

    def _pass_on(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _interrupt(self, *_: Any) -> None:
        self._interrupts += 1
        if not self.begun or self._interrupts > 1:
            raise KeyboardInterrupt
        self.code = EXIT_INTERRUPTED
        if jax.process_count() > 1:
            self._pass_on()
        else:
            self._ask()

    def _watch_interrupts(self) -> None:
        reading, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        _WAKEUPS.add(self._wakeup)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    def _watch(self, reading: int) -> None:
        """Reads the number of each signal as it arrives, even while the main thread is in C++."""
        seen = 0
        while number := os.read(reading, 1):
            if number[0] != signal.SIGINT:
                continue
            seen += 1
            if seen == 1 and self.begun:
                _say(
                    "interrupted: saving after this step, then exiting; Ctrl-C again exits at once"
                )
            elif not self._left.wait(EXIT_TIMEOUT):
                if seen > 1:
                    _leave_at_once()
                _say("interrupted: exiting as soon as JAX allows it; Ctrl-C again exits at once")
        os.close(reading)

    def should_stop(self, count: int) -> bool:
        """Whether to save and stop now. Several processes get the same answer.

        count: goes up by one from call to call. Several processes stop only at the number after
        the highest that any of them had reached, so a number that is left out may be missed.
        """
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(count)
        return self.asked.is_set()

    def is_asked_to_stop(self) -> bool:
        """Whether to stop between two batches of an evaluation; always False with several
        processes, which cannot agree there."""
        return jax.process_count() == 1 and self.asked.is_set()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave_at_once() -> None:
    # Uses no locks: the main thread may hold them. Shows the cursor, which a progress bar hides.
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")
        os.write(2, b"error: interrupted twice, exited at once\n")
    os._exit(EXIT_INTERRUPTED)


_WAKEUPS: set[int] = set()  # file descriptors


def _forget_wakeup() -> None:
    # A forked child shares the pipe, and would count a Ctrl-C at the terminal a second time.
    if _WAKEUPS and (before := signal.set_wakeup_fd(-1)) not in _WAKEUPS:
        signal.set_wakeup_fd(before)


os.register_at_fork(after_in_child=_forget_wakeup)
