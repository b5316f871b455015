"""A table of audits: one network of each family, for one or several accelerators."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.analysis import audit
from flax_cnns.analysis.audit import Finding
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import target_table
from flax_cnns.runs.audit import (
    ConfigTraces,
    StepAudit,
    audit_traces,
    make_audit_devices,
    trace_config,
)
from flax_cnns.runtime.preflight import find_versions
from flax_cnns.runtime.topologies import CompileTarget, check_compiler


class AuditedNetwork(NamedTuple):
    """A network that stands for its family, small, so that it is compiled soon."""

    name: str
    size: int = 32  # height and width of the images
    fields: Mapping[str, Any] = {}


_SMALL_INCEPTION = (  # two of GoogLeNet's modules, those with auxiliary heads
    ("mixed4a", (192, 96, 208, 16, 48, 64)),
    ("mixed4d", (112, 144, 288, 32, 64, 64)),
)
NETWORKS = {  # by family
    "lenet": AuditedNetwork("lenet5"),
    "alexnet": AuditedNetwork("alexnet", 64),
    "zfnet": AuditedNetwork("zfnet_fig3", 64),
    "cifar_resnet": AuditedNetwork("cifar_resnet20"),
    "resnet": AuditedNetwork("resnet18"),
    "resnext": AuditedNetwork("resnext50_32x4d", fields={"depths": (1, 1, 1, 1)}),
    "senet": AuditedNetwork("seresnet50", fields={"depths": (1, 1, 1, 1)}),
    "preact_resnet": AuditedNetwork("resnetv2_50", fields={"depths": (1, 1, 1, 1)}),
    "cifar_preact": AuditedNetwork("cifar_preact110", fields={"depths": (2, 2, 2)}),
    "wide_resnet": AuditedNetwork("wrn_16_4", fields={"depth": 10}),
    "shake_shake": AuditedNetwork("shakeshake_26_2x32d", fields={"depths": (1, 1, 1)}),
    "pyramidnet": AuditedNetwork(
        "pyramidnet_110_a270_shakedrop", fields={"depth": 20, "alpha": 48}
    ),
    "resnet_in_resnet": AuditedNetwork("rir_18"),
    "densenet": AuditedNetwork("densenet_bc_100_12", fields={"depth": 22}),
    "sparsenet": AuditedNetwork("sparsenet_40_24", fields={"depth": 16}),
    "sparse_densenet": AuditedNetwork("sparse_densenet_abc", fields={"depths": (3, 4, 5)}),
    "fractalnet": AuditedNetwork("fractalnet_20_droppath", fields={"columns": 2}),
    "googlenet": AuditedNetwork("googlenet_tv_aux", 64, {"table": _SMALL_INCEPTION}),
    "inception_v3": AuditedNetwork("inception_v3", 75, {"pool_projs": (32,), "widths": (128,)}),
    "inception_v4": AuditedNetwork("inception_v4", 75, {"depths": (1, 1, 1)}),
    "inception_resnet": AuditedNetwork("inception_resnet_v2", 75, {"depths": (1, 1, 1)}),
    "efficientnet": AuditedNetwork("efficientnet_b0", fields={"depth_mult": 0.1}),
    "simpnet": AuditedNetwork("simpnet_slim_300k"),
    "vgg": AuditedNetwork("cifar_vgg11_bn"),
    "squeezenet": AuditedNetwork("cifar_squeezenet1_1"),
    "xception": AuditedNetwork("xception", fields={"depth": 1}),
    "mobilenet_v1": AuditedNetwork("mobilenet_v1_025", fields={"depths": (1, 1, 1, 1, 1)}),
    "mobilenet_v2": AuditedNetwork(
        "mobilenet_v2_025", fields={"table": ((1, 16, 1, 1), (6, 24, 2, 2))}
    ),
    "mobilenet_v3": AuditedNetwork("mobilenet_v3_small"),
    "nas": AuditedNetwork("nas_v1"),
    "nas_bench_201": AuditedNetwork("nas_bench_201_resnet", fields={"depths": (1, 1, 1)}),
    "nasnet": AuditedNetwork("nasnet_a_6_768", fields={"depths": (1, 1, 1)}),
    "pnasnet": AuditedNetwork("pnasnet5_large", 48, {"depths": (1, 0)}),
    "deck_cnn": AuditedNetwork("deck003_cifar100_example"),
    "nin": AuditedNetwork("nin_cifar10"),
    "all_cnn": AuditedNetwork("all_cnn_c"),
    "dsn": AuditedNetwork("dsn"),
    "highway": AuditedNetwork("highway_19"),
    "airbench": AuditedNetwork("airbench94"),
    "convnext": AuditedNetwork("convnext_atto", fields={"depths": (1, 1, 1, 1)}),
    "vit": AuditedNetwork("vit_tiny_patch16_224", fields={"patch": 4, "depth": 2}),
}
IMAGES_PER_DEVICE = 2


def make_config(network: AuditedNetwork, devices: int) -> Any:
    """Returns a config that trains the network on CIFAR-10 in bfloat16, with most of what a step
    may do: augmentation, mixing, label smoothing, momentum, weight decay and EMA."""
    config = configs.default_config()
    fields = {f"model.{name}": value for name, value in network.fields.items()}
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                "model.name": network.name,
                "model.dtype": "bfloat16",
                "data.name": "cifar10",
                "data.image_size": network.size,
                "data.batch_size": IMAGES_PER_DEVICE * devices,
                "data.eval_batch_size": devices,
                "data.augment.pad_crop": 4,
                "data.augment.flip": True,
                "mix.mixup": 0.2,
                "mix.label_smoothing": 0.1,
                "optimizer.weight_decay": (1e-4,),
                "train.ema": 0.999,
            }
            | fields
        )
    return config


COLUMNS = (
    *("family", "model", "fields", "topology", "devices", "dtype", "image_size", "batch"),
    *("norms", *audit.CHECKS, "compiled_all_reduces_count", "temporaries_mib"),
    *("findings", "seconds", "jax", "compiler", "code"),
)
MAX_SHOWN = 3  # findings in a row of the table


def write_table(
    path: str,
    targets: Sequence[CompileTarget],
    families: Sequence[str],
    *,
    compile: bool = False,
    devices: Sequence[Any] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, str]]:
    """Adds a row for each family's network and target to a CSV file, after each network.

    Returns these rows. A row is made again if this package's code, jax or the compiler are others
    now, or if it is to be compiled and was not. Other rows stay. `devices`: see
    `make_audit_devices`, which makes them if None. Raises UserError for an unknown family, and if
    the file is not such a table.
    """
    families = families or list(NETWORKS)
    for family in families:
        if family not in NETWORKS:
            raise UserError(f"--families: unknown {family!r}{did_you_mean(family, NETWORKS)}")
    target_table.read_rows(path, COLUMNS, "model")  # refuses another file before it lowers
    files.check_writable(path)
    about = {"jax": jax.__version__, "code": find_versions()["flax_cnns (code)"], "compiler": ""}
    if compile:
        about["compiler"] = check_compiler(targets[0])
    devices = make_audit_devices(targets, compile=compile) if devices is None else devices
    made = []
    for number, family in enumerate(families, 1):
        network = NETWORKS[family]
        traces: dict[int, ConfigTraces] = {}  # by number of devices
        for target in targets:
            rows = target_table.read_rows(path, COLUMNS, "model")
            row = rows.get((network.name, target.name))
            if row is None or not is_current(row, about, compile):
                say(f"{number} of {len(families)}: {network.name} for {target.name}")
                began, count = time.perf_counter(), target.devices
                if count not in traces:
                    traces[count] = trace_config(make_config(network, count), devices[:count])
                result = audit_traces(traces[count], target, compile=compile)
                seconds = {"seconds": f"{time.perf_counter() - began:.0f}"}
                row = make_row(family, target, traces[count].config, result) | about | seconds
                target_table.add_row(path, COLUMNS, "model", row)
            made.append(row)
    return made


def is_current(row: Mapping[str, str], about: Mapping[str, str], compile: bool) -> bool:
    """Whether a row of the table need not be made again."""
    names = ("jax", "code", *(["compiler"] if compile else []))
    return all(row[name] == about[name] for name in names)


def make_row(family: str, target: CompileTarget, config: Any, result: StepAudit) -> dict[str, str]:
    """Returns the row of an audit, without what it depends on."""
    fields = NETWORKS[family].fields if family in NETWORKS else {}
    temporaries = result.temporaries
    return {
        "family": family,
        "model": config.model.name,
        "fields": " ".join(f"{name}={value}" for name, value in fields.items()),
        "topology": target.name,
        "devices": str(target.devices),
        "dtype": config.model.dtype,
        "image_size": str(config.data.image_size),
        "batch": str(config.data.batch_size),
        "norms": str(result.norms),
        **{check: result.judge(check) for check in audit.CHECKS},
        "compiled_all_reduces_count": "" if result.all_reduces is None else str(result.all_reduces),
        "temporaries_mib": "" if temporaries is None else f"{temporaries / 2**20:.2f}",
        "findings": format_findings(result.findings),
    }


def format_findings(findings: Sequence[Finding]) -> str:
    """Returns the first findings in one line."""
    more = [f"{len(findings) - MAX_SHOWN} more"] if len(findings) > MAX_SHOWN else []
    return "; ".join([*map(str, findings[:MAX_SHOWN]), *more])


_SHOWN = ("family", "model", "topology", "norms", *audit.CHECKS, "findings")


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Formats rows for the console: yes, no, or - for a check that was not made."""
    lines = [_SHOWN, *(tuple(row[name] or "-" for name in _SHOWN) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def raise_if_failed(rows: Sequence[Mapping[str, str]]) -> None:
    """Raises UserError, which names the first finding, if a row has one."""
    failed = [row for row in rows if row["findings"]]
    if failed:
        first = failed[0]
        raise UserError(
            f"{len(failed)} of {len(rows)} networks fail the audit for {first['topology']}; the"
            f" first is {first['model']}: {first['findings']}"
        )
