"""Runs a study's trials in the several processes of one launch, one trial after the other.

Process 0 has the journal: it draws the trials and records their ends. The others receive each trial
from it and run the same config, in process. All processes see the same validations and follow the
same rule, so they stop a trial after the same step without asking each other.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flax_cnns.checkpoint.lock import DirectoryLock
from flax_cnns.errors import Diverged, UserError
from flax_cnns.names import make_console, open_log
from flax_cnns.runs.build import initialize_jax
from flax_cnns.runs.train import run
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.studies.search.tuning.board import TuningBoard
from flax_cnns.studies.search.tuning.records import TrialRecord, TuningResult
from flax_cnns.studies.search.tuning.results import make_result
from flax_cnns.studies.search.tuning.storage import Journal
from flax_cnns.studies.search.tuning.study import Study, record_study
from flax_cnns.studies.search.tuning.trials import (
    Allotment,
    TrialRun,
    draw_trial,
    list_others,
    make_run,
)


def tune_together(
    config: ConfigDict,
    make: Callable[[], Study],
    *,
    trials: int | None,
    budget_steps: int | None,
    accept_changed_data: bool,
) -> TuningResult:
    """Runs the trials of the study that `make` makes. Every process of the launch calls this.

    Raises on every process what process 0 raises; and `Preempted` after a signal to any process.
    """
    initialize_jax(config)
    import jax

    study = make()
    allotment = Allotment(study, trials, budget_steps)
    with contextlib.ExitStack() as stack:
        records: list[TrialRecord] = []
        journal = board = None
        with _share_errors():
            if jax.process_index() == 0:
                stack.enter_context(DirectoryLock(study.folder))
                record_study(study, accept_changed_data=accept_changed_data)
                journal = Journal(study.folder, study.mode, study.space)
                board = TuningBoard(study, allotment, 1, make_console())
                stack.enter_context(board)
                records = journal.read()
                board.print_plan(records)
        while True:
            given: Any = None
            with _share_errors():
                if journal is not None:
                    given = _choose_trial(study, journal, allotment)
            given = broadcast(given)
            records = [_from_json(study, each) for each in given["records"]]
            if given["number"] is None:
                return make_result(study, records)
            job = make_run(study, records[given["number"]])
            start_time = time.monotonic()
            error = _run_trial(study, job, given, accept_changed_data)
            with _share_errors():
                if journal is not None and board is not None:
                    others = list_others(records, job.record.number)
                    ended = job.find_end(others) or job.fail(error, others)
                    journal.finish(ended)
                    records = journal.read()
                    eta = board.update(records, ())
                    board.report_end(ended, time.monotonic() - start_time, records, eta)
            jax.clear_caches()  # programs that are not used again


def _choose_trial(study: Study, journal: Journal, allotment: Allotment) -> dict[str, Any]:
    """Returns the trial to run next, the known trials, and the trial's validations so far."""
    while True:
        records = journal.read()
        record = next((each for each in records if each.state == "running"), None)
        if record is None:
            if not allotment.allows(records, 0):
                return {"number": None, "records": list(map(_to_json, records)), "curve": []}
            record = draw_trial(study, journal, len(records))
            records = journal.read()
        job = make_run(study, record)
        others = list_others(records, record.number)
        ended = job.find_end(others)
        if ended is None:
            curve = job.read_curve()
            known = list(map(_to_json, records))
            return {"number": record.number, "records": known, "curve": curve}
        journal.finish(ended)


def _run_trial(study: Study, job: TrialRun, given: Mapping[str, Any], accept: bool) -> str:
    """Runs a trial to its end or until it is pruned. Returns the error of one that failed."""
    import jax

    curve = {int(step): float(value) for step, value in given["curve"]}
    others = [_from_json(study, each) for each in given["records"]]
    others = list_others(others, job.record.number)

    def is_pruned(step: int, metrics: dict[str, float]) -> bool:
        curve[step] = float(metrics[f"validation/{study.metric}"])
        points = sorted(point for point in curve.items() if point[0] <= step)
        decision = study.pruner.decide(job.record.number, points, others, job.last_step)
        return decision.prune_at is not None

    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open_log(job.log))
            stack.enter_context(contextlib.redirect_stdout(log))
        try:
            run(
                job.config,
                job.workdir,
                accept_changed_data=accept,
                fingerprint=study.facts["data"],
                stop_when=is_pruned,
            )
        except Preempted as stopped:
            if stopped.by_signal:
                raise
        except Diverged as error:
            return f"diverged: {error}"
        except UserError as error:
            return str(error)
        return "the run ended without a summary"


def broadcast(content: Any) -> Any:
    """Returns what process 0 passes, as JSON gives it back, on every process."""
    import jax
    from jax.experimental import multihost_utils

    text = json.dumps(content).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


@contextlib.contextmanager
def _share_errors() -> Iterator[None]:
    """A context in which an error of process 0 becomes a UserError of every process."""
    import jax

    problem: BaseException | None = None
    try:
        yield
    except Exception as error:
        problem = error
    message = "" if problem is None else str(problem) or type(problem).__name__
    if problem is not None and not isinstance(problem, UserError):
        traceback.print_exception(problem)
    if message := broadcast(message):
        if jax.process_index() == 0 and problem is not None:
            raise problem
        raise UserError(message)


def _to_json(record: TrialRecord) -> dict[str, Any]:
    return record._asdict() | {"workdir": ""}


def _from_json(study: Study, content: Mapping[str, Any]) -> TrialRecord:
    curve = tuple((int(step), float(value)) for step, value in content["curve"])
    workdir = study.folder / "trials" / str(content["number"])
    return TrialRecord(**{**content, "curve": curve, "workdir": workdir})
