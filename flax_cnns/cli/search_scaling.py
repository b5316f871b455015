"""`flax-cnns search scaling`, by its flags."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

FLAGS = flags.FLAGS


def search_scaling(config: Any) -> int:
    """Searches for the best way to scale the network up."""
    from flax_cnns.names import make_console
    from flax_cnns.studies.search import scaling

    folder = pathlib.Path(FLAGS.workdir)
    seeds = FLAGS.seeds or 3
    options: dict[str, Any] = dict(budget=FLAGS.budget, step=FLAGS.step, phi=FLAGS.phi, seeds=seeds)
    accept = bool(FLAGS["accept-changed-data"].value)
    result = scaling.search(config, folder, **options, accept_changed_data=accept)
    make_console(width=120).print(scaling.make_table(result))
    alpha, beta, gamma = result.winner
    print(f"winner of the grid: alpha {alpha:g}, beta {beta:g}, gamma {gamma:g}")
    scaling.save(result, folder / "scaling.json", options)
    scaling.draw(result, folder / "scaling.png")
    print(f"written to {folder}: scaling.json, scaling.png")
    return 0
