"""The text of a `FitReport`, and the error if a config's batch does not fit."""

from __future__ import annotations

from flax_cnns.errors import UserError
from flax_cnns.runs.fit_step import BATCHES_AHEAD, format_bytes
from flax_cnns.runs.fits import FitReport, measure_total

_NAMES = {
    "parameters": "parameters",
    "batch_stats": "BatchNorm statistics",
    "optimizer": "optimizer's state",
    "ema": "averaged weights (EMA)",
    "batch": "one batch",
    "waiting_batches": f"{BATCHES_AHEAD} batches that wait",
    "padding": "padding of these arrays",
    "temporaries": "activations and other temporaries",
    "results": "results that reuse no argument",
}


def format_report(report: FitReport) -> str:
    """Formats a report for the console."""
    step, compiled, target = report.step, report.compiled, report.target
    lines = [
        f"{step.config.model.name}, {step.config.model.dtype}, on {target.name}"
        f" ({target.devices} x {format_bytes(target.memory)} usable), compiled by"
        f" {report.compiler} at batch {compiled.batch_size}"
    ]
    if compiled.refusal:
        return "\n".join([*lines, f"the compiler refused: {compiled.refusal}"])
    rows = [(_NAMES[name], size) for name, size in report.parts.items() if size]
    rows.append(("total per device", report.total))
    lines += [f"  {name:34} {format_bytes(size):>12}" for name, size in rows]
    lines[-1] += f"  {report.total / target.memory:.1%} of the memory"
    if target.memory_is_lower_bound:
        lines.append("  a lower bound: cuDNN's workspaces are not counted")
    if report.model:
        per_image = format_bytes(report.model.per_image)
        lines.append(f"  {format_bytes(report.model.fixed)} in any case + {per_image} per image")
    kinds = [
        f"{count} {kind} of {format_bytes(size)} in all"
        for kind, (count, size) in compiled.collectives.items()
    ]
    lines.append(f"collectives: {', '.join(kinds) or 'none'}")
    intensity = compiled.flops / max(1, compiled.traffic)
    lines.append(
        f"per step and device: {compiled.flops / 1e12:.3f} TFLOP, {format_bytes(compiled.traffic)}"
        f" moved, {intensity:.0f} FLOP per byte"
    )
    if report.bound:
        compute = report.bound.compute
        peak = f"{1e3 * compute:.2f} ms" if compute is not None else "peak not known"
        lines.append(
            f"roofline bound (not a forecast): at least {1e3 * report.bound.seconds:.2f} ms a step,"
            f" by {report.bound.limit} (compute {peak}, memory {1e3 * report.bound.memory:.2f} ms,"
            " without caches)"
        )
    lines.append(f"largest batch: {describe_largest(report)}")
    return "\n".join(lines)


def describe_largest(report: FitReport) -> str:
    """Returns the largest batch in words, and whether it was compiled."""
    if report.largest is None:
        return "not known, since memory does not grow with the batch"
    if report.largest == 0:
        return "none fits"
    how = "compiled" if report.checked else "by the line through two batches; --check compiles it"
    return f"{report.largest} ({how})"


def raise_if_too_large(report: FitReport) -> None:
    """Raises UserError, which names the batch that fits, if the config's batch does not fit."""
    if report.fits:
        return
    compiled = {one.batch_size: one for one in report.compilations}[report.batch_size]
    need = f"the compiler says {compiled.refusal!r}"
    if not compiled.refusal:
        need = (
            f"a device needs {format_bytes(measure_total(report.step, compiled))} of"
            f" {format_bytes(report.target.memory)}"
        )
    known = report.largest is not None
    fits = "no batch fits" if known else "which batch fits is not known"
    fits = f"batch {report.largest} fits" if report.largest else fits
    if report.largest and not report.checked:
        fits += " by estimate (--check compiles it)"
    raise UserError(
        f"data.batch_size={report.batch_size} does not fit on {report.target.name}: {need}; {fits};"
        " --remedies tries accumulate, bfloat16, scan and remat"
    )
