"""`train --check`: all that a run needs, tried by every process before the run is started.

    python -m flax_cnns.launch --check -- python -m experiments.train --workdir=... --config=...

After the checks of `runtime.preflight` (versions, folder, devices), every process builds the run
from its config, reads its part of the first batch, and takes one training step. The run's directory
is not changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import time
from typing import Any

import jax

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.errors import UserError
from flax_cnns.runs.build import initialize_jax, make_train_step, make_training_key, train_batches
from flax_cnns.runs.plan import RunPlan, dry_run
from flax_cnns.runtime.preflight import (
    Preflight,
    check_devices,
    check_mount,
    find_versions,
    read_seconds,
)
from flax_cnns.train import parallel
from flax_cnns.train.state import TrainState

SECONDS_OF_A_STEP = 1800.0  # to read the data, and to compile a step


def check_run(config: Any, workdir: str | os.PathLike) -> int:
    """Checks a run of `config` and prints a line for each fact. Returns the exit code, 0 or 2.

    Raises UserError if a process does not come or goes away.
    """
    files.check_local(workdir, "--workdir", writes=True)
    with Preflight(seconds=read_seconds(os.environ)) as preflight:
        preflight.compare(find_versions())
        resolved: dict[str, Any] = {}

        def resolve() -> str:
            nonlocal config
            config = configs.complete(config)
            configs.validate(config)
            resolved.update(configs.to_plain(config))
            return config.model.name

        if preflight.gather("config", resolve):
            _compare_configs(preflight, resolved)
        path = os.fspath(pathlib.Path(workdir).absolute())
        preflight.compare({"path of workdir": path})
        check_mount(preflight, path)
        if preflight.failed:
            return preflight.finish()  # what follows would fail for the same reason
        initialize_jax(config, connect=False)
        if check_devices(preflight):
            _check_step(preflight, config)
        return preflight.finish()


def _compare_configs(preflight: Preflight, resolved: dict[str, Any]) -> None:
    """Compares all fields of the config, and says the config's hash."""
    everyone = preflight.meeting.exchange({"config": json.dumps(resolved, sort_keys=True)})
    texts = [each["config"] for each in everyone]
    different = [
        f"{preflight.name(index)} has another config than process 0"
        f" ({'; '.join(configs.list_differences(json.loads(text), json.loads(texts[0])))})"
        for index, text in enumerate(texts)
        if text != texts[0]
    ]
    digest = hashlib.sha256(texts[0].encode()).hexdigest()[:12]
    preflight.say("config (SHA-256)", "; ".join(different) or digest, good=not different)


def _check_step(preflight: Preflight, config: Any) -> None:
    """Builds the run on all processes, reads a batch and takes a step."""
    built: dict[str, Any] = {}

    def build() -> str:
        # Nothing here waits for another process: one that fails would leave the others waiting.
        components, total_steps = dry_run(config)
        built["components"] = components
        with contextlib.closing(train_batches(components)) as batches:
            built["batch"] = next(itertools.chain(batches))
        dataset = components.dataset
        built["fingerprint"] = json.dumps(dataset.fingerprint, sort_keys=True)
        return f"{dataset.describe()[0]}; {total_steps} steps; a batch was read"

    if not preflight.gather("data", build, seconds=SECONDS_OF_A_STEP):
        return
    digest = hashlib.sha256(built["fingerprint"].encode()).hexdigest()[:12]
    preflight.compare({"data (SHA-256)": digest})
    if preflight.failed:
        return

    def take_step() -> str:
        components = built["components"]
        plan = RunPlan(components)
        variables = components.stack_if_scanned(components.init_variables())
        optimizer = plan.make_optimizer(variables)
        state = TrainState.create(
            variables, optimizer.init(variables["params"]), ema=config.train.ema > 0
        )
        state = parallel.replicate(state, components.mesh)
        key = parallel.replicate(make_training_key(config), components.mesh)
        step = make_train_step(components, optimizer, plan.steps_per_epoch)
        began = time.perf_counter()
        plan.check_memory(step, state, built["batch"], key)
        _, sums = step(state, built["batch"], key)
        values = jax.device_get(sums)
        seconds = time.perf_counter() - began
        loss = float(values["loss"]) / float(values["count"])
        if not math.isfinite(loss):
            raise UserError(f"the loss of the first step is {loss}")
        # The seconds differ by process; the loss must not.
        built["loss"] = f"{loss:.6g}"
        built["seconds"] = seconds
        n = config.train.steps_per_call
        note = f"; the run takes {n} in a call (train.steps_per_call)" if n > 1 else ""
        return f"was compiled and taken{note}"

    if preflight.gather("training step", take_step, seconds=SECONDS_OF_A_STEP):
        preflight.compare({"loss of the step": built["loss"]})
        if preflight.index == 0:
            print(f"{'':8}the step took {built['seconds']:.1f} s with its compilation", flush=True)
