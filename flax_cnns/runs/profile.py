"""`train --profile=100:110`: the trace of some steps of a run, and a summary in plain text.

RUN/profile/100-110/summary.txt                     where the time goes, by the primary process
RUN/profile/100-110/plugins/profile/steps/          for TensorBoard's profiler
    host0.xplane.pb, host1.xplane.pb ...            the trace of each process
    host0.perfetto.json.gz ...                      the same for https://ui.perfetto.dev

The flag is not a part of the config: a run with and without it is the same run, bit for bit.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from flax_cnns import files
from flax_cnns.analysis.trace_summary import OperationTime, TraceSummary, read_trace
from flax_cnns.errors import UserError
from flax_cnns.train.profiler import PARTS, StepProfiler, StepTimes, StepWindow

FOLDER = "profile"  # in the run's directory
SHOWN = 20  # operations in the summary


def find_folder(workdir: Path, window: StepWindow) -> Path:
    """Returns the folder of a window's profile."""
    return workdir / FOLDER / f"{window.first}-{window.last}"


def check_window(window: StepWindow, total_steps: int, steps_per_call: int = 1) -> None:
    """Raises UserError if the window ends after the run, or if a call takes several steps."""
    if steps_per_call > 1:
        raise UserError(
            f"--profile={window}: with train.steps_per_call={steps_per_call}, one call takes many"
            " steps, which have no parts of their own; profile with"
            " --config.train.steps_per_call=1 in another --workdir"
        )
    if window.last > total_steps:
        raise UserError(
            f"--profile={window}: the run has only {total_steps} steps; choose steps from 1 to"
            f" {total_steps}"
        )


def check_complete(window: StepWindow, workdir: Path) -> None:
    """Raises UserError if a run is complete and was never asked for this profile."""
    if not find_folder(workdir, window).is_dir():
        raise UserError(
            f"--profile={window}: the run {workdir} is complete, and no step is left to profile;"
            " use another --workdir"
        )


def make_profiler(
    window: StepWindow,
    workdir: Path,
    *,
    start: int,
    total_steps: int,
    say: Callable[[str], None],
) -> StepProfiler | None:
    """Returns the profiler of a session that starts after step `start`; None if it has no use.

    The window's folder marks that the profile was asked for. So a command that is repeated after an
    interruption continues the run: it profiles what is left of the window, or says that the profile
    exists, or that the steps have passed. Raises UserError if the profile is asked for the first
    time when its steps, or some of them, have passed.
    """
    folder = find_folder(workdir, window)
    if (folder / "summary.txt").is_file():
        say(f"profile: steps {window} are already in {folder}")
        return None
    if start >= window.first:
        if not folder.is_dir():
            left = f"choose steps from {start + 1} to {total_steps}"
            if start >= total_steps:
                left = "no step is left to profile"
            raise UserError(f"--profile={window}: the run is already at step {start}; {left}")
        if start >= window.last:
            say(f"profile: none, because the run was interrupted in the steps {window}")
            return None
        say(f"profile: only steps {start + 1} to {window.last}, because the run was interrupted")
        steps = StepWindow(start + 1, window.last)
    else:
        steps = window
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="flax_cnns-profile-"))

    def finish(times: StepTimes) -> None:
        try:
            trace = _move_trace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if jax.process_index() == 0:
            text = _describe(times, trace, folder)
            files.write_text(folder / "summary.txt", text)
            say(f"profile of steps {times.steps[0]} to {times.steps[-1]}: {folder}/summary.txt")
            say("\n".join(text.splitlines()[2 : 4 + len(PARTS)]))

    return StepProfiler(steps, scratch, finish)


