"""Audits a training step: what its program for an accelerator must not contain.

`trace_config` traces the real training step of a config, with each device's own BatchNorms and with
synchronized ones. `audit_traces` lowers it for a target, optionally compiles it, and checks both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from flax_cnns.analysis import audit
from flax_cnns.analysis.audit import Finding
from flax_cnns.analysis.hlo import read_traffic
from flax_cnns.errors import UserError
from flax_cnns.runs.fit_step import TargetStep, format_bytes
from flax_cnns.runtime.topologies import CompileTarget, compile_for, make_devices, make_stand_ins


class StepAudit(NamedTuple):
    """The findings of a training step."""

    findings: tuple[Finding, ...]
    norms: int  # BatchNorms
    compiled: bool
    all_reduces: int | None  # of the compiled step; None: not compiled
    temporaries: int | None  # bytes per device, of the compiled step
    lowered: bool = True  # False: the step calls the host, and cannot be lowered

    def judge(self, check: str) -> str:
        """Returns yes, no, or "" for a check that was not made."""
        if any(one.check == check for one in self.findings):
            return "no"
        if check in audit.OF_TRACE:
            return "yes"
        of_compiled = check.startswith("compiled_") or check == "aliased"
        return "yes" if self.lowered and (self.compiled or not of_compiled) else ""


def make_audit_devices(targets: Sequence[CompileTarget], *, compile: bool) -> list[Any]:
    """Returns the devices of one target, or CPU devices in the place of those of any target.

    To be compiled, a program needs the real ones. Call it before JAX's first operation. Raises
    UserError as `make_devices` does, and if a program is to be compiled for several targets.
    """
    if not compile:
        return make_stand_ins(max(target.devices for target in targets))
    if len(targets) > 1:
        raise UserError(
            "--compile: expected one --topology, since each compiler is installed alone"
        )
    return make_devices(targets[0])


class ConfigTraces(NamedTuple):
    """The traced training step of a config, with synchronized BatchNorms and without."""

    config: Any
    norms: int  # BatchNorms
    steps: dict[bool, tuple[TargetStep, Any]]  # is synchronized -> the step, its trace


def trace_config(config: Any, devices: Sequence[Any], num_classes: int = 0) -> ConfigTraces:
    """Traces the step of a config at its batch size, for `devices`.

    A network with BatchNorm is traced twice, with `train.sync_batchnorm` on and off, unless it is
    an own one. Raises UserError as `TargetStep` does.
    """
    step = TargetStep(config, devices, num_classes)
    norms = count_norms(step.state.batch_stats)
    steps = {bool(config.train.sync_batchnorm): step}
    if norms and not step.components.own_parts.network:
        other = config.copy_and_resolve_references()
        other.train.sync_batchnorm = not config.train.sync_batchnorm
        steps[other.train.sync_batchnorm] = TargetStep(other, devices, num_classes)
    traces = {key: (one, one.trace(one.batch_size)) for key, one in sorted(steps.items())}
    return ConfigTraces(config, norms, traces)


def audit_traces(
    traces: ConfigTraces, target: CompileTarget, *, compile: bool = False
) -> StepAudit:
    """Audits a traced training step for a target, whose devices it was traced for if `compile`.

    The compiled program is the one with synchronized BatchNorm if there are two. Products may be in
    float32 if `model.dtype` is float32. A step that calls the host is neither lowered nor compiled:
    JAX refuses that without the device.
    """
    of_traces: list[Finding] = []
    for step, traced in traces.steps.values():
        of_traces += [*audit.check_callbacks(traced.jaxpr), *check_one_trace(step, traced)]
    findings = dict.fromkeys(of_traces)  # without repetitions, in order
    if any(one.check == "callbacks" for one in of_traces):
        return StepAudit(tuple(findings), traces.norms, False, None, None, lowered=False)
    wide = None if traces.config.model.dtype == "float32" else audit.FLOAT32_MODULES
    platform = {"gpu": "cuda"}.get(target.platform, target.platform)
    counted = temporaries = None
    for is_synchronized, (_, traced) in traces.steps.items():
        allowed = traces.norms if is_synchronized else 0
        lowered = traced.lower(lowering_platforms=(platform,))
        found = audit.check_lowered(
            lowered.as_text(debug_info=True),
            norms=allowed,
            convolutions=audit.list_convolutions(traced.jaxpr),
            float32_modules=wide,
        )
        if compile and is_synchronized == max(traces.steps):
            compiled = compile_for(target, lowered)
            text = compiled.as_text()
            found += audit.check_compiled(text, norms=allowed, float32_modules=wide)
            total = read_traffic(text).collectives.get("all-reduce")
            counted = total.calls if total else 0
            plan = compiled.memory_analysis()
            temporaries = plan.temp_size_in_bytes if plan else None
        findings |= dict.fromkeys(found)
    return StepAudit(tuple(findings), traces.norms, compile, counted, temporaries)


def count_norms(batch_stats: Any) -> int:
    """Returns the number of BatchNorms; those of stacked blocks count one by one."""
    means = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(batch_stats)
        if jax.tree_util.keystr(path[-1:], simple=True) == "mean"
    ]
    return sum(leaf.shape[0] if leaf.ndim > 1 else 1 for leaf in means)


def check_one_trace(step: TargetStep, traced: Any) -> list[Finding]:
    """Returns findings if the step would be traced again for the state that it returned."""
    names = [
        f"state{jax.tree_util.keystr(path)}" for path, _ in jax.tree.leaves_with_path(step.state)
    ]
    return audit.check_types(traced.jaxpr.in_avals, traced.jaxpr.out_avals, names)


_VERDICTS = {"yes": "yes", "no": "NO", "": "not checked"}


def format_audit(result: StepAudit) -> str:
    """Formats an audit for the console: a line for each check, then the findings."""
    lines = [
        f"{_VERDICTS[result.judge(check)]:11}  {check}: {meaning}"
        for check, meaning in audit.CHECKS.items()
    ]
    if result.all_reduces is not None:
        lines.append(f"{result.all_reduces} all-reduces in the compiled step")
    if result.temporaries is not None:
        lines.append(f"{format_bytes(result.temporaries)} of temporaries per device")
    return "\n".join([*lines, *(f"failed: {finding}" for finding in result.findings)])
