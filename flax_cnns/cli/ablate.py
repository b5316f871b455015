r"""Runs an ablation: rows of changes to one config, each with several seeds.

flax-cnns ablate --config=configs/ablations/regularizers.py:digits --seeds=3 \
    --workdir=runs/regular
flax-cnns ablate --config=configs/ablations/regularizers.py:digits --seeds=3 \
    --workdir=runs/regular --dry-run
flax-cnns ablate --workdir=runs/regular --report --interval=bootstrap --metric=loss
flax-cnns ablate --workdir=runs/regular --report --margin=0.5

Reports the results as a table with confidence intervals. The config file has a function sweep()
that yields (name, {field: value, ...}) for each row, with the baseline first. A cell is a row with
one seed: a run in WORKDIR/ROW/seedS. If you repeat the command, complete cells are not run again,
unless their data changed; --accept-changed-data keeps these cells too. Exit codes: 1 if cells
failed, 75 if cells were interrupted, 130 after Ctrl-C.
"""

from __future__ import annotations

from typing import Any

from absl import flags
from ml_collections import config_flags

from flax_cnns.cli.flags import define_accept, define_config
from flax_cnns.errors import EXIT_FAULT, EXIT_PREEMPTED

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the ablation's runs.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each row.", lower_bound=1)
_JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "How many cells run at once. On GPUs, each cell has one GPU, and all GPUs are used by default."
    " On a CPU, cells share the cores equally; the default is 1.",
    lower_bound=1,
)
_ROWS = flags.DEFINE_list("rows", [], "Run only these rows, by name.")
_INDEX = flags.DEFINE_integer("index", None, "Run only this cell, counted from 0, for job arrays.")
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Only show the plan and the time that it will take.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the report of the complete cells.")
_INTERVAL = flags.DEFINE_enum("interval", "t", ["t", "bootstrap"], "Kind of interval.")
_MARGIN = flags.DEFINE_float(
    "margin",
    None,
    "The largest difference that does not matter, in points for accuracies. The report then says"
    " which rows are equivalent to the baseline, or not worse.",
)
_METRIC = flags.DEFINE_string(
    "metric",
    "accuracy",
    "The metric to report, by its NAME in test/NAME in the log: loss, for example, or your own.",
)
_ACCEPT = define_accept()
_CONFIG = define_config("ablations/regularizers")


def ablate(argv: list[str]) -> int:
    import jax

    # This process only plans. If it opened a GPU, the cells could not use that GPU.
    jax.config.update("jax_platforms", "cpu")
    from flax_cnns.analysis.statistics import check_margin
    from flax_cnns.studies.ablation import ablate as ablation
    from flax_cnns.studies.ablation import plan

    del argv
    folder = _WORKDIR.value
    if _MARGIN.value is not None:
        check_margin(_MARGIN.value)
    if _REPORT.value:
        ablation.write_report(
            folder, interval=_INTERVAL.value, metric=_METRIC.value, margin=_MARGIN.value
        )
        return 0
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    sweep = plan.load_sweep(file)
    options: dict[str, Any] = dict(
        seeds=_SEEDS.value,
        jobs=_JOBS.value,
        rows=_ROWS.value,
        index=_INDEX.value,
        metric=_METRIC.value,
    )
    if _DRY_RUN.value:
        ablation.show_plan(_CONFIG.value, sweep, folder, **options)
        return 0
    options |= dict(
        interval=_INTERVAL.value, margin=_MARGIN.value, accept_changed_data=_ACCEPT.value
    )
    statuses = ablation.ablate(_CONFIG.value, sweep, folder, **options)
    if "interrupted" in statuses or "missing" in statuses:
        print("interrupted; run the same command again to resume")
        return EXIT_PREEMPTED
    return EXIT_FAULT if "failed" in statuses else 0
