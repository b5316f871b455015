from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest

from flax_cnns.errors import Diverged, UserError
from flax_cnns.train import loop
from flax_cnns.train.loop import prefetch


def test_prefetch_gives_the_same_items_and_works_ahead():
    made = []

    def items():
        for i in range(5):
            made.append(i)
            yield i

    ahead = prefetch(items(), size=2)
    assert next(ahead) == 0
    deadline = time.time() + 5
    while len(made) < 3 and time.time() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3
    assert list(ahead) == [1, 2, 3, 4]


def test_prefetch_raises_what_the_iterator_raised_in_its_place():
    def items():
        yield 1
        raise OSError("cat.jpg is truncated")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match=r"cat\.jpg is truncated"):
        next(ahead)


def test_prefetch_leaves_no_thread_behind():
    def endless():
        while True:
            yield 0

    before = threading.active_count()
    ahead = prefetch(endless())
    next(ahead)
    ahead.close()
    assert threading.active_count() == before


class Device:
    """A training step whose metrics record when they are fetched.

    `events` holds, in order, +step for each dispatched step and -step for fetched metrics."""

    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr(loop.jax, "device_get", self.fetch)
        monkeypatch.setattr(loop.jax, "block_until_ready", lambda sums: None)

    def step(self, state, batch, key):
        self.events.append(state + 1)
        sums = dict(loss=0.0, correct=0.0, bad=0.0, norm=0.0, rate=0.1)
        return state + 1, {"number": state + 1, "count": 2.0} | sums

    def fetch(self, sums):
        self.events.append(-sums["number"])
        return dict(sums)

    def evaluate(self, state):
        self.events.append("validation")
        return {"loss": 0.0, "accuracy": 0.5}

    def train(self, *, stop, log=0, validate=0, save_every=0, **changes):
        """Returns (outcome, written records)."""
        written = []
        callbacks = dict(
            save=lambda step, state, host, metrics: self.events.append(f"save {step}"),
            write=lambda step, record: written.append((step, record)),
            tick=lambda step: None,
            should_stop=lambda step: False,
            evaluate=self.evaluate,
        )
        names = {field.name for field in dataclasses.fields(loop.Callbacks)} & changes.keys()
        callbacks |= {name: changes.pop(name) for name in names}
        fields = dict(
            train_step=self.step,
            batches=itertools.repeat("batch"),
            key=None,
            stop=stop,
            periods=loop.Periods(log, validate, save_every),
            host=loop.HostState(),
            callbacks=loop.Callbacks(**callbacks),
            batch_size=2,
            began=time.perf_counter(),
        )
        start = changes.pop("start", 0)
        return loop.TrainLoop(**fields | changes).run(start, start), written


def test_metrics_are_waited_for_while_the_next_step_runs(monkeypatch):
    device = Device(monkeypatch)
    _, written = device.train(stop=6, log=2, save_every=4)
    ends = ["validation", "save 6"]
    assert device.events == [1, 2, -1, 3, -2, 4, -3, -4, "save 4", 5, 6, -5, -6, *ends]
    assert [step for step, record in written if "train/loss" in record] == [2, 4, 6]


def test_the_time_to_the_first_step_is_written_at_once(monkeypatch):
    began = time.perf_counter() - 100
    outcome, written = Device(monkeypatch).train(stop=3, began=began)
    assert written[0] == (1, {"time/first_step": outcome.seconds_to_first_step})
    assert 100 < outcome.seconds_to_first_step < 110
    assert sum("time/first_step" in record for _, record in written) == 1