def _move_trace(scratch: Path, folder: Path) -> Path:
    """Moves this process's trace to its place in the run. Returns the `.xplane.pb`."""
    target = folder / "plugins" / "profile" / "steps"
    name = f"host{jax.process_index()}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        (trace,) = scratch.rglob("*.xplane.pb")
        for source, end in ((trace, ".xplane.pb"), (_find_perfetto(scratch), ".perfetto.json.gz")):
            with files.replace_atomically(target / f"{name}{end}") as temporary:
                shutil.copyfile(source, temporary)
    except OSError as error:
        raise UserError(f"cannot write the profile {folder}: {error.strerror}") from None
    return target / f"{name}.xplane.pb"


def _find_perfetto(scratch: Path) -> Path:
    (path,) = scratch.rglob("perfetto_trace.json.gz")
    return path


def _describe(times: StepTimes, trace: Path, folder: Path) -> str:
    steps = len(times.steps)
    title = f"Steps {times.steps[0]} to {times.steps[-1]}, process 0 of {jax.process_count()}"
    device = jax.local_devices()[0]
    lines = [f"{title}: {jax.local_device_count()} x {device.device_kind} ({device.platform})", ""]
    lines += describe_times(times)
    lines += [""]
    try:
        lines += describe_operations(read_trace(trace), steps)
    except UserError as error:
        lines += [f"no table of operations: {error}"]
    lines += [
        "",
        f"TensorBoard: pip install tensorboard xprof; tensorboard --logdir={folder}",
        f"Perfetto:    open {trace.with_suffix('').with_suffix('.perfetto.json.gz')} at"
        " https://ui.perfetto.dev",
    ]
    return "\n".join(lines) + "\n"


def describe_times(times: StepTimes) -> list[str]:
    """Returns the table of the parts of a step, and what it means."""
    totals = times.totals()
    all_seconds = sum(totals)
    lines = [f"{'part':10}{'median ms':>11}{'max ms':>10}{'share':>8}"]
    for part, meaning in PARTS.items():
        seconds = times.parts[part]
        lines.append(_row(part, seconds, sum(seconds) / all_seconds) + f"  {meaning}")
    lines.append(_row("step", totals, 1.0))
    lines += [
        "",
        "In these steps the loop waits for the devices after each step. In all other steps, the",
        "devices compute while the host dispatches the next step, fetches its batch and logs.",
    ]
    if times.before is not None:
        lines.append(
            f"Without the profiler, the steps before took {times.before * 1e3:.1f} ms each."
        )
    return lines


def _row(name: str, seconds: list[float], share: float) -> str:
    median = statistics.median(seconds) * 1e3
    return f"{name:10}{median:11.2f}{max(seconds) * 1e3:10.2f}{share:8.1%}"


def describe_operations(trace: TraceSummary, steps: int) -> list[str]:
    """Returns tables of the operations in a trace of `steps` steps, the longest first.

    Times are in ms per step and device.
    """
    divisor = trace.seconds or 1.0
    unit = 1e3 / steps / trace.devices

    def table(title: str, rows: list[OperationTime]) -> list[str]:
        width = max(len(title), *(len(row.name) for row in rows[:SHOWN]))
        lines = [f"{title:{width}}{'ms':>10}{'share':>8}{'calls':>8}  program"]
        for row in rows[:SHOWN]:
            ms, share = row.seconds * unit, row.seconds / divisor
            calls = row.calls / steps / trace.devices
            lines.append(f"{row.name:{width}}{ms:10.3f}{share:8.1%}{calls:8.3g}  {row.program}")
        if len(rows) > SHOWN:
            rest = sum(row.seconds for row in rows[SHOWN:])
            lines.append(f"{f'{len(rows) - SHOWN} more':{width}}{rest * unit:10.3f}")
        return lines

    lines = [
        f"Operations, {trace.seconds * unit:.2f} ms per step and device ({trace.devices} x"
        f" {trace.platform}), each without the operations inside it:",
        "",
        *table("kind", trace.by_kind()),
        "",
        *table("operation", trace.operations),
    ]
    if trace.platform == "cpu":
        lines += [
            "",
            "On a CPU, what a pool of threads computes for an operation is not in these times.",
        ]
    return lines
