"""Ctrl-C asks the run to save, and exits if there is nothing to save or if it comes twice.

tests/runs/test_train.py tests the effect on a run."""

from __future__ import annotations

import os
import signal
import time

import pytest

from flax_cnns.runtime import preemption
from flax_cnns.runtime.preemption import Signals


@pytest.fixture(autouse=True)
def python_handles_ctrl_c():
    """Makes Python handle Ctrl-C even if a shell runs the tests in the background, where the shell
    ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(preemption, "_say", lines.append)
    return lines


def test_ctrl_c_asks_to_save_and_a_second_one_interrupts(said, monkeypatch):
    left = []
    monkeypatch.setattr(preemption, "EXIT_TIMEOUT", 0.05)
    monkeypatch.setattr(preemption, "_leave_at_once", lambda: left.append(True))
    with Signals() as signals:
        signals.begun = True
        interrupt()
        assert signals.should_stop(1)
        assert signals.code == 130
        wait_for(lambda: said)
        assert "Ctrl-C again exits at once" in said[0]
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        assert not left
        wait_for(lambda: left)  # whatever the main thread does
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_before_there_is_anything_to_save_interrupts(said):
    with pytest.raises(KeyboardInterrupt), Signals():
        interrupt()
    assert not said


def test_a_sigterm_after_the_first_step_ends_with_75(said):
    with Signals() as signals:
        signals.begun = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.is_asked_to_stop()
        assert signals.code == 75


def test_ctrl_c_stays_ignored_in_the_background_of_a_script():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            interrupt()
            assert not signals.is_asked_to_stop()
    finally:
        signal.signal(signal.SIGINT, before)
