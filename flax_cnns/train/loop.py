"""The training loop: take steps, log, validate, save. Independent of networks and data sets."""

from __future__ import annotations

import collections
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from flax_cnns.errors import Diverged, Interrupted
from flax_cnns.train import metrics
from flax_cnns.train.pace import Pace, Stopwatch
from flax_cnns.train.profiler import StepProfiler
from flax_cnns.train.step_calls import split_sums
from flax_cnns.types import Array, PyTree


@dataclasses.dataclass
class HostState:
    """The state of a run outside its arrays, saved as JSON with every checkpoint.

    From it, a resumed run continues the current window of the log and the count of early stopping.
    """

    # Sums since the last log; a list [M] for a metric that is a mean of M ratios.
    window: dict[str, float | list[float]] = dataclasses.field(default_factory=dict)
    bad_in_a_row: int = 0
    bad_steps: int = 0
    best: float | None = None  # best value of the validation metric `TrainLoop.best_by`
    wait: int = 0  # validations since the best
    due: bool = False  # whether the validation of this step has yet to run
    stopped: bool = False  # whether early stopping ended the run
    seconds: float = 0.0  # of training, over all sessions


@dataclasses.dataclass(frozen=True)
class Periods:
    """Periods in steps. 0 means never; the last step always logs, validates and saves."""

    log: int
    evaluate: int
    save: int


@dataclasses.dataclass
class TrainOutcome:
    """The result of a session: its last state and step, why it ended, and how fast it was."""

    state: PyTree
    step: int
    preempted: bool = False
    seconds_to_first_step: float | None = None
    images_per_second: float | None = None  # without compiling, evaluating and saving


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """Functions that the loop calls; those with a default may be None.

    Every process calls all of them, except `on_step`, which is None on all but the primary process.

    - `save(step, state, host, metrics)` saves a checkpoint; `host` can be written as JSON.
    - `write(step, record)` writes one record of the log.
    - `tick(step)` is called after every call of the training step.
    - `should_stop(step)` is called after every call, and returns whether the session must end.
    - `evaluate(state)` returns {"loss", "accuracy", ...} of the validation split, or raises
      `Interrupted`.
    - `on_validation(state, error)` may change the state (the plateau schedule).
    - `refresh(state)` may change the state before each validation (precise_bn). It is called even
      if there is no validation split.
    - `on_step(step, metrics)` gets the metrics of each single step as floats, while the next step
      runs. The names are those of the log without "train/". If the step was rejected, "bad_steps"
      is 1 and the means are NaN.
    """

    save: Callable[[int, PyTree, dict[str, Any], dict[str, float]], None]
    write: Callable[[int, dict[str, float]], None]
    tick: Callable[[int], None]
    should_stop: Callable[[int], bool]
    evaluate: Callable[[PyTree], dict[str, float]] | None = None
    on_validation: Callable[[PyTree, float], PyTree] | None = None
    refresh: Callable[[PyTree], PyTree] | None = None
    on_step: Callable[[int, dict[str, float]], None] | None = None


def prefetch(iterator: Iterable[Any], size: int = 2) -> Generator[Any]:
    """Yields the items of `iterator`, produced in a thread up to `size` items ahead.

    So the device does not wait while its next batch is gathered and copied. An exception of the
    iterator is raised here, after the items that came before it.
    """
    items: queue.Queue = queue.Queue(maxsize=size)
    closed, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in iterator:
                put((item, None))
                if closed.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))
        finally:
            if hasattr(iterator, "close"):  # ends the iterator's threads and worker processes
                iterator.close()

    thread = threading.Thread(target=produce, daemon=True)
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
    """Returns the metrics to log for the summed steps of `window`, without images_per_second."""
    record = metrics.compute(window, prefix)
    good = window["steps"] - window["bad"] if "steps" in window else 0.0
    record["norm/grads"] = window["norm"] / good if good else float("nan")
    for penalty in sorted(filter(metrics.is_penalty, window)):
        record[f"{prefix}{penalty}"] = window[penalty] / good if good else float("nan")
    record["learning_rate"] = window["rate"]
    record["bad_steps"] = window["bad"]
    return record


class _Call(NamedTuple):
    """A call of the training step whose metrics are not fetched yet."""

    step: int  # the last
    n: int  # its number of steps
    sums: dict[str, Any]  # on the devices
    logging: bool  # whether it ends a window of the log


