"""The training step of a config for devices that this machine does not have, and its compilation.

`TargetStep` builds the step as a run does (`runs/build.py`, `runs/plan.py`), from shapes.
`compile_step` compiles it, or reads the result of an earlier compilation.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.analysis.device import program_memory
from flax_cnns.analysis.flops import count_flops
from flax_cnns.analysis.hlo import read_traffic
from flax_cnns.data.blank import make_blank_dataset
from flax_cnns.data.streams import alternates_flips
from flax_cnns.errors import UserError
from flax_cnns.runs import own_parts
from flax_cnns.runs.build import build_components, make_train_step
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runtime.topologies import GIB, CompileTarget, compile_for
from flax_cnns.train.state import TrainState

# Batches on a device that wait for their step: two in the queue of `loop.prefetch`, and one that
# its thread holds.
BATCHES_AHEAD = 3


class TargetStep:
    """The training step of a config for the devices of a target.

    `num_classes`: of a data set that is not read, see `make_blank_dataset`; 0: the data set's.
    Raises UserError for everything that the run would refuse before its first step.

    Attributes:
        devices: number of devices.
        unit: the images that a device takes must be a multiple of this number: of
            `train.accumulate`, and even if images are mixed in pairs.
        notes: what was assumed.
        per_state: bytes per device of the parameters, BatchNorm statistics, optimizer's state and
            averaged weights (EMA), which do not depend on the batch.
    """

    def __init__(self, config: Any, devices: Sequence[Any], num_classes: int = 0):
        config = config.copy_and_resolve_references()
        self.config, self.devices = config, len(devices)
        self.notes: list[str] = []
        if config.train.parallel == "pmap":
            config.train.parallel = "shard_map"
            self.notes.append("train.parallel=pmap: compiled as shard_map, which pmap calls")
        configs.validate(config)
        configs.raise_problems(configs.find_problems(config))
        dataset = None
        if "data" not in own_parts.find_references(config) and not config.data.mock:
            dataset = make_blank_dataset(config.data, num_classes)
        components = build_components(
            config, callbacks=False, devices=list(devices), dataset=dataset
        )
        self.notes += components.dataset.notes if dataset else ()
        self.components = components
        mixes = config.mix.mixup or config.mix.cutmix
        self.unit = math.lcm(config.train.accumulate, 2 if mixes else 1)
        plan = RunPlan(components)
        configs.raise_problems(plan.find_problems())
        self.state = plan.make_abstract_state()
        plan.check_norms()
        variables = {"params": self.state.params, "batch_stats": self.state.batch_stats}
        optimizer = plan.make_optimizer(variables)
        self.step: Any = make_train_step(components, optimizer, plan.steps_per_epoch)
        self.per_state = measure_state(self.state)
        if (n := config.train.steps_per_call) > 1:
            images = components.dataset.splits["train"].images
            assert images is not None  # RunPlan refuses other data
            size = format_bytes(images.size * images.dtype.itemsize)
            self.notes.append(
                f"train.steps_per_call={n}: compiled as single steps; a run also keeps all training"
                f" images on each device, {size} that are not counted here"
            )

    @property
    def batch_size(self) -> int:
        """The config's global batch."""
        return self.config.data.batch_size

    def make_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a global batch, split over the devices."""
        dataset, sharding = self.components.dataset, NamedSharding(self.components.mesh, P("batch"))
        train = dataset.splits["train"]
        images = np.dtype(np.uint8) if train.images is None else train.images.dtype
        if dataset.is_stream or self.config.data.augment.where == "loader":
            images = np.dtype(np.float32)
        labels = np.zeros(1, np.int32) if train.labels is None else train.labels
        flips = self.config.data.augment
        mirrors = alternates_flips(flips) and flips.where == "device"
        return {
            "image": jax.ShapeDtypeStruct(
                (batch_size, *dataset.image_shape), images, sharding=sharding
            ),
            "label": jax.ShapeDtypeStruct(
                (batch_size, *labels.shape[1:]), labels.dtype, sharding=sharding
            ),
        } | (
            {"mirror": jax.ShapeDtypeStruct((batch_size,), np.bool_, sharding=sharding)}
            if mirrors
            else {}
        )

    def measure_batch(self, batch_size: int) -> int:
        """Returns the bytes per device of one batch."""
        shapes = self.make_batch(batch_size).values()
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes) // self.devices

    def trace(self, batch_size: int) -> Any:
        """Traces the step for a global batch; the result has `jaxpr` and `lower()`."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        replicated = NamedSharding(self.components.mesh, P())
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
        return self.step.trace(self.state, self.make_batch(batch_size), key)


def measure_state(state: TrainState) -> dict[str, int]:
    """Returns the bytes of the parts of a training state, from its shapes."""

    def measure(tree: Any) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return {
        "parameters": measure(state.params),
        "batch_stats": measure(state.batch_stats),
        "optimizer": measure(state.opt_state),
        "ema": measure(state.ema),
    }


