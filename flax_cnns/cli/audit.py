"""Checks the compiled training step of a network for what makes it slow or wrong on a TPU or GPU.

flax-cnns audit --config=imagenet_resnet50:modern --topology=h100-8
flax-cnns audit --config=mine.py --topology=v5e-8 --classes=37 --compile
flax-cnns audit --table=audit.csv --topology=v5e-8,h100-8
flax-cnns audit --table=audit.csv --topology=h100-8 --families=resnet,vit --compile

Lowers the real training step of the config for an accelerator that this machine does not have, with
BatchNorm synchronized and not, and checks that it has: no float32 convolution or matrix product but
the head, no call of the host, no convolution as a CPU computes it, no all-reduce but two per
synchronized norm, a donated state, and a result of the same types. With --compile, the compiled
program is checked too.

With --table, one network of each family is audited in bfloat16, on small images. The rows that the
CSV file has already are kept, so that a repeated command continues.

Exit code 2 if a check fails; each failure names the operation and its module. Only --compile needs
a compiler: those of flax-cnns fits, pip install "flax_cnns[tpu-aot]" or "flax_cnns[gpu-aot]".
docs/accelerators.md explains the checks.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import define_config
from flax_cnns.errors import UserError

_TOPOLOGY = flags.DEFINE_list(
    "topology", [], "What to lower for, as clouds name it: v5e-8, v5p-8, h100, h100-8, ..."
)
_COMPILE = flags.DEFINE_bool("compile", False, "Check the compiled program too; takes minutes.")
_CLASSES = flags.DEFINE_integer(
    "classes", 0, "The number of classes of a data set that is not read.", lower_bound=0
)
_TABLE = flags.DEFINE_string(
    "table", "", "A CSV file: adds a row for one network of each family, and keeps the others."
)
_FAMILIES = flags.DEFINE_list("families", [], "--table: only these, such as resnet,vit.")
_CONFIG = define_config("")


def audit(argv: list[str]) -> None:
    del argv
    from flax_cnns.runtime import topologies

    if not _TOPOLOGY.value:
        names = ", ".join(topologies.list_targets())
        raise UserError(f"expected --topology=NAME, one or several of {names}")
    targets = [topologies.find_target(name) for name in _TOPOLOGY.value]
    if bool(_TABLE.value) == (_CONFIG.value is not None):
        raise UserError("expected --config=RECIPE or --table=FILE.csv, one of them")
    for name in ("classes",) if _TABLE.value else ("families",):
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} does not go with --{'table' if _TABLE.value else 'config'}")
    if _COMPILE.value:
        topologies.check_compiler(targets[0])
    from flax_cnns.runs import audit as auditing
    from flax_cnns.runs import audit_table

    if _TABLE.value:
        rows = audit_table.write_table(
            _TABLE.value, targets, _FAMILIES.value, compile=_COMPILE.value
        )
        print(audit_table.format_table(rows))
        audit_table.raise_if_failed(rows)
        return
    config, failed = _CONFIG.value, []
    devices = auditing.make_audit_devices(targets, compile=_COMPILE.value)
    for target in targets:
        traces = auditing.trace_config(config, devices[: target.devices], _CLASSES.value)
        result = auditing.audit_traces(traces, target, compile=_COMPILE.value)
        print(f"{config.model.name} for {target.name}\n{auditing.format_audit(result)}")
        failed += [f"{target.name}: {finding}" for finding in result.findings]
    if failed:
        raise UserError(f"the training step of {config.model.name} for {failed[0]}")
