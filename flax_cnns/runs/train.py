"""`run(config, workdir)`: trains what a config describes, or goes on with it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.analysis.plots import curves
from flax_cnns.checkpoint import finding
from flax_cnns.checkpoint.graft.graft import graft_config
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data import pipeline
from flax_cnns.data.load import load_dataset, read_fingerprint
from flax_cnns.data.types import DamagedImage
from flax_cnns.errors import EXIT_FAULT, Interrupted, ProcessLost, UserError
from flax_cnns.evaluation.exact import summarize
from flax_cnns.runs import tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import (
    assemble,
    check_data,
    make_statistics_refresh,
    make_train_step,
    run_key,
    start_jax,
    train_batches,
)
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runs.summary import make_summary
from flax_cnns.runtime import launch, output
from flax_cnns.runtime.preemption import Preempted, Signals
from flax_cnns.train import loop, optimizers, parallel
from flax_cnns.train.progress import Progress
from flax_cnns.train.state import TrainState
from flax_cnns.train.writer import Writer, import_wandb, read_jsonl
from flax_cnns.types import Array, PyTree

ABSURD_LOSS = 1000  # times the loss of guessing: a run warns above this


@output.safe()
def run(
    config: Any,
    workdir: str | os.PathLike,
    *,
    accept_changed_data: bool = False,
    fingerprint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains what `config` (configs/common.py) describes and returns what it writes to
    `workdir/summary.json`.

    Started again with the same config it goes on from the newest intact checkpoint, to the bit.
    If the data changed since, it raises `ChangedData`, a `UserError`. With `accept_changed_data` it
    goes on, and records the change with both fingerprints in `dataset.json`. `fingerprint` is that
    of the data, from callers that have just read them: a complete run is compared with it.

    Raises `UserError` for what the user can mend; `Preempted` once everything is saved, after
    SIGTERM or SIGUSR1 (exit code 75) or Ctrl-C (130); KeyboardInterrupt for Ctrl-C before the first
    step, and for a second one; `ProcessLost` if a process that the run needs has died. Output that
    cannot be written does not end the run; a file that cannot be written does.
    """
    began = time.perf_counter()
    config = ConfigDict(config) if isinstance(config, dict) else config
    configs.validate(config)
    if not os.fspath(workdir):
        raise UserError("--workdir: expected the name of a directory, got nothing")
    directory, which = finding.split_source(workdir)
    if which and workdirs.has_begun(pathlib.Path(directory)):
        raise UserError(
            f"--workdir: {os.fspath(workdir)} is a checkpoint of the run {directory}; to go on with"
            f" that run give its name, and to start from its weights a new --workdir with"
            f" config.graft.source={os.fspath(workdir)}"
        )
    begun, found = workdirs.has_begun(pathlib.Path(workdir)), configs.find_doubts(config)
    if not begun:
        configs.refuse(found)
    start_jax(config)
    resolved = configs.plain(config)
    launch.check_same(
        json.dumps(resolved, sort_keys=True),
        what="the config",
        cure="start all with the same command and code",
    )
    workdir, primary = pathlib.Path(workdir).absolute(), jax.process_index() == 0
    with workdirs.open_workdir(workdir, primary=primary) as opened, Signals() as signals:
        if primary:
            workdirs.check_workdir(workdir, resolved, accept_changed_data=accept_changed_data)
        # Each process looks for itself, and one that saw another state would wait for ever.
        complete = (workdir / "summary.json").is_file()
        launch.check_same(
            f"{complete} {finding.steps(workdir)}",
            what="what the run directory holds",
            cure=f"{workdir} must be one directory that all of them see",
        )
        if complete:
            summary = workdirs.read_json(workdir / "summary.json")
            check_complete(config, workdir, fingerprint, accept_changed_data)
            if primary:
                print(f"{workdir} is complete; remove it to run again")
                with finding.damage(workdir / "summary.json", finding.CURES["summary.json"]):
                    tables.print_summary(summary)
            return summary
        if config.log.wandb:
            import_wandb()  # before the data is loaded
        parts = assemble(config, begun=bool(finding.steps(workdir)))
        change = check_data(workdir, parts.dataset, accept_changed_data)
        plan = RunPlan(parts)
        found += plan.find_doubts()
        if not begun:
            configs.refuse(found)
        if primary:
            print("\n".join(parts.dataset.describe()))
            if found:
                print(configs.note(workdir, found))
            if change:
                workdirs.accept_change(workdir, change)
            files.write_json(workdir / "config.json", resolved)
            workdirs.write_facts(workdir, parts.dataset.as_dict())
        try:
            return _Run(plan, workdir, opened, signals, began).go()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {workdirs.describe_resume(workdir)}") from None
        except DamagedImage as error:
            if not workdirs.has_begun(workdir):
                raise
            # The config of a run that has begun cannot change, and a mended file changes the data.
            text = f"cannot decode {error.where}: {error.why}; mend or delete it, and then"
            there = workdirs.describe_resume(workdir)
            raise UserError(f"{text} add --accept-changed-data; {there}") from None
        except ProcessLost as error:
            raise ProcessLost(f"{error}; {workdirs.describe_resume(workdir)}") from None