# ---------------------------------------------------------------------------- compilation


def find_default_folder() -> pathlib.Path:
    """Returns flax_cnns/fits under XDG_CACHE_HOME or ~/.cache, for finished compilations."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else "~/.cache"  # XDG: relative paths are ignored
    return pathlib.Path(base).expanduser() / "flax_cnns" / "fits"


class CompiledStep(NamedTuple):
    """What the compiler says about a training step. All bytes and FLOPs are per device."""

    batch_size: int  # global
    flops: int  # our own count, see analysis/flops.py
    arguments: int  # bytes of the state and one batch, with the compiler's padding
    temporaries: int  # bytes: mostly activations
    total: int  # bytes of the whole program, without batches that wait; 0 if it does not fit
    traffic: int  # bytes that kernels read and write, see analysis/hlo.py
    collectives: dict[str, list[int]]  # kind -> [count, bytes]
    seconds: float  # that the compilation took
    refusal: str = ""  # the compiler's message if the program does not fit
    quick: bool = False  # whether the compiler optimized little, see `QUICK_OPTIONS`


# The version of the entries in the cache. Increase it when `CompiledStep` or its numbers change.
_FORMAT = 1
# Options of the compiler for a batch of which only the memory is used. Without its search for the
# fastest tiles, libtpu 0.0.42 needs a quarter of the time. A program that hardly fits on the chip's
# own memory then uses some 50 MiB more of the main memory, which is less than 1 % of gigabytes.
QUICK_OPTIONS: dict[str, dict[str, float]] = {"tpu": {"exec_time_optimization_effort": -1.0}}
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*?(?:memory|HBM)[^\n]*", re.I)


def compile_step(
    step: TargetStep,
    target: CompileTarget,
    batch_size: int,
    *,
    compiler: str,
    cache: pathlib.Path,
    quick: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> CompiledStep:
    """Compiles the step for a global batch, or reads the result from the folder `cache`.

    `quick`: whether only the memory is wanted, see `QUICK_OPTIONS`.

    An entry's name is a hash of the lowered program, the target and the versions of jax and of the
    compiler. The lowered program depends on the config, this package's source and the user's own
    parts, so that an entry is never stale. `say` is called before a compilation, which takes
    minutes. A program that does not fit gives a result with a `refusal`.
    """
    traced = step.trace(batch_size)
    flops = count_flops(traced.jaxpr, target.platform)
    lowered = traced.lower()
    effort = QUICK_OPTIONS.get(target.platform, {}) if quick else {}
    parts = (
        str(_FORMAT),
        hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        json.dumps(target),
        jax.__version__,
        compiler,
        *([json.dumps(effort)] if effort else ()),
    )
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    path = cache / f"{name}.json"
    if (saved := _read_entry(path)) is not None:
        return saved
    say(f"compiling for {target.name}, batch {batch_size}")
    began = time.perf_counter()
    numbers: dict[str, Any]
    try:
        compiled = compile_for(target, lowered, effort)
    except jax.errors.JaxRuntimeError as error:
        match = _OUT_OF_MEMORY.search(str(error))
        if not match:
            raise
        zero = dict.fromkeys(("arguments", "temporaries", "total", "traffic"), 0)
        numbers = {**zero, "collectives": {}, "refusal": match[0]}
    else:
        plan, traffic = compiled.memory_analysis(), read_traffic(compiled.as_text())
        total = program_memory(compiled)
        if plan is None or total is None:
            raise UserError(f"--topology={target.name}: the compiler does not report memory")
        numbers = {
            "arguments": plan.argument_size_in_bytes,
            "temporaries": plan.temp_size_in_bytes,
            "total": total,
            "traffic": traffic.bytes,
            "collectives": {kind: list(each) for kind, each in traffic.collectives.items()},
        }
    seconds = time.perf_counter() - began
    result = CompiledStep(
        batch_size=batch_size, flops=flops, seconds=seconds, quick=bool(effort), **numbers
    )
    cache.mkdir(parents=True, exist_ok=True)
    about = {"topology": target.name, "model": step.config.model.name, "compiler": compiler}
    files.write_json(path, {**about, "step": result._asdict()})
    return result


def _read_entry(path: pathlib.Path) -> CompiledStep | None:
    """Returns the result in a file of the cache; None if there is none or it cannot be read."""
    try:
        return CompiledStep(**json.loads(path.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def format_bytes(size: float) -> str:
    """Formats bytes as "1.23 GiB", "45.6 MiB" or "7.8 KiB"."""
    if abs(size) >= GIB / 2:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if abs(size) >= 2**20 else f"{size / 2**10:.1f} KiB"
