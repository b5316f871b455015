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
class Host:
    """What a run knows beside its arrays. Saved with every checkpoint as JSON, so that the log of a
    resumed run goes on in the middle of a window and early stopping counts on."""

    window: dict[str, float] = dataclasses.field(default_factory=dict)  # sums since the last log
    bad_in_a_row: int = 0
    bad_steps: int = 0
    best: float | None = None  # validation accuracy
    wait: int = 0  # validations since the best
    due: bool = False  # the validation of this step is still to be made
    stopped: bool = False  # early
    seconds: float = 0.0  # of training, over all sessions


@dataclasses.dataclass(frozen=True)
class Every:
    """Periods in steps; 0 means never, except that the last step always logs and saves."""

    log: int
    evaluate: int
    save: int


@dataclasses.dataclass
class Outcome:
    state: PyTree
    step: int
    preempted: bool = False
    seconds_to_first_step: float | None = None
    images_per_second: float | None = None  # compiling, evaluating and saving left out


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


def train(
    state: PyTree,
    *,
    train_step: Callable[[PyTree, Any, Array], tuple[PyTree, dict[str, Array]]],
    batches: Iterator[Any],
    key: Array,
    start: int,
    stop: int,
    every: Every,
    host: Host,
    batch_size: int,
    evaluate: Callable[[PyTree], dict[str, float]] | None,
    on_validation: Callable[[PyTree, float], PyTree] | None,
    save: Callable[[int, PyTree, dict, dict[str, float]], None],
    write: Callable[[int, dict[str, float]], None],
    tick: Callable[[int], None],
    should_stop: Callable[[int], bool],
    max_bad_steps: int,
    early_stopping: int,
    began: float,
    refresh: Callable[[PyTree], PyTree] | None = None,
) -> Outcome:
    """From step `start` to `stop`, or until `should_stop(step)` says so (asked once a step).

    `batches` are on the devices; `save(step, state, host, metrics)` gets a JSON-able host;
    `evaluate(state)` gives {"loss", "accuracy", ...} of the validation split; `on_validation(state,
    error)` may change the state (the plateau schedule), and so may `refresh(state)` before each
    validation, be there a validation split or not (precise_bn); `began` is the
    `time.perf_counter()` from which the time to the first step counts.

    Metrics are fetched, and logged, while the next step runs, so that the device never waits for
    Python; only before a validation or a save are they all fetched at once. Raises `Diverged`
    after `max_bad_steps` steps in a row whose gradients were not finite.
    """
    late: collections.deque[tuple[int, dict[str, Array], bool]] = collections.deque()
    outcome, pace = Outcome(state, start), _Pace(batch_size)

    def absorb() -> None:
        """Waits for the oldest step whose metrics were not fetched; logs the window it ends."""
        step, sums, logging = late.popleft()
        values = jax.device_get(sums)
        pace.new += 1
        rate = float(values.pop("rate"))
        host.window = metrics.add(host.window, values) | {"rate": rate}
        bad = int(values["bad"])
        host.bad_steps += bad
        host.bad_in_a_row = host.bad_in_a_row + 1 if bad else 0
        if max_bad_steps and host.bad_in_a_row >= max_bad_steps:
            raise Diverged(
                f"step {step}: the gradients of {host.bad_in_a_row} steps in a row were not "
                f"finite, and nothing of them was kept. Lower schedule.learning_rate ({rate:g} "
                "now), warm up longer, or set optimizer.clip_norm, in another --workdir"
            )
        if logging:
            log(step)

    def log(step: int) -> None:
        window, host.window = host.window, {}
        record = metrics.compute(window, "train/")
        good = window["steps"] - window["bad"] if "steps" in window else 0.0
        record["norm/grads"] = window["norm"] / good if good else float("nan")
        if "l2" in window:
            record["train/l2"] = window["l2"] / good if good else float("nan")
        record["learning_rate"] = window["rate"]
        record["bad_steps"] = window["bad"]
        if (images_per_second := pace.lap()) is not None:
            record["images_per_second"] = images_per_second
        write(step, record)

    def due(validating: bool) -> bool:
        return bool(validating and (evaluate is not None or refresh is not None))

    def validate(step: int, state: PyTree) -> tuple[PyTree, dict[str, float], bool]:
        """(state, metrics, whether this is the best so far). Raises `Interrupted`."""
        found = evaluate(state)
        record = {f"validation/{name}": value for name, value in found.items()}
        write(step, record)
        accuracy = found["accuracy"]
        better = math.isfinite(accuracy) and (host.best is None or accuracy > host.best)
        host.best, host.wait = (accuracy, 0) if better else (host.best, host.wait + 1)
        host.stopped = bool(early_stopping and host.wait >= early_stopping)
        if on_validation is not None:
            state = on_validation(state, 1.0 - accuracy)
        return state, record, better

    def keep(step: int, state: PyTree, found: dict[str, float]) -> None:
        host.seconds += time.perf_counter() - keep.since
        keep.since = time.perf_counter()
        save(step, state, dataclasses.asdict(host), found)

    keep.since = time.perf_counter()

    def after(step: int, state: PyTree, saving: bool, validating: bool) -> tuple[PyTree, bool]:
        """What follows a step: (state, go on?)."""
        found: dict[str, float] = {}
        host.due = due(validating)
        if host.due:
            try:
                if refresh is not None:
                    state = refresh(state)
                if evaluate is not None:
                    state, found, better = validate(step, state)
                    saving = saving or better or host.stopped
            except Interrupted:
                keep(step, state, {})
                outcome.preempted = True
                return state, False
            host.due = False
        if host.stopped and host.window:
            log(step)
        if saving:
            keep(step, state, found)
        return state, not host.stopped

    step = start
    going = not host.stopped
    if host.due:  # the last session was stopped during this step's validation
        saving = step == stop or bool(every.save and step % every.save == 0)
        state, going = after(step, state, saving, validating=True)
    while going and step < stop:
        state, sums = train_step(state, next(batches), key)
        step += 1
        last = step == stop
        logging = last or bool(every.log and step % every.log == 0)
        late.append((step, {**sums, "steps": 1.0}, logging))
        if outcome.seconds_to_first_step is None:
            jax.block_until_ready(sums)
            outcome.seconds_to_first_step = time.perf_counter() - began
            write(step, {"time/first_step": outcome.seconds_to_first_step})
            pace.restart(-1)  # compiling does not count
        tick(step)
        if len(late) > 1:
            absorb()
        stopping = should_stop(step)
        validating = last or (every.evaluate and step % every.evaluate == 0)
        saving = last or bool(every.save and step % every.save == 0)
        if not (validating or saving or stopping):
            continue
        while late:
            absorb()
        pace.lap()
        if stopping and not last:
            # The events of this step must not be lost: the next session starts with them.
            host.due = due(validating)
            keep(step, state, {})
            outcome.preempted = True
            break
        state, going = after(step, state, saving, validating)
        pace.restart()
    outcome.state, outcome.step = state, step
    outcome.images_per_second = pace.mean()
    return outcome
