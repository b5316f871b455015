"""`flax-cnns search tune`, by its flags."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

FLAGS = flags.FLAGS


def search_tune(config: Any) -> int:
    """Searches the values of the config file's `space()`."""
    from flax_cnns.errors import UserError
    from flax_cnns.studies.search.tuning import tuner

    if not tuner.is_one_of_several(os.environ):
        import jax

        # This process only plans. If it opened a GPU, the trials could not use that GPU.
        jax.config.update("jax_platforms", "cpu")
    folder = pathlib.Path(FLAGS.workdir)
    file = config_flags.get_config_filename(FLAGS["config"]).partition(":")[0]
    budget = FLAGS.budget if FLAGS["budget"].present else None
    if budget is not None and budget != int(budget):
        raise UserError(f"--budget: tune takes a number of training steps, got {budget}")
    options: dict[str, Any] = dict(
        trials=FLAGS.trials if FLAGS.trials is not None or budget is not None else 20,
        budget_steps=None if budget is None else int(budget),
        **{name: FLAGS[name].value for name in ("sampler", "pruner", "metric", "jobs", "seed")},
    )
    space = tuner.load_space(file)
    if FLAGS["dry-run"].value:
        tuner.show_plan(config, space, folder, **options)
        return 0
    accept = bool(FLAGS["accept-changed-data"].value)
    result = tuner.tune(config, space, folder, **options, accept_changed_data=accept)
    tuner.print_result(result)
    return 0
