r"""Runs an ablation: rows of changes to one config, each with several seeds.

flax-cnns ablate --config=configs/ablations/regularizers.py:digits --seeds=3 \
    --workdir=runs/regular
flax-cnns ablate --config=configs/ablations/regularizers.py:digits --seeds=3 \
    --workdir=runs/regular --dry-run
flax-cnns ablate --workdir=runs/regular --report --interval=bootstrap --metric=loss
flax-cnns ablate --workdir=runs/regular --report --margin=0.5 --power=0.5
flax-cnns ablate --config=configs/ablations/regularizers_tuned.py:digits --tune=8 \
    --workdir=runs/tuned
flax-cnns ablate --config=configs/ablations/regularizers.py:digits --seeds=5 --width=1 \
    --most=20 --workdir=runs/precise --baseline=runs/regular
flax-cnns ablate --join a/report.csv b/report.csv --workdir=runs/joined --power=1

Reports the results as a table with confidence intervals. The config file has a function sweep()
that yields (name, {field: value, ...}) for each row, with the baseline first. With --tune=N, each
row, the baseline included, first gets N trials on the validation split over the file's space() and
the row's own space, the third part of a row; its cells have the best values. A cell is a row with
one seed: a run in WORKDIR/ROW/seedS. If you repeat the command, complete cells are not run again,
unless their data changed; --accept-changed-data keeps these cells too. With --join, makes one
report of the report.csv of several pieces of an ablation, each with its own baseline, in WORKDIR;
nothing is trained. Exit codes: 1 if cells failed, 75 if cells were interrupted, 130 after Ctrl-C.
"""

from __future__ import annotations

from typing import Any

from absl import flags
from ml_collections import config_flags

from flax_cnns.cli.flags import define_accept, define_arguments, define_config
from flax_cnns.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the ablation's runs.", required=True)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Number of seeds of each row. With --tune, 0 only tunes.", lower_bound=0
)
_TUNE = flags.DEFINE_integer(
    "tune",
    None,
    "Tune each row with this number of trials before its cells run. Needs the extra tune (Optuna).",
    lower_bound=1,
)
_WIDTH = flags.DEFINE_float(
    "width",
    None,
    "Add seeds until the 95 % interval of each row's difference is at most this wide, in points for"
    " accuracies, or there are --most seeds.",
)
_MOST = flags.DEFINE_integer("most", None, "Largest number of seeds with --width.", lower_bound=1)
_BASELINE = flags.DEFINE_string(
    "baseline",
    None,
    "The workdir of another ablation. Its complete cells with the config, data and seeds of this"
    " baseline are used instead of training them again.",
)
_JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "How many cells run at once. On GPUs, each cell has one GPU, and all GPUs are used by default."
    " On a CPU, cells share the cores equally; the default is 1.",
    lower_bound=1,
)
_ROWS = flags.DEFINE_list("rows", [], "Run only these rows, by name.")
_INDEX = flags.DEFINE_integer(
    "index",
    None,
    "Run only this cell, counted from 0, for job arrays. With --tune and --seeds=0: tune only this"
    " row.",
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Only show the plan and the time that it will take.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the report of the complete cells.")
_JOIN = flags.DEFINE_bool(
    "join", False, "Only write one report of the rows of several report.csv, see the top."
)
_INTERVAL = flags.DEFINE_enum("interval", "t", ["t", "bootstrap"], "Kind of interval.")
_MARGIN = flags.DEFINE_float(
    "margin",
    None,
    "The largest difference that does not matter, in points for accuracies. The report then says"
    " which rows are equivalent to the baseline, or not worse.",
)
_POWER = flags.DEFINE_float(
    "power",
    None,
    "A difference in points for accuracies. The report then says how many seeds each row needs to"
    " find it with 80 % probability, judging by the complete cells.",
)
_METRIC = flags.DEFINE_string(
    "metric",
    "accuracy",
    "The metric to report, by its NAME in test/NAME in the log: loss, for example, or your own.",
)
_ACCEPT = define_accept()
_CONFIG = define_config("ablations/regularizers")
_FILES = "one or more report.csv of ablations"
define_arguments(_FILES, "[--join REPORT.csv...]", least=0)

_JOIN_FLAGS = ("workdir", "join", "report", "interval", "margin", "power", "metric")


def ablate(argv: list[str]) -> int:
    import jax

    # This process only plans. If it opened a GPU, the cells could not use that GPU.
    jax.config.update("jax_platforms", "cpu")
    from flax_cnns.analysis.power import check_difference
    from flax_cnns.analysis.statistics import check_margin
    from flax_cnns.studies.ablation import ablate as ablation
    from flax_cnns.studies.ablation import plan, tuning

    folder = _WORKDIR.value
    if _MARGIN.value is not None:
        check_margin(_MARGIN.value)
    if _POWER.value is not None:
        check_difference(_POWER.value)
    forms: dict[str, Any] = dict(interval=_INTERVAL.value, margin=_MARGIN.value, power=_POWER.value)
    if _JOIN.value:
        _join(argv[1:], forms)
        return 0
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --; --join takes files")
    if _REPORT.value:
        ablation.write_report(folder, metric=_METRIC.value, **forms)
        return 0
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    sweep = plan.load_sweep(file)
    options: dict[str, Any] = dict(
        seeds=_SEEDS.value,
        jobs=_JOBS.value,
        rows=_ROWS.value,
        index=_INDEX.value,
        metric=_METRIC.value,
        tune=_TUNE.value,
        space=tuning.load_space(file) if _TUNE.value is not None else {},
        width=_WIDTH.value,
        most=_MOST.value,
        baseline=_BASELINE.value,
    )
    options |= forms | dict(accept_changed_data=_ACCEPT.value, dry_run=_DRY_RUN.value)
    statuses = ablation.ablate(_CONFIG.value, sweep, folder, **options)
    if "interrupted" in statuses or "missing" in statuses:
        print("interrupted; run the same command again to resume")
        return EXIT_PREEMPTED
    return EXIT_FAULT if "failed" in statuses else 0


def _join(files: list[str], forms: dict[str, Any]) -> None:
    ours = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[__name__]}
    for name in flags.FLAGS:
        is_ours = name in ours or name.startswith("config.")
        if flags.FLAGS[name].present and is_ours and name not in _JOIN_FLAGS:
            raise UserError(f"--{name} does not go with --join, which trains nothing")
    if not files:
        raise UserError(f"--join: expected {_FILES}, got none")
    from flax_cnns.studies.ablation.joining import join

    paths = join(files, _WORKDIR.value, metric=_METRIC.value, **forms)
    print(f"written to {_WORKDIR.value}: {', '.join(path.name for path in paths)}")
