"""Says whether a training step fits on a TPU or GPU, without having one.

flax-cnns fits --config=imagenet_resnet50:modern --topology=v5e-8
flax-cnns fits --config=imagenet_resnet50:modern --topology=h100 --check
flax-cnns fits --config=cifar10_wrn28_10 --topology=v5e-4 --config.data.batch_size=65536 --remedies
flax-cnns fits --config=mine.py --topology=v6e-8 --classes=37
flax-cnns fits --topology=v5e-8 --table=fits.csv

The real training step of the config (augmentation, mixing, EMA, optimizer, accumulation) is
compiled for the accelerator at two batches. No data are read: a known data set gives its classes
and image size, and --classes=N stands for any other. Without --classes, the data of another data
set are read.

Prints the memory of a device by its use, the largest batch, the collectives, the FLOPs and a bound
of a step's time. Exit code 2 if the config's batch does not fit; the message names one that does.
Every compilation is saved in --cache, so that a repeated command continues.

TPU topologies need pip install "flax_cnns[tpu-aot]", GPU topologies pip install
"flax_cnns[gpu-aot]", in separate environments. docs/accelerators.md explains the numbers.
"""

from __future__ import annotations

import pathlib

from absl import flags

from flax_cnns.cli.flags import define_config
from flax_cnns.errors import UserError

_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "What to compile for, as clouds name it: v5e-8, v5p-8, v6e-8, h100, ..."
)
_CHECK = flags.DEFINE_bool("check", False, "Compile the largest batch too, and correct it.")
_REMEDIES = flags.DEFINE_bool(
    "remedies", False, "Compile the batch with bfloat16, accumulate, scan and remat too."
)
_CLASSES = flags.DEFINE_integer(
    "classes", 0, "The number of classes of a data set that is not read.", lower_bound=0
)
_TABLE = flags.DEFINE_string(
    "table", "", "A CSV file: adds the rows of --recipes for this topology, and keeps the others."
)
_RECIPES = flags.DEFINE_list(
    "recipes", [], "--table: the recipes, such as digits_resnet20,imagenet_resnet50:modern."
)
_CACHE_FOLDER = flags.DEFINE_string(
    "cache",
    "",
    "The folder of finished compilations. Default: flax_cnns/fits under XDG_CACHE_HOME or"
    " ~/.cache.",
)
_CONFIG = define_config("")


def fits(argv: list[str]) -> None:
    del argv
    from flax_cnns.runtime import topologies

    if not _TOPOLOGY.value:
        names = ", ".join(topologies.list_targets())
        raise UserError(f"expected --topology=NAME, one of {names}")
    target = topologies.find_target(_TOPOLOGY.value)
    if bool(_TABLE.value) == (_CONFIG.value is not None):
        raise UserError("expected --config=RECIPE or --table=FILE.csv, one of them")
    for name in ("check", "remedies", "classes") if _TABLE.value else ("recipes",):
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} does not go with --{'table' if _TABLE.value else 'config'}")
    topologies.check_compiler(target)
    from flax_cnns.runs import fit_remedies, fit_step, fit_table, fit_text
    from flax_cnns.runs import fits as fitting

    cache = pathlib.Path(_CACHE_FOLDER.value or fit_step.find_default_folder())
    if _TABLE.value:
        fit_table.write_table(
            _TABLE.value, target, _RECIPES.value or fit_table.RECIPES, cache=cache
        )
        return
    report = fitting.find_fit(
        _CONFIG.value, target, cache=cache, check=_CHECK.value, num_classes=_CLASSES.value
    )
    print(fit_text.format_report(report))
    if _REMEDIES.value:
        print(fit_remedies.format_remedies(fit_remedies.try_remedies(report, cache=cache), report))
    fit_text.raise_if_too_large(report)
