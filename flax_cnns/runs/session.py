"""A session of a run: training, validations, checkpoints, the test and the summary."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.analysis.plots import curves
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.data import pipeline
from flax_cnns.errors import EXIT_FAULT, Interrupted, UserError
from flax_cnns.evaluation.exact import summarize
from flax_cnns.runs import profile, tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import (
    host_batches,
    make_statistics_refresh,
    make_train_call,
    make_train_step,
    make_training_key,
    train_batches,
    train_calls,
)
from flax_cnns.runs.plan import BEST_MODES, RunPlan
from flax_cnns.runs.start import make_initial_state
from flax_cnns.runs.summary import make_summary
from flax_cnns.runtime import launch
from flax_cnns.runtime.preemption import Preempted, Signals
from flax_cnns.train import loop, optimizers, parallel
from flax_cnns.train.profiler import StepProfiler, StepWindow
from flax_cnns.train.progress import Progress
from flax_cnns.train.state import TrainState
from flax_cnns.train.writer import Writer, read_jsonl
from flax_cnns.types import PyTree

MAX_LOSS_RATIO = 1000  # a loss above this many times the loss of guessing causes a warning


class Session:
    """One start of a run: from its newest checkpoint or step 0 to its end or to a signal."""

    batches: Any  # `host_batches`; has `digest` if the data are `Dataset.from_batches`
    # Called after each validation, on every process; True stops the run.
    stop_when: Callable[[int, dict[str, float]], bool] | None = None
    is_stopped = False  # by `stop_when`
    is_asked = False  # to stop, by a signal

    def __init__(
        self,
        plan: RunPlan,
        workdir: pathlib.Path,
        handle: workdirs.WorkdirHandle,
        signals: Signals,
        began: float,
        accept_changed_data: bool = False,
        window: StepWindow | None = None,
    ):
        self.plan, self.components, self.config = plan, plan.components, plan.config
        self.workdir, self.handle, self.signals, self.began = workdir, handle, signals, began
        self.primary = jax.process_index() == 0
        self.accept_changed_data, self.window = accept_changed_data, window
        self.warned = False

    def run(self) -> dict[str, Any]:
        """Trains, tests and returns the summary. Raises `Preempted` after a signal."""
        config = self.config
        self.plan.check_norms()
        if config.data.workers and not self.components.dataset.in_memory:
            pipeline.check_main_guard(config.data.workers)
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(
                Checkpoints(
                    self.workdir / "checkpoints",
                    keep_latest=config.checkpoint.keep_latest,
                    keep_best=config.checkpoint.keep_best,
                    best_by=f"validation/{self.plan.best_by}",
                    best_mode=self.plan.best_mode,
                )
            )
            self.checkpoints = checkpoints
            stack.push(self._exit_if_peer_died)
            state, host, start, digests = make_initial_state(self.plan, checkpoints, self.workdir)
            self.writer = Writer(
                self.workdir,
                resume_step=start or None,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                config=configs.to_plain(config),
                primary=self.primary,
            )
            stack.callback(self.writer.close)
            best_first = sorted(
                self.components.own_parts.metrics, key=lambda name: name != self.plan.best_by
            )
            self.progress = Progress(
                self.plan.total_steps, start, primary=self.primary, extra_metrics=best_first
            )
            stack.callback(self.progress.close)
            if start:
                self.progress.print(f"resumed at step {start} of {self.plan.total_steps}")
            self.profiler = self._make_profiler(start)
            self.batches = host_batches(self.components, start)
            stack.callback(self.batches.close)
            if digests and start < self.plan.total_steps:
                self._check_batch(start, digests)
            outcome = self._train(state, host, start)
            checkpoints.wait()
            if outcome.preempted:
                raise self._report_preempted(outcome)
            test_metrics = self._test(outcome)
            self.progress.close()
        return self._finish(outcome, host, test_metrics)

    def _make_profiler(self, start: int) -> StepProfiler | None:
        if self.window is None:
            return None
        total = self.plan.total_steps
        return profile.make_profiler(
            self.window, self.workdir, start=start, total_steps=total, say=self.progress.print
        )

    def _exit_if_peer_died(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Ends this process with one line if another process of the run has died.

        Closing the checkpoints would wait for the dead process until JAX aborts.
        """
        if death := launch.describe_lost_peer(error):
            text = f"another process of this run has died ({death})"
            print(f"error: {text}; {workdirs.describe_resume(self.workdir)}", file=sys.stderr)
            launch.exit_if_distributed(EXIT_FAULT)

    def _report_preempted(self, outcome: loop.TrainOutcome) -> Preempted:
        self.progress.print(
            f"saved at step {outcome.step} of {self.plan.total_steps}; run the same command again"
            " to resume"
        )
        by_signal = self.is_asked or not self.is_stopped
        return Preempted(outcome.step, self.signals.code, by_signal=by_signal)

    def _write(self, step: int, record: dict[str, float]) -> None:
        """Logs the metrics of a step and shows them."""
        self.writer.write(step, record)
        if not self.warned and (warning := self._absurd_loss([{"step": step} | record])):
            self.warned = True
            self.progress.print(f"warning: {warning}")
        if "time/first_step" in record:
            self.signals.begun = True
            self.progress.print(f"first step after {record['time/first_step']:.1f} s")
        self.progress.update(step, record)
        if any(name.startswith("validation/") for name in record):
            # A copy, because the checkpoint's score is taken from `record` afterwards.
            self._call_back("on_validation", step, dict(record))
            if self.stop_when is not None:
                self.is_stopped |= self.stop_when(step, dict(record))

    def _call_back(self, hook: str, *arguments: Any) -> None:
        """Calls a hook of the user's callbacks, on the primary process."""
        for callback in self.components.own_parts.callbacks if self.primary else ():
            if (function := getattr(callback, hook, None)) is not None:
                function(*arguments)

    def _absurd_loss(self, records: list[dict[str, float]]) -> str:
        """Returns a warning about the first absurdly high, finite loss; "" if there is none.

        Also "" if the loss is not cross-entropy.
        """
        if self.components.own_parts.loss is not None or self.components.dataset.task != "classes":
            return ""
        guessing = math.log(self.components.num_classes)
        rate = self.config.schedule.learning_rate
        for record in records:
            for name, value in record.items():
                if name.endswith("/loss") and MAX_LOSS_RATIO * guessing < value < math.inf:
                    return (
                        f"{name} is {value:.3g} at step {record['step']}, but guessing gives"
                        f" {guessing:.3g}; lower schedule.learning_rate ({rate:g}), or check the"
                        " data"
                    )
        return ""

    def _should_stop(self, step: int) -> bool:
        # Several processes ask after every call. JAX lets them stop at the number after the highest
        # that it saw, so the calls are counted: steps that leave numbers out would never stop.
        call = -(-step // self.config.train.steps_per_call)
        self.is_asked |= self.signals.should_stop(call)
        return self.is_asked or self.is_stopped

    def _tick(self, step: int) -> None:
        self.handle.begun = True
        self.progress.update(step, {})

    def _save(self, step: int, state: TrainState, host: dict, metrics: dict[str, float]) -> None:
        if self.components.dataset.is_stream and step < self.plan.total_steps:
            host = {**host, "next_batch": self._digests(step)}
        self.checkpoints.save(step, state, host=host, metrics=metrics)
        self._call_back("on_save", step)

    def _digests(self, step: int) -> list[str]:
        """Returns the digests of the batch that a step takes, one for each process."""
        digest = self.batches.digest(step)
        if jax.process_count() == 1:
            return [digest]
        rows = np.frombuffer(digest.encode().ljust(64), np.uint8)
        gathered = np.asarray(multihost_utils.process_allgather(rows))
        return [bytes(row).decode().strip() for row in gathered]

    def _check_batch(self, step: int, was: list[str]) -> None:
        """Raises UserError if the factory's batch of a step changed since the run was saved.

        `was`: the saved digests by process; "" where the factory had no batch.
        """
        if len(was) != jax.process_count():
            self.progress.print(
                f"note: {len(was)} processes saved digests of their parts of the next batch;"
                f" {jax.process_count()} processes cannot compare them"
            )
            return
        differ = [a != b for a, b in zip(was, self._digests(step)) if a and b]
        if not all(was):
            self.progress.print(
                f"note: the factory had no batch of step {step} when this run was saved, so it"
                " cannot be compared"
            )
        if any(differ):
            problem = (
                f"{self.components.dataset.name}: the factory's batch of step {step} is not the"
                " same as before this run was stopped, so the run would not resume bit for bit"
            )
            if not self.accept_changed_data:
                raise UserError(
                    f"{problem}; make its batches depend on start_step alone, or continue anyway"
                    " with --accept-changed-data"
                )
            self.progress.print(f"accepted: {problem}")

    def _train(self, state: TrainState, host: loop.HostState, start: int) -> loop.TrainOutcome:
        """Trains from step `start` to the end or to a signal."""
        components, config = self.components, self.config
        optimizer = self.plan.make_optimizer(state.variables)
        steps_per_call, total = config.train.steps_per_call, self.plan.total_steps
        make = make_train_step if steps_per_call == 1 else make_train_call
        train_step = make(components, optimizer, self.plan.steps_per_epoch)
        on_validation = None
        if config.schedule.name == "plateau":

            @jax.jit
            def observe(opt_state: PyTree, error: Any) -> PyTree:
                return optimizers.update_plateau(
                    opt_state,
                    error,
                    patience=config.schedule.patience,
                    factor=config.schedule.factor,
                    min_delta=config.schedule.min_delta,
                    signed=self.plan.best_by not in BEST_MODES
                    or components.own_parts.loss is not None,
                )

            def on_validation(state: TrainState, error: float) -> TrainState:
                return dataclasses.replace(state, opt_state=observe(state.opt_state, error))

        key = parallel.replicate(make_training_key(config), components.mesh)

        def validate(state: TrainState) -> dict[str, float]:
            should_stop = self.signals.is_asked_to_stop
            return summarize(components.evaluate(state.variables, "validation", should_stop))

        feed = (
            train_batches(components, start, self.batches)
            if steps_per_call == 1
            else train_calls(components, start, total)
        )
        with contextlib.closing(loop.prefetch(feed)) as batches:
            stream: Iterator[Any] = batches
            if start < total:
                first = next(batches)
                self.plan.check_memory(train_step, state, first, key)
                stream = itertools.chain([first], batches)
            has_callbacks = self.primary and components.own_parts.callbacks
            callbacks = loop.Callbacks(
                save=self._save,
                write=self._write,
                tick=self._tick,
                should_stop=self._should_stop,
                evaluate=validate if self.plan.has_validation else None,
                on_validation=on_validation,
                refresh=make_statistics_refresh(
                    components, optimizer, key, self.signals.is_asked_to_stop
                ),
                on_step=functools.partial(self._call_back, "on_step") if has_callbacks else None,
            )
            return loop.TrainLoop(
                train_step,
                stream,
                key,
                stop=total,
                periods=self.plan.periods,
                host=host,
                callbacks=callbacks,
                batch_size=config.data.batch_size,
                began=self.began,
                max_bad_steps=config.train.max_bad_steps,
                early_stopping=config.train.early_stopping,
                best_by=self.plan.best_by,
                best_mode=self.plan.best_mode,
                steps_per_call=steps_per_call,
                profiler=self.profiler,
            ).run(state, start)

    def _test(self, outcome: loop.TrainOutcome) -> dict[str, float]:
        """Evaluates one checkpoint on the test split: metrics `test/...`.

        Does not read the test split if `train.test_on` is "never". With `train.evaluate_train` also
        evaluates the training examples, without augmentation: `fit/...`.
        """
        is_tested = self.config.train.test_on != "never"
        names = {"test": "test"} if is_tested and "test" in self.components.dataset.splits else {}
        if self.config.train.evaluate_train:
            names["train"] = "fit"
        if not names:
            return {}
        state, step = outcome.state, outcome.step
        if self.config.train.test_on == "best" and self.checkpoints.best_step() not in (None, step):
            restored = self.checkpoints.restore(
                self.plan.make_abstract_state(), self.checkpoints.best_step()
            )
            assert restored is not None  # there is a best step
            state, _, step = restored
        results: dict[str, float] = {}
        examples: dict[str, int] = {}
        for split, name in names.items():
            try:
                sums = self.components.evaluate(
                    state.variables, split, self.signals.is_asked_to_stop
                )
            except Interrupted:
                raise self._report_preempted(outcome) from None
            results |= {f"{name}/{metric}": value for metric, value in summarize(sums).items()}
            examples |= {f"{name}/step": step, f"{name}/examples": int(sums["count"])}
        self._write(outcome.step, results)
        return results | examples

    def _finish(
        self, outcome: loop.TrainOutcome, host: loop.HostState, test_metrics: dict[str, float]
    ) -> dict[str, Any]:
        """Draws the curves, writes `summary.json` and prints the table. Returns the summary."""
        components, config = self.components, self.config
        summary = make_summary(self.plan, outcome, host, test_metrics)
        if changes := workdirs.read_dataset_facts(self.workdir).get("accepted_changes"):
            summary["accepted_changes"] = [change["differs"] for change in changes]
        summary = files.replace_nonfinite(summary)  # equal to what is read back from the file
        if self.primary:
            warning = self._absurd_loss(read_jsonl(self.workdir / "metrics.jsonl"))
            summary["warnings"] = [warning] if warning else []
            title = f"{config.model.name} on {components.dataset.name}, seed {config.seed}"
            metric, mode = self.plan.best_by, self.plan.best_mode
            if metric == "loss":  # the loss has its own panel
                metric = "accuracy" if components.dataset.task == "classes" else "label_accuracy"
                mode = "max"
            curves.draw_curves(
                self.workdir / "metrics.jsonl",
                self.workdir / "curves.png",
                title=title,
                metric=metric,
                mode=mode,
            )
            files.write_json(self.workdir / "summary.json", summary)
            tables.print_summary(summary)
            print(f"written to {self.workdir}: summary.json, metrics.jsonl, curves.png")
        return summary
