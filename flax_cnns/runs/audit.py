"""Audits a training step: what its program for an accelerator must not contain.

`audit_config` lowers the real training step of a config for a target, with the devices' own
BatchNorms and with synchronized ones, and optionally compiles it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from flax_cnns.analysis import audit
from flax_cnns.analysis.audit import Finding
from flax_cnns.analysis.hlo import read_traffic
from flax_cnns.runs.fit_step import TargetStep, format_bytes
from flax_cnns.runtime.topologies import CompileTarget, make_devices, make_stand_ins


class StepAudit(NamedTuple):
    """The findings of a training step. `numbers` are per device."""

    findings: tuple[Finding, ...]
    norms: int  # BatchNorms
    compiled: bool
    all_reduces: int | None  # of the compiled step; None: not compiled
    temporaries: int | None  # bytes, of the compiled step

    def judge(self, check: str) -> str:
        """Returns yes, no, or "" for a check that was not made."""
        if any(one.check == check for one in self.findings):
            return "no"
        of_compiled = check.startswith("compiled_") or check == "aliased"
        return "" if of_compiled and not self.compiled else "yes"


def make_audit_devices(target: CompileTarget, *, compile: bool) -> list[Any]:
    """Returns the target's devices, or CPU devices in their place if nothing is compiled.

    Call it before JAX's first operation. Raises UserError as `make_devices` does.
    """
    return make_devices(target) if compile else make_stand_ins(target)


def audit_config(
    config: Any,
    target: CompileTarget,
    devices: Sequence[Any],
    *,
    compile: bool = False,
    num_classes: int = 0,
) -> StepAudit:
    """Audits the training step of a config at its batch size.

    A network with BatchNorm is lowered twice, with `train.sync_batchnorm` on and off. The compiled
    program is that of the config, or the one with synchronized BatchNorm if there are several
    devices. Products may be in float32 if `model.dtype` is float32. Raises UserError as
    `TargetStep` does.
    """
    step = TargetStep(config, devices, num_classes)
    norms = count_norms(step.state.batch_stats)
    variants = {bool(config.train.sync_batchnorm): step}
    if norms and not step.components.own_parts.network:
        other = config.copy_and_resolve_references()
        other.train.sync_batchnorm = not config.train.sync_batchnorm
        variants[other.train.sync_batchnorm] = TargetStep(other, devices, num_classes)
    wide = None if config.model.dtype == "float32" else audit.FLOAT32_MODULES
    findings: dict[Finding, None] = {}  # without repetitions, in order
    counted = temporaries = None
    for is_synchronized, variant in sorted(variants.items()):
        allowed = norms if is_synchronized else 0
        traced = variant.trace(variant.batch_size)
        platform = {"gpu": "cuda"}.get(target.platform, target.platform)
        lowered = traced.lower(lowering_platforms=(platform,))
        found = audit.check_lowered(
            lowered.as_text(debug_info=True),
            norms=allowed,
            convolutions=audit.list_convolutions(traced.jaxpr),
            float32_modules=wide,
        )
        found += check_one_trace(variant, traced)
        if compile and is_synchronized == max(variants):
            compiled = lowered.compile(compiler_options=dict(target.compiler_options))
            text = compiled.as_text()
            found += audit.check_compiled(text, norms=allowed, float32_modules=wide)
            total = read_traffic(text).collectives.get("all-reduce")
            counted = total.calls if total else 0
            plan = compiled.memory_analysis()
            temporaries = plan.temp_size_in_bytes if plan else None
        findings |= dict.fromkeys(found)
    return StepAudit(tuple(findings), norms, compile, counted, temporaries)


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