def test_images_per_second_leave_out_compiling_validations_and_saves(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    device = Device(monkeypatch)

    fetch, ready = device.fetch, [0.0]

    def step(state, batch, key):  # dispatched at once, ready a second after the previous one
        ready.append(max(clock[0], ready[-1]) + 1.0)
        return device.step(state, batch, key)

    def wait(sums):
        clock[0] = max(clock[0], ready[sums["number"]])
        return fetch(sums)

    def first(sums):
        clock[0] += 100.0

    def validate(state):
        clock[0] += 50.0
        return {"loss": 0.0, "accuracy": 0.5}

    monkeypatch.setattr(loop.jax, "device_get", wait)
    monkeypatch.setattr(loop.jax, "block_until_ready", first)
    found, written = device.train(stop=8, log=3, validate=4, train_step=step, evaluate=validate)
    logged = [(s, r.get("images_per_second")) for s, r in written if "train/loss" in r]
    assert logged == [(3, 2.0), (6, 2.0), (8, 2.0)]  # two images per second
    assert found.images_per_second == 2.0


def test_the_compilation_of_a_shorter_last_call_is_no_part_of_the_speed(monkeypatch):
    clock, ready, device = [0.0], [0.0], Device(monkeypatch)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])

    def step(state, batch, key):
        n = min(4, 10 - state)
        if n < 4:
            clock[0] += 100.0
        ready.append(max(clock[0], ready[-1]) + n)
        names = ("loss", "correct", "bad", "norm", "rate", "count")
        sums = {name: np.zeros(n) for name in names}
        return state + n, sums | {"ready": np.full(n, ready[-1])}

    def wait(sums):
        clock[0] = max(clock[0], sums["ready"][0])
        return sums

    monkeypatch.setattr(loop.jax, "device_get", wait)
    monkeypatch.setattr(loop.jax, "block_until_ready", wait)
    found, _ = device.train(stop=10, train_step=step, steps_per_call=4)
    assert found.images_per_second == 2.0  # a step takes a second


def test_a_step_that_logs_and_stops_is_saved_whole(monkeypatch):
    device, host = Device(monkeypatch), loop.HostState()
    outcome, written = device.train(
        stop=9, log=2, validate=4, host=host, should_stop=lambda step: step == 4
    )
    assert (outcome.preempted, outcome.step, host.due, host.window) == (True, 4, True, {})
    assert device.events[-3:] == [-3, -4, "save 4"]
    assert [step for step, record in written if "train/loss" in record] == [2, 4]


def test_statistics_are_refreshed_before_each_validation_and_at_the_end(monkeypatch):
    device, host = Device(monkeypatch), loop.HostState()

    def refresh(state):
        device.events.append("refresh")
        return state + 0.5

    def shown(**changes):
        device.events.clear()
        outcome, _ = device.train(stop=4, validate=2, refresh=refresh, host=host, **changes)
        return outcome, [event for event in device.events if isinstance(event, str)]

    outcome, events = shown()
    assert events == ["refresh", "validation", "save 2", "refresh", "validation", "save 4"]
    assert outcome.state == 5.0  # four steps, and 0.5 added by each refresh
    assert shown(evaluate=None)[1] == ["refresh", "refresh", "save 4"]
    outcome, events = shown(should_stop=lambda step: step == 2)  # the next session validates
    assert (outcome.preempted, host.due, events) == (True, True, ["save 2"])

    def interrupted(state):
        raise loop.Interrupted

    host = loop.HostState()
    outcome, _ = device.train(stop=4, validate=2, refresh=interrupted, host=host)
    assert (outcome.preempted, outcome.state, host.due) == (True, 2, True)


def test_a_validation_that_was_interrupted_is_made_up_for_and_its_outcome_saved(monkeypatch):
    """This holds even at the last step and without a new best value, because the validation may
    have changed the state."""
    device, host = Device(monkeypatch), loop.HostState(best=0.9)

    def interrupted(state):
        raise loop.Interrupted

    outcome, _ = device.train(stop=2, host=host, evaluate=interrupted)
    assert (outcome.preempted, outcome.step, host.due) == (True, 2, True)
    device.events.clear()
    lowered = lambda state, error: state + error  # noqa: E731
    outcome, written = device.train(stop=2, start=2, host=host, on_validation=lowered)
    assert device.events == ["validation", "save 2"]
    assert (outcome.preempted, outcome.state, host.due) == (False, 2.5, False)
    assert written == [(2, {"validation/loss": 0.0, "validation/accuracy": 0.5})]


def test_a_penalty_is_logged_as_its_mean_over_the_good_steps(monkeypatch):
    device = Device(monkeypatch)

    def step(state, batch, key):
        state, sums = device.step(state, batch, key)
        return state, sums | {"l2": 3.0 * (state != 2), "bad": float(state == 2)}

    _, written = device.train(stop=6, log=3, train_step=step)
    assert [(s, r["train/l2"]) for s, r in written if "train/l2" in r] == [(3, 3.0), (6, 3.0)]
    _, written = device.train(stop=3)
    assert not any("train/l2" in record for _, record in written)