def check_complete(
    config: Any, workdir: pathlib.Path, fingerprint: dict[str, Any] | None, accept: bool
) -> None:
    """Raises `ChangedData` if a complete run's data changed and this is not accepted. Data that can
    no longer be read are no error: the numbers of the run stand."""
    primary = jax.process_index() == 0
    try:
        if fingerprint is None:
            fingerprint = read_fingerprint(config.data)
        seen, facts = fingerprints.Seen(fingerprint), {}
        if "fingerprint" not in workdirs.read_facts(workdir):
            dataset = load_dataset(config.data, begun=True)  # for the counts
            seen, facts = dataset.seen, dataset.as_dict()
    except UserError as error:
        if primary:
            print(f"the data of {workdir} are not compared: {error}")
        return
    change = workdirs.check_data(workdir, seen, accept=accept, quiet=not primary)
    if primary and change:
        workdirs.accept_change(workdir, change)
    elif primary:
        workdirs.add_fingerprint(workdir, facts)
        workdirs.move_data(workdir, config.data.dir)


def initial_state(
    plan: RunPlan, checkpoints: Checkpoints, workdir: pathlib.Path
) -> tuple[TrainState, loop.HostState, int]:
    """(state, host state, step) that a session begins with, from the first of these that it has:

    1. Restore: the newest intact checkpoint of this run, all of it.
    2. Graft: the weights that `config.graft` takes from its source.
    3. Fresh: the network's own initial values, from the seed alone.

    A graft may leave some weights fresh. The optimizer's state and the averaged weights are made
    after it, so that they start from the grafted weights. Raises `UserError`.
    """
    parts, config = plan.parts, plan.config
    # 1. Restore.
    if checkpoints.latest_step() is not None:
        restored = checkpoints.restore(plan.target())
        if restored is not None:
            state, saved, step = restored
            return state, loop.HostState(**saved), step
    # 2. and 3. Fresh values, and the graft over them.
    variables = parts.fresh_variables()
    if config.graft.source:
        variables, grafted = graft_config(config.graft, variables, plan.layer_order)
        if jax.process_index() == 0:
            print(grafted)
            files.write_json(workdir / "graft.json", grafted.as_dict())
    # The optimizer's state and the averages.
    variables = parts.for_steps(variables)
    opt_state = plan.optimizer_for(variables).init(variables["params"])
    state = TrainState.create(variables, opt_state, ema=config.train.ema > 0)
    return parallel.replicate(state, parts.mesh), loop.HostState(), 0