@dataclasses.dataclass
class TrainLoop:
    """The training loop of one session.

    - `train_step(state, batch, key)` returns (state, sums): of one step, or of up to
      `steps_per_call` steps, [steps ...]. Everything else happens between two calls.
    - `batches` are already on the devices.
    - `stop` is the run's last step.
    - `host` is updated while the loop runs.
    - `began` is the `time.perf_counter()` from which the time to the first step is measured.
    - `max_bad_steps` bad steps in a row stop the run; 0: never.
    - `early_stopping` validations without a new best one stop the run; 0: never.
    - `profiler` profiles some steps, see `StepProfiler`; None for none.
    - `best_by` names the validation metric that decides which validation is best: the one with the
      highest value, or with the lowest if `best_mode` is "min".

    The metrics of a step are fetched and logged while the next step runs, so that the device never
    waits for Python. Before a validation or a save, all pending metrics are fetched.
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
    steps_per_call: int = 1
    profiler: StepProfiler | None = None

    def run(self, state: PyTree, start: int) -> TrainOutcome:
        """Runs from step `start` to the last step, or until `should_stop` returns True.

        Raises `Diverged` after `max_bad_steps` bad steps in a row.
        """
        self._late: collections.deque[_Call] = collections.deque()
        self._pace, self._stopwatch = Pace(self.batch_size), Stopwatch()
        self._outcome = outcome = TrainOutcome(state, start)
        continues = not self.host.stopped
        if self.host.due:  # the last session was interrupted in this step's validation
            continues = self._follow_step(saving=self._is_time(self.periods.save), validating=True)
        try:
            while continues and outcome.step < self.stop:
                continues = self._take_step()
        finally:
            if self.profiler is not None:
                self.profiler.close()
        outcome.images_per_second = self._pace.mean()
        return outcome

    def _take_step(self) -> bool:
        """Takes the steps of a call, validates and saves if due. Returns whether to go on."""
        outcome, call = self._outcome, self.callbacks
        n = min(self.steps_per_call, self.stop - outcome.step)
        # A shorter call is compiled again, which is not the speed of the run.
        compiles = n < self.steps_per_call and outcome.seconds_to_first_step is not None
        if compiles:
            self._finish_lap()
        profiler = self._begin_profiling(outcome.step + 1)
        batch = next(self.batches)
        if profiler is not None:
            profiler.mark("input")
        outcome.state, sums = self.train_step(outcome.state, batch, self.key)
        if profiler is not None:
            profiler.mark("dispatch")
            jax.block_until_ready((outcome.state, sums))
            profiler.mark("compute")
        outcome.step += n
        step, last = outcome.step, outcome.step == self.stop
        self._late.append(_Call(step, n, sums, self._is_time(self.periods.log)))
        if compiles or outcome.seconds_to_first_step is None:
            self._await_compiled(sums, n)
        call.tick(step)
        if len(self._late) > 1:
            self._absorb()
        stopping = call.should_stop(step)
        if profiler is not None:
            profiler.end_step()
            self._pace.restart(-sum(late.n for late in self._late))  # profiled steps do not count
        validating, saving = self._is_time(self.periods.evaluate), self._is_time(self.periods.save)
        if not (validating or saving or stopping):
            return True
        self._finish_lap()
        if stopping and not last:
            # The next session starts with the validation that is due at this step.
            self.host.due = validating and self._has_validation
            self._save({})
            outcome.preempted = True
            return False
        continues = self._follow_step(saving, validating)
        self._pace.restart()
        return continues

    def _begin_profiling(self, step: int) -> StepProfiler | None:
        """Begins to profile a step. Returns None if the step is not in the profiler's window."""
        if self.profiler is None or not self.profiler.covers(step):
            return None
        if step == self.profiler.window.first:
            self._finish_lap()
            speed = self._pace.mean()
            self.profiler.start(self.batch_size / speed if speed else None)
        self.profiler.begin_step(step)
        return self.profiler

    def _follow_step(self, saving: bool, validating: bool) -> bool:
        """Validates and saves after a step. Returns whether the run continues."""
        record: dict[str, float] = {}
        host, outcome, call = self.host, self._outcome, self.callbacks
        host.due = validating and self._has_validation
        if host.due:
            try:
                if call.refresh is not None:
                    outcome.state = call.refresh(outcome.state)
                if call.evaluate is not None:
                    record, better = self._validate(call.evaluate)
                    saving = saving or better or host.stopped
            except Interrupted:
                self._save({})
                outcome.preempted = True
                return False
            host.due = False
        if host.stopped and host.window:
            self._log(outcome.step)
        if saving:
            self._save(record)
        return not host.stopped

    def _validate(
        self, evaluate: Callable[[PyTree], dict[str, float]]
    ) -> tuple[dict[str, float], bool]:
        """Returns (metrics, whether this validation is the best so far). Raises `Interrupted`."""
        host, outcome, call = self.host, self._outcome, self.callbacks
        results = evaluate(outcome.state)
        record = {f"validation/{name}": value for name, value in results.items()}
        call.write(outcome.step, record)
        metrics.check_best_by(self.best_by, results)
        value, lowest = results[self.best_by], self.best_mode == "min"
        is_better = host.best is None or (value < host.best if lowest else value > host.best)
        better = math.isfinite(value) and is_better
        host.best, host.wait = (value, 0) if better else (host.best, host.wait + 1)
        host.stopped = bool(self.early_stopping and host.wait >= self.early_stopping)
        if call.on_validation is not None:
            outcome.state = call.on_validation(outcome.state, value if lowest else 1.0 - value)
        return record, better

    def _absorb(self) -> None:
        """Fetches the metrics of the oldest pending call. If it ends a window, logs it."""
        late = self._late.popleft()
        each = split_sums(late.sums, late.n, self.steps_per_call)
        self._pace.new += late.n
        for step, values in enumerate(each, late.step - late.n + 1):
            self._add_step(step, values)
        if late.logging:
            self._log(late.step)

    def _finish_lap(self) -> None:
        while self._late:
            self._absorb()
        self._pace.lap()

    def _add_step(self, step: int, values: dict[str, Any]) -> None:
        """Adds the sums of a step to the window. Raises `Diverged`."""
        host = self.host
        rate = float(values.pop("rate"))
        values["steps"] = 1.0
        host.window = metrics.add_sums(host.window, values) | {"rate": rate}
        bad = int(values["bad"])
        host.bad_steps += bad
        host.bad_in_a_row = host.bad_in_a_row + 1 if bad else 0
        if self.callbacks.on_step is not None:
            self.callbacks.on_step(step, _describe(metrics.add_sums({}, values) | {"rate": rate}))
        if self.max_bad_steps and host.bad_in_a_row >= self.max_bad_steps:
            raise Diverged(
                f"step {step}: the gradients, loss or weights of {host.bad_in_a_row} steps in a row"
                " were not finite, and these steps were discarded. Lower schedule.learning_rate"
                f" ({rate:g} now), warm up longer, or set optimizer.clip_norm, in another --workdir"
            )

    def _log(self, step: int) -> None:
        """Logs the window that ends with this step, and starts a new one."""
        window, self.host.window = self.host.window, {}
        record = _describe(window, "train/")
        if (images_per_second := self._pace.lap()) is not None:
            record["images_per_second"] = images_per_second
        self.callbacks.write(step, record)

    def _save(self, record: dict[str, float]) -> None:
        outcome = self._outcome
        self.host.seconds += self._stopwatch.lap()
        self.callbacks.save(outcome.step, outcome.state, dataclasses.asdict(self.host), record)

    def _await_compiled(self, sums: dict[str, Array], n: int) -> None:
        """Waits for a call that was compiled, and leaves its time out of the speed."""
        outcome = self._outcome
        jax.block_until_ready(sums)
        if outcome.seconds_to_first_step is None:
            outcome.seconds_to_first_step = time.perf_counter() - self.began
            self.callbacks.write(outcome.step, {"time/first_step": outcome.seconds_to_first_step})
        self._pace.restart(-n)

    def _is_time(self, period: int) -> bool:
        """Whether an event with this period is due at this step; at the last step it always is."""
        step = self._outcome.step
        return step == self.stop or bool(period and step % period == 0)

    @property
    def _has_validation(self) -> bool:
        """Whether a validation does anything."""
        return self.callbacks.evaluate is not None or self.callbacks.refresh is not None
