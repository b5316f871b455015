"""Tries what makes a training step need less memory: bfloat16, accumulation, scan, remat."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax_cnns.errors import UserError
from flax_cnns.runs.fit_step import CompiledStep, TargetStep, compile_step, format_bytes
from flax_cnns.runs.fits import FitReport, measure_total

MAX_PIECES = 64  # of an accumulated batch


class Remedy(NamedTuple):
    """A change of the config, and what the compiler says about the same batch with it."""

    changes: dict[str, Any]  # config field -> value
    compiled: CompiledStep | None  # None if the change is not possible
    total: int  # bytes per device; 0 if the compiler refused or the change is not possible
    fits: bool
    reason: str = ""  # why the change is not possible

    @property
    def command(self) -> str:
        """The flags that make the change."""
        return " ".join(f"--config.{field}={value}" for field, value in self.changes.items())


def try_remedies(
    report: FitReport,
    *,
    cache: pathlib.Path,
    devices: Sequence[Any] | None = None,
    say: Callable[[str], None] = print,
) -> list[Remedy]:
    """Compiles the config's batch with each change, and with all together if none alone fits.

    Returns first what needs the fewest FLOPs, and of these what needs the least memory; then the
    changes that are not possible. `devices` and `say` are as in `find_fit`.
    """
    if devices is None:
        devices = list(report.step.components.mesh.devices.flat)
    singles = [_try(report, changes, devices, cache, say) for changes in list_changes(report)]
    possible = [one for one in singles if one.compiled is not None]
    if len(possible) > 1 and not any(one.fits for one in possible):
        changes = {field: value for one in possible for field, value in one.changes.items()}
        singles.append(_try(report, changes, devices, cache, say))
    return sort_remedies(singles)


def sort_remedies(remedies: Sequence[Remedy]) -> list[Remedy]:
    """Sorts by FLOPs, then memory; changes that are not possible come last."""

    def rank(one: Remedy) -> tuple:
        if one.compiled is None:
            return (True, 0, 0, 0)
        return (False, one.compiled.flops, not one.total, one.total)

    return sorted(remedies, key=rank)


def list_changes(report: FitReport) -> list[dict[str, Any]]:
    """Returns the changes to try: those that the config does not have yet."""
    config = report.step.config
    changes: list[dict[str, Any]] = []
    if config.model.dtype != "bfloat16":
        changes.append({"model.dtype": "bfloat16"})
    if pieces := find_pieces(report):
        changes.append({"train.accumulate": pieces})
    changes += [{f"model.{name}": True} for name in ("scan", "remat") if not config.model.get(name)]
    return changes


def find_pieces(report: FitReport) -> int | None:
    """Returns the smallest number of pieces, the config's times a power of two, with which the
    batch should fit by the line of memory; None if no number divides a device's images.

    Without a line, or if no number is enough: the largest.
    """
    images = report.batch_size // report.step.devices
    before = report.step.config.train.accumulate
    pieces, found = 2 * before, None
    while pieces <= MAX_PIECES and images % pieces == 0:
        found = pieces
        line = report.model
        if line is not None:
            # Only the images of a piece have activations at a time; all of them are in memory.
            activations = line.per_image * images * before / pieces
            if line.fixed + activations <= report.target.memory:
                break
        pieces *= 2
    return found


def _try(
    report: FitReport,
    changes: dict[str, Any],
    devices: Sequence[Any],
    cache: pathlib.Path,
    say: Callable[[str], None],
) -> Remedy:
    config = report.step.config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    flags = ", ".join(f"{field}={value}" for field, value in changes.items())
    try:
        step = TargetStep(config, devices, report.step.components.num_classes)
    except UserError as error:
        return Remedy(changes, None, 0, False, str(error))
    compiled = compile_step(
        step,
        report.target,
        report.batch_size,
        compiler=report.compiler,
        cache=cache,
        say=lambda text: say(f"{text}, {flags}"),
    )
    if compiled.refusal:
        return Remedy(changes, compiled, 0, False)
    total = measure_total(step, compiled)
    return Remedy(changes, compiled, total, total <= report.target.memory)


def format_remedies(remedies: Sequence[Remedy], report: FitReport) -> str:
    """Formats the remedies as a table, with FLOPs relative to the config's own step."""
    lines = [f"remedies at batch {report.batch_size}, those with the fewest FLOPs first:"]
    flops = {one.batch_size: one.flops for one in report.compilations}[report.batch_size]
    width = max((len(one.command) for one in remedies), default=0)
    for one in remedies:
        if one.compiled is None:
            lines.append(f"  {one.command:{width}}  not possible: {one.reason}")
            continue
        memory = f"{format_bytes(one.total)} a device" if one.total else "refused by the compiler"
        fits = "fits" if one.fits else "does not fit"
        times = f"{one.compiled.flops / flops:.2f} x FLOPs" if flops else ""
        lines.append(f"  {one.command:{width}}  {times}, {memory}, {fits}")
    return "\n".join(lines)