class _Run:
    def __init__(
        self,
        plan: RunPlan,
        workdir: pathlib.Path,
        opened: workdirs.Opened,
        signals: Signals,
        began: float,
    ):
        self.plan, self.parts, self.config = plan, plan.parts, plan.config
        self.workdir, self.opened, self.signals, self.began = workdir, opened, signals, began
        self.primary = jax.process_index() == 0
        self.warned = False

    def go(self) -> dict[str, Any]:
        config = self.config
        self.plan.check_norms()
        if config.data.workers and not self.parts.dataset.in_memory:
            pipeline.check_main_guard(config.data.workers)
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(
                Checkpoints(
                    self.workdir / "checkpoints",
                    keep_latest=config.checkpoint.keep_latest,
                    keep_best=config.checkpoint.keep_best,
                )
            )
            self.checkpoints = checkpoints
            stack.push(self._leave_if_peer_died)
            state, host, start = initial_state(self.plan, checkpoints, self.workdir)
            self.writer = Writer(
                self.workdir,
                resume_step=start or None,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                config=configs.plain(config),
                primary=self.primary,
            )
            stack.callback(self.writer.close)
            self.progress = Progress(self.plan.total, start, primary=self.primary)
            stack.callback(self.progress.close)
            if start:
                self.progress.print(f"resumed at step {start} of {self.plan.total}")
            outcome = self._train(state, host, start)
            checkpoints.wait()
            if outcome.preempted:
                raise self._preempted(outcome)
            found = self._test(outcome)
            self.progress.close()
        return self._finish(outcome, host, found)

    def _leave_if_peer_died(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Ends this process with one line if another process of the run has died: closing the
        checkpoints would wait for that one until JAX aborts."""
        if said := launch.lost_peer(error):
            text = f"another process of this run has died ({said})"
            print(f"error: {text}; {workdirs.describe_resume(self.workdir)}", file=sys.stderr)
            launch.leave(EXIT_FAULT)

    def _preempted(self, outcome: loop.Outcome) -> Preempted:
        self.progress.print(
            f"saved at step {outcome.step} of {self.plan.total}; the same command goes on"
        )
        return Preempted(outcome.step, self.signals.code)

    def _write(self, step: int, record: dict[str, float]) -> None:
        self.writer.write(step, record)
        if not self.warned and (warning := self._absurd_loss([{"step": step} | record])):
            self.warned = True
            self.progress.print(f"warning: {warning}")
        if "time/first_step" in record:
            self.signals.begun = True
            self.progress.print(f"first step after {record['time/first_step']:.1f} s")
        self.progress.update(step, record)

    def _absurd_loss(self, records: list[dict[str, float]]) -> str:
        """A line on the first loss that is finite and absurd; "" if there is none."""
        guessing = math.log(self.parts.model.num_classes)
        rate = self.config.schedule.learning_rate
        for record in records:
            for name, value in record.items():
                if name.endswith("/loss") and ABSURD_LOSS * guessing < value < math.inf:
                    return (
                        f"{name} is {value:.3g} at step {record['step']}, and guessing gives"
                        f" {guessing:.3g}; lower schedule.learning_rate ({rate:g}), or look at the"
                        " data"
                    )
        return ""

    def _tick(self, step: int) -> None:
        self.opened.begun = True
        self.progress.update(step, {})

    def _save(self, step: int, state: TrainState, host: dict, found: dict[str, float]) -> None:
        self.checkpoints.save(step, state, host=host, metrics=found)

    def _train(self, state: TrainState, host: loop.HostState, start: int) -> loop.Outcome:
        parts, config = self.parts, self.config
        optimizer = self.plan.optimizer_for(state.variables)
        train_step = make_train_step(parts, optimizer, self.plan.steps_per_epoch)
        on_validation = None
        if config.schedule.name == "plateau":

            @jax.jit
            def observe(opt_state: PyTree, error: Array) -> PyTree:
                return optimizers.observe(
                    opt_state,
                    error,
                    patience=config.schedule.patience,
                    factor=config.schedule.factor,
                    min_delta=config.schedule.min_delta,
                )

            def on_validation(state: TrainState, error: float) -> TrainState:
                return state.replace(opt_state=observe(state.opt_state, error))

        key = parallel.replicate(run_key(config), parts.mesh)

        def validate(state: TrainState) -> dict[str, float]:
            asked = self.signals.asked_now
            return summarize(parts.evaluate(state.variables, "validation", asked))

        with contextlib.closing(loop.prefetch(train_batches(parts, start))) as batches:
            if start < self.plan.total:
                first = next(batches)
                self.plan.check_memory(train_step, state, first, key)
                stream = itertools.chain([first], batches)
            else:
                stream = batches
            callbacks = loop.Callbacks(
                save=self._save,
                write=self._write,
                tick=self._tick,
                should_stop=self.signals.should_stop,
                evaluate=validate if self.plan.validates else None,
                on_validation=on_validation,
                refresh=make_statistics_refresh(parts, optimizer, key, self.signals.asked_now),
            )
            return loop.TrainLoop(
                train_step,
                stream,
                key,
                stop=self.plan.total,
                every=self.plan.every,
                host=host,
                callbacks=callbacks,
                batch_size=config.data.batch_size,
                began=self.began,
                max_bad_steps=config.train.max_bad_steps,
                early_stopping=config.train.early_stopping,
            ).run(state, start)

    def _test(self, outcome: loop.Outcome) -> dict[str, float]:
        """Of one checkpoint: the test split's metrics as `test/...` and, if `train.evaluate_train`,
        as `fit/...` those of the examples that the run trained on, as they are."""
        names = {"test": "test"} if "test" in self.parts.dataset.splits else {}
        if self.config.train.evaluate_train:
            names["train"] = "fit"
        if not names:
            return {}
        state, step = outcome.state, outcome.step
        if self.config.train.test_on == "best" and self.checkpoints.best_step() not in (None, step):
            state, _, step = self.checkpoints.restore(
                self.plan.target(), self.checkpoints.best_step()
            )
        found: dict[str, float] = {}
        examples: dict[str, int] = {}
        for split, name in names.items():
            try:
                sums = self.parts.evaluate(state.variables, split, self.signals.asked_now)
            except Interrupted:
                raise self._preempted(outcome) from None
            found |= {f"{name}/{metric}": value for metric, value in summarize(sums).items()}
            examples |= {f"{name}/step": step, f"{name}/examples": int(sums["count"])}
        self._write(outcome.step, found)
        return found | examples

    def _finish(
        self, outcome: loop.Outcome, host: loop.HostState, found: dict[str, float]
    ) -> dict[str, Any]:
        parts, config = self.parts, self.config
        summary = make_summary(parts, outcome, host, found, self.plan.steps_per_epoch)
        if changes := workdirs.read_facts(self.workdir).get("accepted_changes"):
            summary["accepted_changes"] = [change["differs"] for change in changes]
        summary = files.without_nonfinite(summary)  # as a reader of the file gets it
        if self.primary:
            warning = self._absurd_loss(read_jsonl(self.workdir / "metrics.jsonl"))
            summary["warnings"] = [warning] if warning else []
            title = f"{config.model.name} on {parts.dataset.name}, seed {config.seed}"
            curves.draw_curves(
                self.workdir / "metrics.jsonl", self.workdir / "curves.png", title=title
            )
            files.write_json(self.workdir / "summary.json", summary)
            tables.print_summary(summary)
            print(f"written to {self.workdir}: summary.json, metrics.jsonl, curves.png")
        return summary
