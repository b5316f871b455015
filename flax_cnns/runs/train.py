"""`run(config, workdir)` trains what a config describes, or resumes it."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.checkpoint import finding
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data.load import load_dataset, read_fingerprint
from flax_cnns.data.types import DamagedImage
from flax_cnns.errors import ProcessLost, UserError
from flax_cnns.runs import own_parts, tables
from flax_cnns.runs import profile as profiles
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import build_components, check_own_parts, check_run_data, initialize_jax
from flax_cnns.runs.own_parts import OpaqueObjects
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runs.session import Session
from flax_cnns.runtime import launch, output
from flax_cnns.runtime.preemption import Signals
from flax_cnns.train.profiler import parse_window
from flax_cnns.train.writer import import_wandb


@output.safe()
def run(
    config: Any,
    workdir: str | os.PathLike,
    *,
    model: Any = None,
    data: Any = None,
    optimizer: Callable | str | None = None,
    loss: Callable | str | None = None,
    metrics: Mapping[str, Callable] | Sequence[Callable | str] | None = None,
    regularizers: Sequence[Any] | None = None,
    callbacks: Sequence[Any] | None = None,
    accept_changed_data: bool = False,
    fingerprint: dict[str, Any] | None = None,
    stop_when: Callable[[int, dict[str, float]], bool] | None = None,
    profile: str = "",
) -> dict[str, Any]:
    """Trains what `config` describes and returns what it writes to `workdir/summary.json`.

    `config`: a ConfigDict such as `flax_cnns.config.default_config()`, or a dict of the fields that
    differ from it. The other arguments are the user's own parts (docs/extending.md). They replace
    the parts that the config names:

    model: a class or function that makes a linen module from the fields `config.model.*`, or a
        module. The module is called with `(images, *, train)` and returns logits f32 [N K].
    data: a `flax_cnns.Dataset`, or a function that returns one.
    optimizer: `(learning_rate_schedule, **fields) -> optax.GradientTransformation`.
    loss: `(logits f32 [N K], labels f32 [N K]) -> f32 [N]`.
    metrics: `{name: function(logits, labels f32 [N K], mask f32 [N]) -> (sum, count)}`, or a list
        of such functions, logged under their own names.
    regularizers: classes, or objects, with some of the hooks `augment`, `mix`, `penalty`,
        `gradients`, `perturb`, `constrain`, `intercept` (`train.regularizers.Regularizer`).
    callbacks: objects with some of `on_step(step, numbers)`, `on_validation(step, numbers)` and
        `on_save(step)`. The primary process calls them with plain floats.

    Importable functions and classes are recorded as "package.module:Name". Any other object works
    only with this call: the same call with the same objects resumes the run, but nothing else can
    load the run's network.

    Called again with the same config, `run` resumes from the newest intact checkpoint and gives the
    same bits as an uninterrupted run. If the data changed since the run began, `run` raises
    `ChangedData`, a UserError. With `accept_changed_data` it continues, and records the change with
    both fingerprints in `dataset.json`. `fingerprint` is the data's fingerprint, if the caller has
    just computed it; otherwise `run` reads the data of a complete run to compare them.
    `stop_when(step, metrics)` is called after each validation, on every process; if it returns True
    (on all of them), the run saves and raises `Preempted`.

    `profile`: steps such as "100:110" whose trace is written to `workdir/profile/100-110`, with a
    summary in plain text (docs/accelerators.md). This changes nothing else.

    Raises:
        UserError: for what the user can correct, also for a file that cannot be written. Printed
            output that cannot be written does not end the run.
        Preempted: after SIGTERM or SIGUSR1 (exit code 75) or Ctrl-C (130), after saving.
        KeyboardInterrupt: for Ctrl-C before the first step, and for a second Ctrl-C.
        ProcessLost: if a process that the run needs has died.
    """
    began = time.perf_counter()
    window = parse_window(profile) if profile else None
    config = configs.complete(config)
    objects = own_parts.write_to_config(
        config,
        dict(
            model=model,
            data=data,
            optimizer=optimizer,
            loss=loss,
            metrics=metrics,
            regularizers=regularizers,
            callbacks=callbacks,
        ),
    )
    configs.validate(config)
    if not os.fspath(workdir):
        raise UserError("--workdir: expected the name of a directory, got nothing")
    files.check_local(workdir, "--workdir", writes=True)
    directory, which = finding.split_source(workdir)
    if which and workdirs.has_begun(pathlib.Path(directory)):
        raise UserError(
            f"--workdir: {os.fspath(workdir)} is a checkpoint of the run {directory}; to resume"
            " that run, give its name; to start from its weights, give a new --workdir and"
            f" config.graft.source={os.fspath(workdir)}"
        )
    begun = workdirs.has_begun(pathlib.Path(workdir))
    problems = configs.find_problems(config)
    if not begun:
        configs.raise_problems(problems)
    initialize_jax(config)
    resolved = configs.to_plain(config)
    launch.check_processes_agree(
        json.dumps(resolved, sort_keys=True),
        what="the config",
        fix="start all processes with the same command and code",
    )
    workdir, primary = pathlib.Path(workdir).absolute(), jax.process_index() == 0
    with workdirs.open_workdir(workdir, primary=primary) as handle, Signals() as signals:
        if primary:
            workdirs.check_workdir(workdir, resolved, accept_changed_data=accept_changed_data)
        # Each process looks by itself. If they saw different states, one would wait forever.
        complete = (workdir / "summary.json").is_file()
        launch.check_processes_agree(
            f"{complete} {finding.all_steps(workdir)}",
            what="what the run directory holds",
            fix=f"{workdir} must be one directory that all processes see",
        )
        if complete:
            summary = workdirs.read_json(workdir / "summary.json")
            if window is not None:
                profiles.check_complete(window, workdir)
            check_complete_run(config, workdir, fingerprint, accept_changed_data, objects)
            if primary:
                print(f"{workdir} is complete; remove it to run again")
                with finding.explain_damage(
                    workdir / "summary.json", finding.REPAIRS["summary.json"]
                ):
                    tables.print_summary(summary)
            return summary
        if config.log.wandb:
            import_wandb()  # fails before the data are loaded
        components = build_components(config, objects, begun=bool(finding.all_steps(workdir)))
        change = check_run_data(workdir, components.dataset, accept_changed_data)
        record = components.describe_own_parts()
        source_notes = check_own_parts(workdir, record, begun=begun)
        plan = RunPlan(components)
        if window is not None:
            profiles.check_window(window, plan.total_steps, config.train.steps_per_call)
        problems += plan.find_problems()
        if not begun:
            configs.raise_problems(problems)
        if primary:
            print("\n".join(components.dataset.describe()))
            if problems:
                print(configs.format_note(workdir, problems))
            if change:
                workdirs.record_accepted_change(workdir, change)
            for line in (*components.own_parts.notes, *source_notes, *plan.notes):
                print(f"note: {line}")
            files.write_json(workdir / "config.json", resolved)
            if record:
                files.write_json(workdir / "own.json", record)
            workdirs.write_dataset_facts(workdir, components.dataset.as_dict())
        try:
            session = Session(plan, workdir, handle, signals, began, accept_changed_data, window)
            session.stop_when = stop_when
            return session.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {workdirs.describe_resume(workdir)}") from None
        except DamagedImage as error:
            if not workdirs.has_begun(workdir):
                raise
            # The config of a begun run cannot change, and repairing a file changes the data.
            text = f"cannot decode {error.location}: {error.cause}; repair or delete it, and then"
            resume = workdirs.describe_resume(workdir)
            raise UserError(f"{text} add --accept-changed-data; {resume}") from None
        except ProcessLost as error:
            raise ProcessLost(f"{error}; {workdirs.describe_resume(workdir)}") from None


def check_complete_run(
    config: Any,
    workdir: pathlib.Path,
    fingerprint: dict[str, Any] | None,
    accept: bool,
    objects: OpaqueObjects | None = None,
) -> None:
    """Raises `ChangedData` if a complete run's data changed and `accept` is not set.

    Data that can no longer be read cause no error, because the run's numbers stay valid.
    """
    primary = jax.process_index() == 0
    try:
        data = None
        if fingerprint is None:
            data = own_parts.make_data(config, objects)
            fingerprint = read_fingerprint(config.data, data)
        seen, facts = fingerprints.DataSnapshot(fingerprint), {}
        if "fingerprint" not in workdirs.read_dataset_facts(workdir):
            data = data or own_parts.make_data(config, objects)
            dataset = load_dataset(config.data, data=data, begun=True)  # for the counts
            seen, facts = dataset.snapshot, dataset.as_dict()
    except (UserError, OSError) as error:  # OSError: raised by the user's own function
        if primary:
            print(f"the data of {workdir} were not compared: {error}")
        return
    change = workdirs.check_data(workdir, seen, accept=accept, quiet=not primary)
    if primary and change:
        workdirs.record_accepted_change(workdir, change)
    elif primary:
        workdirs.add_fingerprint(workdir, facts)
        workdirs.record_moved_data(workdir, config.data.dir)