def test_bad_steps_in_a_row_stop_the_run(monkeypatch):
    device = Device(monkeypatch)

    def step(state, batch, key):
        state, sums = device.step(state, batch, key)
        return state, sums | {"bad": 1.0}

    with pytest.raises(Diverged, match=r"step 3: .* of 3 steps in a row"):
        device.train(stop=9, train_step=step, max_bad_steps=3)
    assert max(device.events) == 4  # one more step was dispatched


def validations(device, values, **fields):
    """Returns (host state, errors that the plateau saw, steps with a checkpoint)."""
    host, errors, given = loop.HostState(), [], iter(values)

    def observe(state, error):
        errors.append(error)
        return state

    device.train(
        stop=len(values),
        validate=1,
        host=host,
        evaluate=lambda state: {"loss": next(given), "accuracy": 0.5},
        on_validation=observe,
        **fields,
    )
    saved = [event for event in device.events if isinstance(event, str)]
    return host, errors, [int(event.split()[1]) for event in saved]


def test_the_best_is_chosen_by_another_metric(monkeypatch):
    values = [0.7, 0.4, float("nan"), 0.5, 0.6, 0.1]
    least = dict(best_by="loss", best_mode="min", early_stopping=3)
    host, errors, saved = validations(Device(monkeypatch), values, **least)
    assert (host.best, host.wait, host.stopped) == (0.4, 3, True)
    assert saved == [1, 2, 5]
    assert errors[:2] == [0.7, 0.4]
    host, errors, saved = validations(Device(monkeypatch), values, best_by="loss")
    assert (host.best, host.wait, saved) == (0.7, 5, [1, 6])
    assert errors[1] == 1.0 - 0.4


def test_a_metric_that_no_validation_has(monkeypatch):
    with pytest.raises(
        UserError, match=r"no metric 'f1'.*validation/NAME, where NAME is one of loss, accuracy"
    ):
        validations(Device(monkeypatch), [0.5], best_by="f1")


def test_numbers_of_each_step_are_handed_out_once_they_are_fetched(monkeypatch):
    device, seen = Device(monkeypatch), []

    def step(state, batch, key):
        state, sums = device.step(state, batch, key)
        own = {"metric/recall/sum": np.array([1.0, state]), "metric/recall/count": np.ones(2)}
        return state, sums | own | {"loss": 4.0 * state, "l2": 0.5, "bad": float(state == 3)}

    def note(step, numbers):
        device.events.append(f"step {step}")
        seen.append(numbers)

    host = loop.HostState()
    _, written = device.train(stop=3, log=2, train_step=step, on_step=note, host=host)
    assert device.events[:4] == [1, 2, -1, "step 1"]
    first = seen[0]
    assert {type(value) for value in first.values()} == {float}
    chosen = ("loss", "recall", "l2", "learning_rate", "bad_steps")
    assert [first[name] for name in chosen] == [2.0, 1.0, 0.5, 0.1, 0.0]
    assert seen[2]["bad_steps"] == 1
    log = next(record for _, record in written if "train/recall" in record)
    assert (log["train/recall"], log["train/loss"]) == (1.25, 3.0)


def test_a_window_with_ratios_goes_on_from_its_json(monkeypatch):
    device = Device(monkeypatch)

    def step(state, batch, key):
        state, sums = device.step(state, batch, key)
        counts = {"metric/m/sum": np.array([1.0, 0.0]), "metric/m/count": np.array([4.0, 0.0])}
        return state, sums | counts

    host, fields = loop.HostState(), dict(log=4, train_step=step)
    device.train(stop=9, host=host, should_stop=lambda step: step == 2, **fields)
    again = loop.HostState(**json.loads(json.dumps(dataclasses.asdict(host))))
    assert again == host
    assert again.window["metric/m/sum"] == [2.0, 0.0]
    _, written = device.train(stop=4, start=2, host=again, **fields)
    assert [record["train/m"] for _, record in written if "train/m" in record] == [0.25]
