"""`train --profile`: the same run, bit for bit, with a trace and a summary of some steps."""

from __future__ import annotations

import gzip
import json
import types

import chex
import jax
import pytest

from flax_cnns import run
from flax_cnns.analysis.trace_summary import read_trace
from flax_cnns.errors import UserError
from flax_cnns.runs import profile
from flax_cnns.runtime.preemption import Preempted, Signals
from flax_cnns.train import profiler
from flax_cnns.train.profiler import StepProfiler, StepTimes, StepWindow, parse_window
from tests.tiny_runs import arrays, records


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("100", "--profile: expected FIRST:LAST, two steps of the run such as 100:110, got '100'"),
        ("a:b", "got 'a:b'"),
        ("-1:3", "got '-1:3'"),
        ("110:100", "--profile=110:100: the last step comes before the first; write"
         " --profile=100:110"),
        ("0:3", "--profile=0:3: a run's first step has number 1"),
    ],
)  # fmt: skip
def test_a_window_that_is_none(text, said):
    with pytest.raises(UserError) as raised:
        parse_window(text)
    assert said in str(raised.value)


def test_a_profiled_run_is_the_same_run(config, finished, tmp_path, capsys, monkeypatch):
    whole, _ = finished
    workdir = tmp_path / "run"
    monkeypatch.setattr("flax_cnns.analysis.plots.curves.draw_curves", lambda *_, **__: None)
    # Interrupted in the window, which then has no profile.
    stops = [5]
    monkeypatch.setattr(Signals, "should_stop", lambda self, step: step in stops)
    with pytest.raises(Preempted):
        run(config, workdir, profile="4:7")
    assert list((workdir / "profile").rglob("*")) == [workdir / "profile" / "4-7"]
    stops.clear()
    # The same command profiles what is left.
    run(config, workdir, profile="4:7")
    assert "profile: only steps 6 to 7, because the run was interrupted" in capsys.readouterr().out
    assert records(workdir) == records(whole)
    chex.assert_trees_all_equal(arrays(workdir), arrays(whole))

    folder = workdir / "profile" / "4-7"
    summary = (folder / "summary.txt").read_text()
    assert summary.startswith("Steps 6 to 7, process 0 of 1: 4 x cpu (cpu)\n")
    trace = read_trace(folder / "plugins" / "profile" / "steps" / "host0.xplane.pb")
    assert trace.devices == 4
    assert trace.by_program()[0].name == "jit_train_step"
    assert trace.by_kind()[0].name in summary
    with gzip.open(folder / "plugins" / "profile" / "steps" / "host0.perfetto.json.gz") as file:
        events = json.load(file)["traceEvents"]
    marked = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert marked == ["6", "7"]

    with pytest.raises(UserError, match=r"is complete, and no step is left to profile"):
        run(config, workdir, profile="3:4")


def test_what_a_repeated_command_does(tmp_path):
    said = []

    def make(start, window=StepWindow(10, 20), total=30):  # noqa: B008
        said.clear()
        profile.check_window(window, total)
        return profile.make_profiler(
            window, tmp_path, start=start, total_steps=total, say=said.append
        )

    with pytest.raises(UserError, match=r"--profile=10:20: the run has only 19 steps"):
        make(0, total=19)
    with pytest.raises(UserError, match=r"already at step 30; no step is left to profile"):
        make(30)
    with pytest.raises(UserError, match=r"already at step 12; choose steps from 13 to 30"):
        make(12)
    assert make(0).window == (10, 20)  # asked for: from here on nothing is refused
    assert make(9).window == (10, 20)
    assert make(12).window == (13, 20)
    profile.check_complete(StepWindow(10, 20), tmp_path)
    assert make(20) is None
    assert said == ["profile: none, because the run was interrupted in the steps 10:20"]
    (tmp_path / "profile" / "10-20" / "summary.txt").touch()
    assert make(12) is None
    assert said == [f"profile: steps 10:20 are already in {tmp_path}/profile/10-20"]


def test_the_parts_of_a_step(tmp_path, monkeypatch):
    """The clock is replaced: each part of a step takes a time that the table must show."""
    clock = iter([0.0, 0.01, 0.03, 0.13, 0.15, 1.0, 1.03, 1.05, 1.15, 1.17])
    fake = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(profiler, "time", fake)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    ended = []
    steps = StepProfiler(StepWindow(3, 4), tmp_path / "trace", ended.append)
    steps.start(before=0.12)
    for step in (3, 4):
        assert steps.covers(step)
        steps.begin_step(step)
        for part in ("input", "dispatch", "compute"):
            steps.mark(part)
        steps.end_step()
    steps.close()  # nothing is left to do
    (times,) = ended
    assert times.totals() == pytest.approx([0.15, 0.17])
    lines = profile.describe_times(times)
    assert [line.split()[:4] for line in lines[1:6]] == [
        ["input", "20.00", "30.00", "12.5%"],
        ["dispatch", "20.00", "20.00", "12.5%"],
        ["compute", "100.00", "100.00", "62.5%"],
        ["host", "20.00", "20.00", "12.5%"],
        ["step", "160.00", "170.00", "100.0%"],
    ]
    assert lines[-1] == "Without the profiler, the steps before took 120.0 ms each."
    assert "Without" not in profile.describe_times(StepTimes(*times[:2], None))[-1]


def test_a_loop_that_ends_in_the_window_leaves_nothing(tmp_path):
    for _ in range(2):  # the second start fails if the first trace still runs
        steps = StepProfiler(StepWindow(3, 4), tmp_path / "trace", pytest.fail)
        steps.start(before=None)
        steps.begin_step(3)
        steps.close()
        assert not (tmp_path / "trace").exists()
    (tmp_path / "trace").mkdir()
    StepProfiler(StepWindow(3, 4), tmp_path / "trace", pytest.fail).close()  # before the window
    assert not (tmp_path / "trace").exists()
