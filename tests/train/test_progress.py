"""Progress of a run: a bar on a terminal, whole lines in a file."""

from __future__ import annotations

import io
import time

import pytest

from flax_cnns.train import progress
from flax_cnns.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.now += 5` advances."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_plain_lines(clock):
    file = io.StringIO()
    with Progress(680, file=file) as shown:
        clock.now += 60  # compiling
        shown.update(1)
        shown.print("[digits] 1293 images")
        clock.now += 10
        for step in range(2, 121):
            shown.update(step)
        window = {"train/loss": 0.43214, "train/accuracy": 0.91, "norm/grads": 1.0}
        shown.update(120, window | {"images_per_second": 2310.4})
        shown.update(120, {"validation/loss": 0.5, "validation/accuracy": 0.875})
        shown.update(680, {"test/loss": float("nan"), "test/accuracy": 0.99})
    assert file.getvalue().splitlines() == [
        "[digits] 1293 images",
        "step 120/680  18 %  loss 0.4321  accuracy 0.9100  2 310 images/s  ETA 0:00:47",
        "step 120/680  18 %  validation loss 0.5000  accuracy 0.8750  ETA 0:00:47",
        "step 680/680  100 %  test loss nan  accuracy 0.9900",
    ]


def test_own_metrics_stand_behind(clock):
    file = io.StringIO()
    shown = Progress(10, file=file, extra_metrics=("f1", "recall", "third"))
    names = ("third", "loss", "recall", "label_accuracy", "subset_accuracy", "f1")
    shown.update(5, {f"validation/{name}": 0.5 for name in names})
    line = "loss 0.5000  label_accuracy 0.5000  f1 0.5000  recall 0.5000"
    assert file.getvalue().splitlines() == [f"step 5/10  50 %  validation {line}"]


def test_time_left_counts_this_sessions_steps_without_the_first(clock):
    file = io.StringIO()
    shown = Progress(1000, start=500, file=file)
    clock.now += 60
    shown.update(501, {"train/loss": 1.0})
    clock.now += 9
    shown.update(510, {"train/loss": 1.0})  # one second per step, 490 steps left
    first, second = file.getvalue().splitlines()
    assert "ETA" not in first
    assert second.endswith("ETA 0:08:10")


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    file = Terminal()
    with Progress(100, start=10, file=file) as shown:
        assert "compiling the first step" in file.getvalue()
        shown.update(11)
        shown.print("saved [red]checkpoint[/red] " + 100 * "x")
        shown.update(50, {"train/loss": 0.5, "images_per_second": 12345.0})
        shown.update(50, {"validation/loss": 0.25, "validation/accuracy": 0.9})
        shown.update(60)
    text = file.getvalue()
    assert "saved [red]checkpoint[/red] " + 100 * "x" in text  # unchanged and complete
    last = text[text.rindex("step ") :]  # the last screen shows the newest metrics of each split
    assert last.startswith("step 60/100")
    assert "60 %" in last
    assert "ETA 0:00:0" in last
    assert "train       loss 0.5000  12 345 images/s" in last
    assert "validation  loss 0.2500  accuracy 0.9000" in last
    assert "compiling" not in last
    shown.close()  # a second time does nothing
    assert file.getvalue() == text


def test_only_the_primary_process_shows_anything():
    for file in (io.StringIO(), Terminal()):
        with Progress(100, primary=False, file=file) as shown:
            shown.update(1, {"train/loss": 0.5})
            shown.print("text")
        assert file.getvalue() == ""


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with Progress(2, file=file) as shown:
        shown.update(1, {"train/loss": 0.5})
    assert file.getvalue() == "step 1/2  50 %  loss 0.5000\n"


def test_a_first_step_that_takes_long_is_announced_in_a_file(monkeypatch):
    monkeypatch.setattr(progress, "ANNOUNCE_AFTER_SECONDS", 0.01)
    file = io.StringIO()
    with Progress(680, file=file):
        deadline = time.monotonic() + 10
        while not file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert file.getvalue() == "compiling the first step\n"
    with Progress(680, file=io.StringIO()) as quick:
        quick.update(1)
        assert quick._compiling.finished.is_set()  # canceled
