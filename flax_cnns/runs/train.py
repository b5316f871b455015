"""`run(config, workdir)`: trains what a config describes, or goes on with it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import effects
from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.analysis.plots import curves
from flax_cnns.checkpoint import finding
from flax_cnns.checkpoint.graft.graft import graft_config
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.data import datasets, pipeline
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data import images as img
from flax_cnns.errors import ProcessLost, UserError
from flax_cnns.evaluation.exact import summarize
from flax_cnns.layers import norm
from flax_cnns.runs import tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import (
    Parts,
    assemble,
    augment_and_mix,
    check_data,
    make_train_step,
    run_key,
    start_jax,
    train_batches,
)
from flax_cnns.runtime import launch, output
from flax_cnns.runtime.preemption import Preempted, Signals
from flax_cnns.train import batchnorm, loop, memory, optimizers, parallel, precise_bn, schedules
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
    begun, found = workdirs.has_begun(pathlib.Path(workdir)), configs.doubts(config)
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
        one = _Run(parts, workdir, opened, signals, began)
        found += one.doubts()
        if not begun:
            configs.refuse(found)
        if primary:
            print("\n".join(parts.dataset.describe()))
            if found:
                print(configs.note(workdir, found))
            if change:
                workdirs.accept_change(workdir, change)
            workdirs.write_json(workdir / "config.json", resolved)
            workdirs.write_facts(workdir, parts.dataset.as_dict())
        try:
            return one.go()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {workdirs.describe_resume(workdir)}") from None
        except img.DamagedImage as error:
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
            fingerprint = datasets.read_fingerprint(config.data)
        seen, facts = fingerprints.Seen(fingerprint), {}
        if "fingerprint" not in workdirs.read_facts(workdir):
            dataset = datasets.load(config.data, begun=True)  # for the counts
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


class _Run:
    def __init__(
        self,
        parts: Parts,
        workdir: pathlib.Path,
        opened: workdirs.Opened,
        signals: Signals,
        began: float,
    ):
        self.parts, self.workdir, self.opened = parts, workdir, opened
        self.signals, self.began = signals, began
        self.config, self.primary = parts.config, jax.process_index() == 0
        self.warned = False
        self.validates = "validation" in parts.dataset.splits
        config = self.config
        train_split = parts.dataset.splits["train"]
        self.steps_per_epoch = len(train_split) / config.data.batch_size

        self._check_batches()
        count = self._count
        self.total = count(config.train.duration, "train.duration")
        if self.total < 1:
            raise UserError(f"train.duration: {config.train.duration!r} is no step at all")
        self.every = loop.Every(
            log=count(config.log.every, "log.every"),
            evaluate=count(config.train.eval_every, "train.eval_every"),
            save=count(config.checkpoint.every, "checkpoint.every"),
        )
        if not self.validates and (
            config.schedule.name == "plateau" or config.train.early_stopping
        ):
            raise UserError(
                f"data.validation: {parts.dataset.name} has no validation split, and the plateau "
                "schedule and early stopping look at nothing else; set data.validation=0.1"
            )

    def _count(self, duration: str, field: str = "duration") -> int:
        return schedules.steps(duration, self.steps_per_epoch, what=field)

    def doubts(self) -> list[str]:
        """`config.doubts` that take the network or the data to know."""
        parts = self.parts

        def shapes() -> PyTree:
            return jax.eval_shape(parts.fresh_variables)

        def has_aux_heads() -> bool:
            # The axis of synchronized statistics exists only inside a step.
            alone = {"axis_name": None} if hasattr(parts.model, "axis_name") else {}
            model = parts.model.clone(**alone)
            variables = parts.for_steps(shapes())
            images = jax.ShapeDtypeStruct((2, *parts.dataset.image_shape), "float32")
            rngs = {"shared": jax.random.key(0), "dropout": jax.random.key(0)}
            call = functools.partial(
                model.apply, train=True, mutable=["batch_stats", "aux_logits"], rngs=rngs
            )
            return bool(jax.eval_shape(call, variables, images)[1].get("aux_logits"))

        facts = effects.Facts(
            total=self.total,
            count=self._count,
            validates=self.validates,
            own_validation=parts.dataset.own_validation,
            has_batchnorm=lambda: bool(shapes()["batch_stats"]),
            has_aux_heads=has_aux_heads,
        )
        return configs.doubts(self.config, facts)

    # -- state

    @functools.cached_property
    def _order(self) -> list[str]:
        """The paths of the network's layers, as images pass them."""
        shape = (1, *self.parts.dataset.image_shape)
        return [layer.path for layer in cost(self.parts.model, shape).layers]

    def _optimizer(self, variables: PyTree) -> optimizers.Optimizer:
        schedule = schedules.make(
            self.config.schedule, total_steps=self.total, steps_per_epoch=self.steps_per_epoch
        )
        return optimizers.make(
            self.config.optimizer,
            variables["params"],
            schedule,
            batch_stats=variables.get("batch_stats"),
            order=self._order if self.config.optimizer.layer_decay else (),
            groups=getattr(self.parts.model, "layer_groups", ()),
        )

    def _fresh_state(self) -> TrainState:
        variables = self.parts.fresh_variables()
        if self.config.graft.source:
            variables, grafted = graft_config(self.config.graft, variables, self._order)
            if self.primary:
                print(grafted)
                workdirs.write_json(self.workdir / "graft.json", grafted.as_dict())
        # After grafting, so that the optimizer and the average start from the grafted weights.
        variables = self.parts.for_steps(variables)
        optimizer = self._optimizer(variables)
        opt_state = optimizer.init(variables["params"])
        state = TrainState.create(variables, opt_state, ema=self.config.train.ema > 0)
        return parallel.replicate(state, self.parts.mesh)

    def _target(self) -> TrainState:
        """Shapes and shardings of the state, without a number in it."""

        def make() -> TrainState:
            variables = self.parts.for_steps(jax.eval_shape(self.parts.fresh_variables))
            optimizer = self._optimizer(variables)

            def create(variables: PyTree) -> TrainState:
                opt_state = optimizer.init(variables["params"])
                return TrainState.create(variables, opt_state, ema=self.config.train.ema > 0)

            return jax.eval_shape(create, variables)

        sharding = jax.sharding.NamedSharding(self.parts.mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make()
        )

    def check_norms(self) -> None:
        """Raises `UserError` if a BatchNorm that learns would see one value per channel in a step.
        Computes shapes only, and only if a device takes its images one at a time: two images have
        two values per channel."""
        parts, config = self.parts, self.config
        devices, pieces = parts.mesh.devices.size, config.train.accumulate
        if config.data.batch_size != devices * pieces:
            return
        variables = self._target().variables
        modes = self._optimizer(variables).norms

        def step(variables: PyTree, batch: dict[str, Array], key: Array) -> Array:
            with batchnorm.intercept(modes), norm.checking():  # in this order
                parts.model.apply(
                    variables,
                    batch["image"],
                    train=True,
                    mutable=["batch_stats", "aux_logits"],
                    rngs={"shared": key, "dropout": key},
                )
            return key

        shape = (devices, *parts.dataset.image_shape)
        batch = {"image": jax.ShapeDtypeStruct(shape, jax.numpy.float32)}
        try:
            jax.eval_shape(
                parallel.parallelize(step, parts.mesh, donate=False),
                *(variables, batch, jax.random.key(0)),
            )
        except norm.OneValueError as error:
            raise UserError(
                f"data.batch_size={config.data.batch_size} (devices: {devices}, train.accumulate:"
                f" {pieces}) gives a device 1 image at a time, and {error.path} gets"
                f" {list(error.shape)}: BatchNorm of 1 value per channel makes all images the same;"
                f" take data.batch_size={2 * devices * pieces}, or larger images"
            ) from None

    # -- the run

    def go(self) -> dict[str, Any]:
        config = self.config
        self.check_norms()
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
            state, host, start = self._start()
            self.writer = Writer(
                self.workdir,
                resume_step=start or None,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                config=configs.plain(config),
                primary=self.primary,
            )
            stack.callback(self.writer.close)
            self.progress = Progress(self.total, start, primary=self.primary)
            stack.callback(self.progress.close)
            if start:
                self.progress.print(f"resumed at step {start} of {self.total}")
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
            launch.leave(1)

    def _preempted(self, outcome: loop.Outcome) -> Preempted:
        self.progress.print(
            f"saved at step {outcome.step} of {self.total}; the same command goes on"
        )
        return Preempted(outcome.step, self.signals.code)

    def _start(self) -> tuple[TrainState, loop.Host, int]:
        if self.checkpoints.latest_step() is not None:
            restored = self.checkpoints.restore(self._target())
            if restored is not None:
                state, saved, step = restored
                return state, loop.Host(**saved), step
        return self._fresh_state(), loop.Host(), 0

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

    def _precise_bn(
        self, optimizer: optimizers.Optimizer, key: Array
    ) -> Callable[[TrainState], TrainState] | None:
        """What computes the running statistics anew before a validation, if anything does."""
        parts, n = self.parts, self.config.train.precise_bn
        if not n or "train" not in optimizer.norms.values():
            return None
        step = precise_bn.make_moments_step(
            parts.model.apply, optimizer.norms, **augment_and_mix(parts)
        )
        step = parallel.parallelize(step, parts.mesh, mode=parts.mode, donate=False)

        def refresh(state: TrainState) -> TrainState:
            # The first batches of the run: what is validated differs by its weights alone.
            with contextlib.closing(train_batches(parts)) as stream:
                batches = itertools.islice(stream, n)
                stats = precise_bn.estimate(
                    step, state.variables, batches, key, should_stop=self.signals.asked_now
                )
            return state.with_statistics(parallel.replicate(stats, parts.mesh))

        return refresh

    def _check_memory(self, train_step: Callable, state: TrainState, batch: Any, key: Any) -> None:
        """Raises `UserError` for batches that a CPU has no memory for; compiles the step."""
        parts, data = self.parts, self.config.data
        devices = parallel.local_devices(parts.mesh)
        if devices[0].platform != "cpu":
            return
        need = memory.needed(train_step, state, batch, key) * len(devices)
        if not memory.fits(20 * need):
            # XLA does not count the patches that a convolution's gradient lays out as it runs.
            layers = cost(parts.model, (1, *parts.dataset.image_shape)).layers
            patches = max(
                (x.macs / x.output_shape[-1] for x in layers if len(x.output_shape or ()) == 4),
                default=0,
            )
            pieces = jax.process_count() * self.config.train.accumulate
            need += 4 * patches * data.batch_size / pieces
        memory.check(need, what=f"data.batch_size={data.batch_size}")
        size, axis = data.eval_batch_size, 1 if parts.mode == "pmap" else 0
        if memory.fits(need * size / data.batch_size):
            return  # without a backward pass, less than training on as many images takes

        def shape(x: Array, dtype: Any) -> jax.ShapeDtypeStruct:
            dims = list(x.shape)
            dims[axis] = dims[axis] * size // data.batch_size
            return jax.ShapeDtypeStruct(dims, dtype, sharding=x.sharding)

        shapes = {
            "image": shape(batch["image"], np.uint8),
            "label": shape(batch["label"], np.int32),
            "mask": shape(batch["label"], np.float32),
        }
        need = memory.needed(parts.eval_step, state.variables, shapes, None) * len(devices)
        memory.check(need, what=f"data.eval_batch_size={size}")

    def _check_batches(self) -> None:
        """Raises `UserError` for batches whose images alone do not fit into memory."""
        data, pixels = self.config.data, math.prod(self.parts.dataset.image_shape)
        ahead = 2 if self.parts.dataset.in_memory else 4  # batches that are there at once
        for field in ("batch_size", "eval_batch_size"):
            size = data[field] // jax.process_count()
            memory.check(ahead * size * pixels, what=f"data.{field}={data[field]}")

    def _train(self, state: TrainState, host: loop.Host, start: int) -> loop.Outcome:
        parts, config = self.parts, self.config
        optimizer = self._optimizer(state.variables)
        train_step = make_train_step(parts, optimizer, self.steps_per_epoch)
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
            if start < self.total:
                first = next(batches)
                self._check_memory(train_step, state, first, key)
                stream = itertools.chain([first], batches)
            else:
                stream = batches
            return loop.train(
                state,
                train_step=train_step,
                batches=stream,
                key=key,
                start=start,
                stop=self.total,
                every=self.every,
                host=host,
                batch_size=config.data.batch_size,
                evaluate=validate if self.validates else None,
                on_validation=on_validation,
                save=self._save,
                write=self._write,
                tick=self._tick,
                should_stop=self.signals.should_stop,
                max_bad_steps=config.train.max_bad_steps,
                early_stopping=config.train.early_stopping,
                began=self.began,
                refresh=self._precise_bn(optimizer, key),
            )

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
            state, _, step = self.checkpoints.restore(self._target(), self.checkpoints.best_step())
        found: dict[str, float] = {}
        examples: dict[str, int] = {}
        for split, name in names.items():
            try:
                sums = self.parts.evaluate(state.variables, split, self.signals.asked_now)
            except loop.Interrupted:
                raise self._preempted(outcome) from None
            found |= {f"{name}/{metric}": value for metric, value in summarize(sums).items()}
            examples |= {f"{name}/step": step, f"{name}/examples": int(sums["count"])}
        self._write(outcome.step, found)
        return found | examples

    def _finish(
        self, outcome: loop.Outcome, host: loop.Host, found: dict[str, float]
    ) -> dict[str, Any]:
        parts, config = self.parts, self.config
        device = jax.devices()[0]
        summary = {
            "model": config.model.name,
            "params": pytree.count(outcome.state.params),
            "dataset": parts.dataset.name,
            "seed": config.seed,
            "step": outcome.step,
            "epochs": outcome.step / self.steps_per_epoch,
            **found,
            "validation/best_accuracy": host.best,
            "stopped_early": host.stopped,
            "bad_steps": host.bad_steps,
            "normalized_by": parts.dataset.normalized_by,
            "images": {role: len(split) for role, split in parts.dataset.splits.items()},
            "left_out": dict(parts.dataset.left_out),
            "files_of_several_pictures": len(parts.dataset.several),
            "damaged_images": sorted(parts.dataset.damaged),
            "seconds": host.seconds,
            "seconds_to_first_step": outcome.seconds_to_first_step,
            "images_per_second": outcome.images_per_second,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "device": f"{device.platform} {device.device_kind}",
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "flax": __import__("flax").__version__,
            },
        }
        if changes := workdirs.read_facts(self.workdir).get("accepted_changes"):
            summary["accepted_changes"] = [change["differs"] for change in changes]
        summary = workdirs.without_nonfinite(summary)  # as a reader of the file gets it
        if self.primary:
            warning = self._absurd_loss(read_jsonl(self.workdir / "metrics.jsonl"))
            summary["warnings"] = [warning] if warning else []
            title = f"{config.model.name} on {parts.dataset.name}, seed {config.seed}"
            curves.draw_curves(
                self.workdir / "metrics.jsonl", self.workdir / "curves.png", title=title
            )
            workdirs.write_json(self.workdir / "summary.json", summary)
            tables.print_summary(summary)
            print(f"written to {self.workdir}: summary.json, metrics.jsonl, curves.png")
        return summary
