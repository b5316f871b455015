"""Shows the progress of a search: a bar, the ETA, and a line for each trial that ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import progress as bars
from rich.console import Console

from flax_cnns.config.spaces import format_values
from flax_cnns.runs.metric import FRACTION_METRICS
from flax_cnns.studies.scheduler import RunningJob
from flax_cnns.studies.search.tuning.records import TrialRecord, find_best
from flax_cnns.studies.search.tuning.study import Study
from flax_cnns.studies.search.tuning.trials import Allotment
from flax_cnns.train.progress import format_duration


class TuningBoard:
    """A bar on a terminal, and a line for each trial that ends."""

    def __init__(self, study: Study, allotment: Allotment, jobs: int, console: Console):
        self.study, self.allotment, self.jobs, self.console = study, allotment, jobs, console
        self.seconds: list[tuple[float, int]] = []  # of runs that ended here, with their steps
        self.has_forecast = False
        self.bar = bars.Progress(
            bars.TextColumn("{task.completed:.0f} trials"),
            bars.BarColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[eta]}  {task.fields[running]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> TuningBoard:
        self.bar.start()
        self.task = self.bar.add_task("", total=self.allotment.trials, eta="", running="")
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def print_plan(self, records: Sequence[TrialRecord]) -> None:
        """Prints what will run."""
        limits = []
        if self.allotment.trials is not None:
            limits.append(f"{self.allotment.trials} trials")
        if self.allotment.budget_steps is not None:
            limits.append(f"{self.allotment.budget_steps:,} steps in all")
        ended = sum(record.state != "running" for record in records)
        self.print(
            f"{' or '.join(limits)} of {len(self.study.space)}"
            f" {'field' if len(self.study.space) == 1 else 'fields'}; {self.study.facts['steps']:,}"
            f" steps a trial; sampler {self.study.facts['sampler']}, pruner"
            f" {self.study.facts['pruner']}; {self.jobs} at once"
            + (f"; {ended} trials are done" if ended else "")
        )

    def update(self, records: Sequence[TrialRecord], running: Sequence[RunningJob]) -> str:
        """Updates the bar. Returns the ETA. Prints the first one."""
        ended = sum(record.state != "running" for record in records)
        remaining = self._estimate(records, running)
        eta = f"ETA {format_duration(remaining)}" if remaining else ""
        names = "; ".join(job.job.name for job in running)
        self.bar.update(self.task, completed=ended, eta=eta, running=names)
        if eta and not self.has_forecast:
            self.has_forecast = True
            self.print(f"about {format_duration(remaining)} for all trials")
        return eta

    def _estimate(self, records: Sequence[TrialRecord], running: Sequence[RunningJob]) -> float:
        """Returns the seconds that are left; 0 if they are not known yet."""
        planned = self.study.facts["steps"]
        steps = {job.job.name: job.job.read_step() for job in running}
        seconds = self.seconds or [each for each in map(_forecast_run, running) if each]
        if not seconds:
            return 0.0
        per_step = sum(took for took, _ in seconds) / sum(done for _, done in seconds)
        left = sum(max(0, job.job.last_step - steps[job.job.name]) for job in running)
        ended = [record.steps for record in records if record.state != "running"]
        mean = sum(ended) / len(ended) if ended else planned
        waits = [float("inf")]
        if self.allotment.trials is not None:
            waits.append(max(0, self.allotment.trials - len(records)) * mean)
        if self.allotment.budget_steps is not None:
            waits.append(max(0, self.allotment.budget_steps - sum(ended) - left))
        return per_step * (left + min(waits)) / self.jobs

    def report_end(
        self, trial: TrialRecord, seconds: float, records: Sequence[TrialRecord], eta: str
    ) -> None:
        """Prints how a trial ended."""
        if seconds and trial.steps:
            self.seconds.append((seconds, trial.steps))
        ended = sum(record.state != "running" for record in records)
        total = f"/{self.allotment.trials}" if self.allotment.trials is not None else ""
        line = f"{ended}{total}  trial {trial.number}: {trial.state}"
        if trial.state == "pruned":
            line += f" at step {trial.steps}"
        if trial.value is not None:
            line += f", {self.format_value(trial.value)}"
        line += f", {format_duration(seconds)}" if seconds else ""
        line += f"; {format_values(trial.values)}"
        if trial.error:
            line += f"; {trial.error} (see {trial.workdir}.txt)"
        best = find_best(records, self.study.mode)
        if best is not None and best.value is not None:
            line += f"; best: {self.format_value(best.value)}, trial {best.number}"
        self.print(f"{line}  {eta}" if eta else line)

    def format_value(self, value: float) -> str:
        """Formats a validation metric with its name."""
        metric = self.study.metric
        return f"{value:.2%} {metric}" if metric in FRACTION_METRICS else f"{metric} {value:.4g}"


def _forecast_run(running: RunningJob) -> tuple[float, int] | None:
    """Returns (seconds that a running trial will take, its steps), from the pace after its first
    step; None until it has logged twice."""
    began = time.time() - (time.monotonic() - running.start_time)
    lines = [line for line in running.job.read_lines() if line["time"] >= began]
    if len(lines) < 2 or lines[-1]["step"] <= lines[0]["step"]:
        return None
    first, last = lines[0], lines[-1]
    pace = (last["time"] - first["time"]) / (last["step"] - first["step"])
    steps = running.job.last_step
    return first["time"] - began + pace * (steps - first["step"]), steps
