"""Says whether the training step of a config fits on an accelerator, and which batch would.

The step is compiled at two batches. Memory is close to linear in the batch, so two points give what
a device needs in any case and what it needs for each image.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax_cnns.analysis.device import find_peak
from flax_cnns.runs.fit_step import (
    BATCHES_AHEAD,
    CompiledStep,
    TargetStep,
    compile_step,
)
from flax_cnns.runtime.topologies import CompileTarget, check_compiler, make_devices

# Above this share of the memory, the compilers recompute activations by themselves, and memory is
# no longer a line: CIFAR ResNet-20 in float32 on an H100 took 42.9 GiB for 30012 images, and 59.30
# of 59.32 GiB for 60000.
CALM = 0.8
MAX_CHECKS = 3  # compilations of the answer
GOOD_ENOUGH = 0.02  # the answer is checked again if it changes by more than this share


class MemoryModel(NamedTuple):
    """The memory of a device as a line over the number of its images."""

    fixed: float  # bytes
    per_image: float  # bytes

    @classmethod
    def through(cls, a: tuple[int, float], b: tuple[int, float]) -> MemoryModel:
        """Returns the line through two points (images per device, bytes)."""
        slope = (b[1] - a[1]) / (b[0] - a[0])
        return cls(a[1] - slope * a[0], slope)

    def find_largest(self, memory: float, unit: int) -> int | None:
        """Returns the most images per device, a multiple of `unit`, that fit into `memory`.

        0 if `unit` images do not fit; None if memory does not grow with the images.
        """
        if self.per_image <= 0:
            return None
        return max(0, int((memory - self.fixed) / self.per_image) // unit * unit)


class Bound(NamedTuple):
    """A lower bound of the time of a step, by the roofline model."""

    compute: float | None  # seconds: FLOPs over the peak FLOP/s; None if the peak is not known
    memory: float  # seconds: bytes moved over the memory's bandwidth
    peak_source: str

    @property
    def seconds(self) -> float:
        return max(self.compute or 0.0, self.memory)

    @property
    def limit(self) -> str:
        """What limits the step: compute or memory."""
        return "compute" if (self.compute or 0.0) > self.memory else "memory"


class FitReport(NamedTuple):
    """Whether and how a config's training step fits on a target. Bytes are per device."""

    target: CompileTarget
    step: TargetStep
    compiled: CompiledStep  # at the config's batch, or the largest compiled batch that fits
    model: MemoryModel | None  # None if only one batch could be compiled
    batch_size: int  # the config's
    fits: bool
    largest: int | None  # global batch; 0: none fits; None: not known
    checked: bool  # whether `largest` was compiled
    bound: Bound | None
    compiler: str
    compilations: tuple[CompiledStep, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes per device by their use; their sum is `total`."""
        one, compiled = self.step.measure_batch(self.compiled.batch_size), self.compiled
        parts = {**self.step.per_state, "batch": one, "waiting_batches": BATCHES_AHEAD * one}
        known = sum(self.step.per_state.values()) + one
        parts["padding"] = max(0, compiled.arguments - known)
        parts["temporaries"] = compiled.temporaries
        parts["results"] = self.total - sum(parts.values())
        return parts

    @property
    def total(self) -> int:
        """Bytes per device with the batches that wait for their step."""
        return measure_total(self.step, self.compiled)


def measure_total(step: TargetStep, compiled: CompiledStep) -> int:
    """Returns the bytes per device of a compiled step and the batches that wait."""
    return compiled.total + BATCHES_AHEAD * step.measure_batch(compiled.batch_size)


class Prober:
    """Compiles one step at several batches. `memory` is what a device has."""

    def __init__(
        self,
        step: TargetStep,
        target: CompileTarget,
        *,
        compiler: str,
        cache: pathlib.Path,
        say: Callable[[str], None] = print,
    ):
        self.step, self.target, self.compiler = step, target, compiler
        self.cache, self.say = cache, say
        self.done: dict[int, CompiledStep] = {}  # by images per device

    def compile(self, images: int, *, quick: bool = False) -> bool:
        """Compiles the step at a number of images per device; returns whether it fits.

        `quick`: see `compile_step`.
        """
        if images not in self.done:
            # Compilations of one step take about equally long, and quick ones less.
            last = max((c.seconds for c in self.done.values() if not c.refusal), default=0.0)
            hint = f" (the last took {last:.0f} s)" if last else ""
            self.done[images] = compile_step(
                self.step,
                self.target,
                images * self.step.devices,
                compiler=self.compiler,
                cache=self.cache,
                quick=quick,
                say=lambda text: self.say(text + hint),
            )
        return self.fits(images)

    def fits(self, images: int) -> bool:
        """Whether a compiled number of images fits."""
        compiled = self.done[images]
        return not compiled.refusal and self.measure(images) <= self.target.memory

    @property
    def accepted(self) -> list[int]:
        """The compiled numbers of images per device that the compiler did not refuse, sorted."""
        return [n for n in sorted(self.done) if not self.done[n].refusal]

    @property
    def calm(self) -> list[int]:
        """Those of `accepted` that need at most the share `CALM` of the memory."""
        return [n for n in self.accepted if self.measure(n) <= CALM * self.target.memory]

    def fit_line(self) -> MemoryModel | None:
        """Returns the line through the two largest of the `calm` batches; without two of these,
        through the smallest two that the compiler accepted; None without two."""
        points = self.calm[-2:] if len(self.calm) > 1 else self.accepted[:2]
        if len(points) < 2:
            return None
        low, high = ((n, self.measure(n)) for n in points)
        return MemoryModel.through(low, high)

    def find_largest(self) -> int | None:
        """Returns the most images per device that fit, by the line; None if it says nothing.

        Never more than the compiler refused, and never less than what was compiled and fits.
        """
        line, unit = self.fit_line(), self.step.unit
        largest = line.find_largest(self.target.memory, unit) if line else None
        refused = [n for n in self.done if not self.fits(n)]
        good = [n for n in self.done if self.fits(n)]
        if largest is not None and refused:
            largest = min(largest, min(refused) - unit)
        if largest is not None and good:
            largest = max(largest, *good)
        if largest is None and refused:
            return 0 if min(refused) == unit else max(good, default=None)
        return largest

    def measure(self, images: int) -> int:
        """Returns the bytes per device at a compiled number of images."""
        return measure_total(self.step, self.done[images])


def find_fit(
    config: Any,
    target: CompileTarget,
    *,
    cache: pathlib.Path,
    check: bool = False,
    num_classes: int = 0,
    devices: Sequence[Any] | None = None,
    say: Callable[[str], None] = print,
) -> FitReport:
    """Compiles the training step of `config` for `target` and reports whether it fits.

    `cache`: the folder of compilations, which a killed command continues with. `check`: whether to
    compile the largest batch too, and to correct it. `num_classes`: see `TargetStep`. `devices`:
    None makes compile-only devices. Raises UserError for a config that no run takes, and as
    `topologies.make_devices`.
    """
    compiler = check_compiler(target) if devices is None else f"jaxlib {target.platform}"
    devices = make_devices(target) if devices is None else devices
    step = TargetStep(config, devices, num_classes)
    for note in step.notes:
        say(f"note: {note}")
    prober = Prober(step, target, compiler=compiler, cache=cache, say=say)
    wanted = step.batch_size // step.devices
    step.trace(step.batch_size)  # refuses a batch that a device cannot split or mix
    prober.compile(wanted)
    find_second_point(prober, wanted)
    largest = check_answer(prober) if check else prober.find_largest()
    complete = [n for n in prober.accepted if not prober.done[n].quick]
    shown = wanted if wanted in complete else max(complete, default=wanted)
    compiled = prober.done[shown]
    return FitReport(
        target=target,
        step=step,
        compiled=compiled,
        model=prober.fit_line(),
        batch_size=step.batch_size,
        fits=prober.fits(wanted),
        largest=None if largest is None else largest * step.devices,
        checked=largest in prober.done,
        bound=None if compiled.refusal else find_bound(compiled, target, devices[0], config),
        compiler=compiler,
        compilations=tuple(prober.done.values()),
    )


def find_second_point(prober: Prober, wanted: int) -> None:
    """Compiles what is missing for a line, after `wanted` images per device were compiled.

    The second batch is half of what the first one suggests to fit; if this is near the first one,
    it is twice or half of the first. A line through two small batches says little about a large
    one: a TPU keeps the activations of few images on the chip. A third batch is compiled if less
    than two are `calm`.

    Only the memory of these batches is used, so their compilation is quick, except near the first
    one, where a small difference would turn the line.
    """
    unit, memory = prober.step.unit, prober.target.memory

    def round_down(images: float) -> int:
        return max(unit, int(images) // unit * unit)

    images = wanted
    while prober.done[images].refusal and images > unit:
        needed = read_needed_memory(prober.done[images].refusal)
        share = min(0.5, 0.7 * memory / needed) if needed else 0.25
        images = round_down(images * share)
        prober.compile(images)
    if prober.done[images].refusal:
        return
    guess = images * memory / prober.measure(images)
    second = round_down(guess / 2)
    if images / 2 < second < 2 * images:
        is_small = images == unit or 2 * images <= CALM * guess
        second = 2 * images if is_small else round_down(images / 2)

    def compile(other: int) -> None:
        prober.compile(other, quick=other >= 2 * images or other <= images / 2)

    compile(second)
    while prober.done[second].refusal and second > images + unit:
        second = round_down((images + second) / 2)
        compile(second)
    lowest = prober.accepted[0]
    if len(prober.calm) < 2 and lowest > unit:
        compile(round_down(lowest / 2))


def read_needed_memory(refusal: str) -> float | None:
    """Returns the bytes that a refused program needs, from libtpu's message; None if it does not
    say so.

    Two forms are known: "required for HLO temporaries (128.00G) exceeds" and "required 242.08G
    exceeds".
    """
    match = re.search(r"required\D*?\(?([\d.]+)([MGT])\)? exceeds", refusal)
    scale = {"M": 2**20, "G": 2**30, "T": 2**40}
    return float(match[1]) * scale[match[2]] if match else None


def check_answer(prober: Prober) -> int | None:
    """Compiles the largest batch that should fit, corrects it at most `MAX_CHECKS` times, and
    returns the largest number of images per device that was compiled and fits.

    Returns 0 if none fits.
    """
    unit, memory = prober.step.unit, prober.target.memory
    images = prober.find_largest()
    for _ in range(MAX_CHECKS):
        if not images or images in prober.done:
            break
        if prober.compile(images):
            better = prober.find_largest()
            if better is None or better <= images * (1 + GOOD_ENOUGH):
                break
            images = better
            continue
        refusal = prober.done[images].refusal
        needed = read_needed_memory(refusal) if refusal else prober.measure(images)
        low = max((n for n in prober.done if prober.fits(n)), default=0)
        if low and needed and needed > memory:  # between the largest that fits and this one
            line = MemoryModel.through((low, prober.measure(low)), (images, needed))
            # Compilers that recompute need a little more than the memory, whatever the batch.
            smaller = min(images - unit, int(images * (1 - GOOD_ENOUGH)) // unit * unit)
            images = min(line.find_largest(memory, unit) or 0, smaller)
        else:
            images = int(images * 0.9) // unit * unit
    return max((n for n in prober.done if prober.fits(n)), default=0)


def find_bound(compiled: CompiledStep, target: CompileTarget, device: Any, config: Any) -> Bound:
    """Returns the roofline bound of a step. The peak is that of `config.model.dtype`."""
    peak = find_peak(device, config.model.dtype)
    return Bound(
        compute=None if peak is None else compiled.flops / peak.flops,
        memory=compiled.traffic / target.bandwidth,
        peak_source="" if peak is None else peak.source,
    )
