"""`flax-cnns search tune`, by its flags."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from flax_cnns import config as configs
from flax_cnns.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError
from flax_cnns.runtime import cluster, launch

FLAGS = flags.FLAGS


def search_tune(config: Any) -> int:
    """Searches the values of the config file's `space()`, then writes the report.

    With --report, only writes the report. With --seeds, also retrains the winner and the given
    config. With --compare, compares searches instead. Of several processes, process 0 writes.
    """
    from flax_cnns.studies.search.tuning import tuner

    is_one_of_several = cluster.is_one_of_several(os.environ)
    if not is_one_of_several:
        import jax

        # This process only plans. If it opened a GPU, the trials could not use that GPU.
        jax.config.update("jax_platforms", "cpu")
    folder = pathlib.Path(FLAGS.workdir)
    if FLAGS.report:
        for name in ("compare", "dry-run", "seeds"):
            if FLAGS[name].present:
                raise UserError(f"--report only writes the report; remove it, or --{name}")
        if is_one_of_several:
            launch.initialize()
        if tuner.is_writer():
            write_report(folder)
        return 0
    if config is None:
        raise UserError("tune: expected --config")
    if FLAGS.seeds and not FLAGS.compare:
        configs.require_test(config, "--seeds trains the winner again and tests it")
    if is_one_of_several and FLAGS.seeds and not FLAGS.compare:
        raise UserError(
            "--seeds: several processes cannot train the winner again, because each of its runs"
            " has a process of its own; repeat the command without --seeds, then with --seeds in"
            " one process"
        )
    file = config_flags.get_config_filename(FLAGS["config"]).partition(":")[0]
    space = tuner.load_space(file)
    names = ("sampler", "pruner", "metric", "jobs", "seed")
    options: dict[str, Any] = {name: FLAGS[name].value for name in names}
    budget = _read_budget()
    if FLAGS.compare:
        return _compare(config, space, folder, options, budget)
    given = FLAGS.trials is not None or budget is not None
    options |= dict(trials=FLAGS.trials if given else 20, budget_steps=budget)
    if FLAGS["dry-run"].value:
        if FLAGS.stages > 1:
            from flax_cnns.studies.search.tuning.stages import check_stages

            check_stages(FLAGS.stages, options["trials"])
            print(f"{FLAGS.stages} stages share this equally; the ranges are those of stage 1:")
        tuner.show_plan(config, space, folder, **options)
        return 0
    accept = bool(FLAGS["accept-changed-data"].value)
    if FLAGS.stages > 1:
        from flax_cnns.studies.search.tuning.stages import tune_in_stages

        options["stages"] = FLAGS.stages
        tune_in_stages(config, space, folder, **options, accept_changed_data=accept)
    else:
        result = tuner.tune(config, space, folder, **options, accept_changed_data=accept)
        if tuner.is_writer():
            tuner.print_result(result)
    if not tuner.is_writer():
        return 0
    write_report(folder)
    return _retrain(folder, accept) if FLAGS.seeds else 0


def write_report(folder: pathlib.Path) -> None:
    """Writes the report of a search and prints the files' names."""
    from flax_cnns.studies.search.tuning import report

    paths = report.write(folder)
    print(f"written to {folder}: {', '.join(path.name for path in paths)}")


def _read_budget() -> int | None:
    budget = FLAGS.budget if FLAGS["budget"].present else None
    if budget is not None and not budget.is_integer():
        raise UserError(f"--budget: tune takes a number of training steps, got {budget}")
    return None if budget is None else int(budget)


def _compare(
    config: Any, space: Any, folder: pathlib.Path, options: dict[str, Any], budget: int | None
) -> int:
    """Compares searches with the pruners that --compare names."""
    from flax_cnns.studies.search.tuning import tuner
    from flax_cnns.studies.search.tuning.comparison import SearchMethod, compare_methods

    for name in ("pruner", "seed", "trials", "stages", "dry-run"):
        if FLAGS[name].present:
            raise UserError(f"--compare takes no --{name}")
    if budget is None:
        raise UserError("--compare: expected --budget, the training steps of each search")
    methods = [
        SearchMethod("full" if pruner == "none" else pruner, options["sampler"], pruner)
        for pruner in FLAGS.compare
    ]
    compare_methods(
        config,
        space,
        folder,
        methods,
        budget_steps=budget,
        seeds=FLAGS.seeds or 3,
        trials=None,
        metric=options["metric"],
        jobs=options["jobs"],
        accept_changed_data=bool(FLAGS["accept-changed-data"].value),
    )
    if tuner.is_writer():
        print(f"written to {folder}: comparison.md, comparison.csv, comparison.png")
    return 0


def _retrain(folder: pathlib.Path, accept: bool) -> int:
    """Trains the given config and the winner with --seeds seeds each, and tests them."""
    from flax_cnns.studies.search.tuning.search_record import read_search
    from flax_cnns.studies.search.tuning.winner import retrain

    search = read_search(folder)
    statuses = retrain(
        search.given,
        search.winner,
        folder,
        seeds=FLAGS.seeds,
        metric=search.metric.name,
        jobs=FLAGS.jobs,
        accept_changed_data=accept,
    )
    write_report(folder)
    if "interrupted" in statuses or "missing" in statuses:
        print("interrupted; run the same command again to resume")
        return EXIT_PREEMPTED
    return EXIT_FAULT if "failed" in statuses else 0
