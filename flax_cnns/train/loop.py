"""Iterate, log, evaluate, save. Knows iterators and steps, no network and no data set."""

from __future__ import annotations

import collections
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from flax_cnns.errors import Diverged, Interrupted
from flax_cnns.train import metrics
from flax_cnns.types import Array, PyTree


@dataclasses.dataclass
class HostState:
    """What a run knows beside its arrays. Saved with every checkpoint as JSON, so that the log of a
    resumed run goes on in the middle of a window and early stopping counts on."""

    # Sums since the last log; those of a metric of M ratios are lists.
    window: dict[str, float | list[float]] = dataclasses.field(default_factory=dict)
    bad_in_a_row: int = 0
    bad_steps: int = 0
    best: float | None = None  # of the validation metric that `TrainLoop.best_by` names
    wait: int = 0  # validations since the best
    due: bool = False  # the validation of this step is still to be made
    stopped: bool = False  # early
    seconds: float = 0.0  # of training, over all sessions


@dataclasses.dataclass(frozen=True)
class Periods:
    """Periods in steps; 0 means never, except that the last step always logs and saves."""

    log: int
    evaluate: int
    save: int


@dataclasses.dataclass
class TrainOutcome:
    state: PyTree
    step: int
    preempted: bool = False
    seconds_to_first_step: float | None = None
    images_per_second: float | None = None  # compiling, evaluating and saving left out


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """What the loop calls; those that are None are left out. Every process calls all of them, but
    `on_step`, which is None on all but the primary one.

    `save(step, state, host, metrics)` gets a JSON-able host; `write(step, record)` one line of the
    log; `tick(step)` follows every step, and `should_stop(step)` is asked once a step.
    `evaluate(state)` gives {"loss", "accuracy", ...} of the validation split, or raises
    `Interrupted`; `on_validation(state, error)` may change the state (the plateau schedule), and so
    may `refresh(state)` before each validation, be there a validation split or not (precise_bn).
    `on_step(step, numbers)` gets the metrics of each step, as floats, once they are fetched, which
    is while the next step runs: those of the log without its "train/", of this step alone (NaN
    where it was rejected: then "bad_steps" is 1).
    """

    save: Callable[[int, PyTree, dict[str, Any], dict[str, float]], None]
    write: Callable[[int, dict[str, float]], None]
    tick: Callable[[int], None]
    should_stop: Callable[[int], bool]
    evaluate: Callable[[PyTree], dict[str, float]] | None = None
    on_validation: Callable[[PyTree, float], PyTree] | None = None
    refresh: Callable[[PyTree], PyTree] | None = None
    on_step: Callable[[int, dict[str, float]], None] | None = None


class Stopwatch:
    """Counts from when it is made."""

    def __init__(self):
        self._since = time.perf_counter()

    def lap(self) -> float:
        """The seconds since the last lap."""
        since, self._since = self._since, time.perf_counter()
        return self._since - since


class _Pace:
    """Images a second; what lies between `lap` and `restart` does not count."""

    def __init__(self, batch_size: int):
        self.batch_size, self.steps, self.seconds = batch_size, 0, 0.0
        self.restart()

    def restart(self, steps: int = 0) -> None:
        self.since, self.new = time.perf_counter(), steps

    def lap(self) -> float | None:
        """The pace since the last lap; None where no step was counted."""
        new, seconds = self.new, time.perf_counter() - self.since
        self.restart()
        if new <= 0:
            return None
        self.steps, self.seconds = self.steps + new, self.seconds + seconds
        return new * self.batch_size / seconds

    def mean(self) -> float | None:
        return self.steps * self.batch_size / self.seconds if self.steps else None


def prefetch(iterator: Iterable[Any], size: int = 2) -> Iterator[Any]:
    """The same items, made in a thread, up to `size` of them ahead: the device never waits for the
    gathering and copying of its next batch. An exception there is raised here, in its place."""
    items: queue.Queue = queue.Queue(maxsize=size)
    closed, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in iterator:
                put((item, None))
                if closed.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))
        finally:
            if hasattr(iterator, "close"):  # its own threads and worker processes
                iterator.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        closed.set()
        thread.join(timeout=5)


