r"""Ablations: rows of changes to one config, each with several seeds, and a table with intervals.

flax-cnns ablate --config=configs/ablations/regularizers.py:digits --seeds=3 \
    --workdir=runs/regular
flax-cnns ablate --config=configs/ablations/regularizers.py:digits --seeds=3 \
    --workdir=runs/regular --dry-run
flax-cnns ablate --workdir=runs/regular --report --interval=bootstrap --metric=loss

The config's file has a function sweep() that yields (name, {field: value, ...}), the baseline
first. A cell is a row with a seed, a run in WORKDIR/ROW/seedS. The same command again repeats no
complete cell, except those whose data changed; --accept-changed-data keeps these too. Exit codes: 1
if cells failed, 75 if some were interrupted, 130 after Ctrl-C.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from flax_cnns.cli.flags import define_accept, define_config
from flax_cnns.errors import EXIT_FAULT, EXIT_PREEMPTED

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of all its runs.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Of each row.", lower_bound=1)
_JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "Cells at once: on GPUs one each (all where this is not given), on a CPU its cores in equal"
    " parts (1).",
    lower_bound=1,
)
_ROWS = flags.DEFINE_list("rows", [], "Only these, by name.")
_INDEX = flags.DEFINE_integer("index", None, "Only this cell, from 0: for arrays of a cluster.")
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Only show the plan and what it will take.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the report of what is complete.")
_INTERVAL = flags.DEFINE_enum("interval", "t", ["t", "bootstrap"], "Of the report.")
_METRIC = flags.DEFINE_string(
    "metric", "accuracy", "Of the report: NAME of test/NAME in the log, such as loss, or your own."
)
_ACCEPT = define_accept()
_CONFIG = define_config("ablations/regularizers")


def ablate(argv: list[str]) -> int:
    import jax

    # This process plans; a GPU that it opened would be lost to the cells.
    jax.config.update("jax_platforms", "cpu")
    from flax_cnns.studies.ablation import ablate as ablation
    from flax_cnns.studies.ablation import plan

    del argv
    folder = _WORKDIR.value
    if _REPORT.value:
        ablation.write_report(folder, interval=_INTERVAL.value, metric=_METRIC.value)
        return 0
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    sweep = plan.load_sweep(file)
    given = dict(seeds=_SEEDS.value, jobs=_JOBS.value, rows=_ROWS.value, index=_INDEX.value)
    given |= dict(metric=_METRIC.value)
    if _DRY_RUN.value:
        ablation.show_plan(_CONFIG.value, sweep, folder, **given)
        return 0
    given |= dict(interval=_INTERVAL.value, accept_changed_data=_ACCEPT.value)
    found = ablation.ablate(_CONFIG.value, sweep, folder, **given)
    if "interrupted" in found or "missing" in found:
        print("interrupted; run the same command again to resume")
        return EXIT_PREEMPTED
    return EXIT_FAULT if "failed" in found else 0