def _describe(window: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Sums of some steps -> what is logged of them, but for the pace."""
    record = metrics.compute(window, prefix)
    good = window["steps"] - window["bad"] if "steps" in window else 0.0
    record["norm/grads"] = window["norm"] / good if good else float("nan")
    for penalty in sorted(filter(metrics.is_penalty, window)):
        record[f"{prefix}{penalty}"] = window[penalty] / good if good else float("nan")
    record["learning_rate"] = window["rate"]
    record["bad_steps"] = window["bad"]
    return record


@dataclasses.dataclass
class TrainLoop:
    """The steps of a session, and what follows them.

    `train_step(state, batch, key)` gives (state, sums); `batches` are on the devices; `stop` is the
    run's last step; `host` is changed as the loop goes; `began` is the `time.perf_counter()` from
    which the time to the first step counts. `max_bad_steps`: so many in a row stop the run;
    `early_stopping`: so many validations without a better one do; 0 is off. The better one has a
    higher `best_by`, a metric of the validation, or a lower one where `best_mode` is "min".

    Metrics are fetched, and logged, while the next step runs, so that the device never waits for
    Python; only before a validation or a save are they all fetched at once.
    """

    train_step: Callable[[PyTree, Any, Array], tuple[PyTree, dict[str, Array]]]
    batches: Iterator[Any]
    key: Array
    stop: int
    periods: Periods
    host: HostState
    callbacks: Callbacks
    batch_size: int
    began: float
    max_bad_steps: int = 0
    early_stopping: int = 0
    best_by: str = "accuracy"
    best_mode: str = "max"  # or "min"

    def run(self, state: PyTree, start: int) -> TrainOutcome:
        """From step `start` to the last, or until `should_stop` says so.

        Raises `Diverged` after `max_bad_steps` steps in a row whose gradients were not finite.
        """
        # Steps whose metrics were not fetched: (step, sums, whether they end a window of the log).
        self._late: collections.deque[tuple[int, dict[str, Array], bool]] = collections.deque()
        self._pace, self._stopwatch = _Pace(self.batch_size), Stopwatch()
        self._outcome = outcome = TrainOutcome(state, start)
        going = not self.host.stopped
        if self.host.due:  # the last session was stopped during this step's validation
            going = self._follow_step(saving=self._is_time(self.periods.save), validating=True)
        while going and outcome.step < self.stop:
            going = self._take_step()
        outcome.images_per_second = self._pace.mean()
        return outcome

    def _take_step(self) -> bool:
        """One step and what follows it; whether the run goes on."""
        outcome, call = self._outcome, self.callbacks
        outcome.state, sums = self.train_step(outcome.state, next(self.batches), self.key)
        outcome.step += 1
        step, last = outcome.step, outcome.step == self.stop
        self._late.append((step, {**sums, "steps": 1.0}, self._is_time(self.periods.log)))
        if outcome.seconds_to_first_step is None:
            self._time_first_step(sums)
        call.tick(step)
        if len(self._late) > 1:
            self._absorb()
        stopping = call.should_stop(step)
        validating, saving = self._is_time(self.periods.evaluate), self._is_time(self.periods.save)
        if not (validating or saving or stopping):
            return True
        while self._late:
            self._absorb()
        self._pace.lap()
        if stopping and not last:
            # The events of this step must not be lost: the next session starts with them.
            self.host.due = validating and self._looks
            self._save({})
            outcome.preempted = True
            return False
        going = self._follow_step(saving, validating)
        self._pace.restart()
        return going

    def _follow_step(self, saving: bool, validating: bool) -> bool:
        """The validation and the checkpoint of a step; whether the run goes on."""
        found: dict[str, float] = {}
        host, outcome, call = self.host, self._outcome, self.callbacks
        host.due = validating and self._looks
        if host.due:
            try:
                if call.refresh is not None:
                    outcome.state = call.refresh(outcome.state)
                if call.evaluate is not None:
                    found, better = self._validate()
                    saving = saving or better or host.stopped
            except Interrupted:
                self._save({})
                outcome.preempted = True
                return False
            host.due = False
        if host.stopped and host.window:
            self._log(outcome.step)
        if saving:
            self._save(found)
        return not host.stopped

    def _validate(self) -> tuple[dict[str, float], bool]:
        """(metrics, whether this is the best so far). Raises `Interrupted`."""
        host, outcome, call = self.host, self._outcome, self.callbacks
        found = call.evaluate(outcome.state)
        record = {f"validation/{name}": value for name, value in found.items()}
        call.write(outcome.step, record)
        metrics.check_best_by(self.best_by, found)
        value, lowest = found[self.best_by], self.best_mode == "min"
        is_better = host.best is None or (value < host.best if lowest else value > host.best)
        better = math.isfinite(value) and is_better
        host.best, host.wait = (value, 0) if better else (host.best, host.wait + 1)
        host.stopped = bool(self.early_stopping and host.wait >= self.early_stopping)
        if call.on_validation is not None:
            outcome.state = call.on_validation(outcome.state, value if lowest else 1.0 - value)
        return record, better

    def _absorb(self) -> None:
        """Waits for the oldest step whose metrics were not fetched; logs the window it ends."""
        host = self.host
        step, sums, logging = self._late.popleft()
        values = jax.device_get(sums)
        self._pace.new += 1
        rate = float(values.pop("rate"))
        host.window = metrics.add_sums(host.window, values) | {"rate": rate}
        bad = int(values["bad"])
        host.bad_steps += bad
        host.bad_in_a_row = host.bad_in_a_row + 1 if bad else 0
        if self.callbacks.on_step is not None:
            self.callbacks.on_step(step, _describe(metrics.add_sums({}, values) | {"rate": rate}))
        if self.max_bad_steps and host.bad_in_a_row >= self.max_bad_steps:
            raise Diverged(
                f"step {step}: the gradients of {host.bad_in_a_row} steps in a row were not "
                f"finite, and nothing of them was kept. Lower schedule.learning_rate ({rate:g} "
                "now), warm up longer, or set optimizer.clip_norm, in another --workdir"
            )
        if logging:
            self._log(step)

    def _log(self, step: int) -> None:
        """Writes the window that ends with this step, and begins another."""
        window, self.host.window = self.host.window, {}
        record = _describe(window, "train/")
        if (images_per_second := self._pace.lap()) is not None:
            record["images_per_second"] = images_per_second
        self.callbacks.write(step, record)

    def _save(self, found: dict[str, float]) -> None:
        outcome = self._outcome
        self.host.seconds += self._stopwatch.lap()
        self.callbacks.save(outcome.step, outcome.state, dataclasses.asdict(self.host), found)

    def _time_first_step(self, sums: dict[str, Array]) -> None:
        outcome = self._outcome
        jax.block_until_ready(sums)
        outcome.seconds_to_first_step = time.perf_counter() - self.began
        self.callbacks.write(outcome.step, {"time/first_step": outcome.seconds_to_first_step})
        self._pace.restart(-1)  # compiling does not count

    def _is_time(self, period: int) -> bool:
        """Whether something with that period is due at this step; it always is at the last."""
        step = self._outcome.step
        return step == self.stop or bool(period and step % period == 0)

    @property
    def _looks(self) -> bool:
        """Whether anything is done at a validation."""
        return self.callbacks.evaluate is not None or self.callbacks.refresh is not None
