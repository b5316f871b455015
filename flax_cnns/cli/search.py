r"""Searches for the best way to scale up a network, as in the EfficientNet paper.

flax-cnns search scaling --workdir=runs/scaling
flax-cnns search scaling --workdir=runs/s \
    --config=configs/scaling_small.py:fashion_mnist

`scaling` searches a grid of factors for depth (alpha), width (beta) and resolution (gamma). If you
repeat the command, complete runs are not repeated. If the data changed, the command ends with an
error; with --accept-changed-data it continues.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from flax_cnns.cli.flags import define_accept, define_commands, define_config

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the search's runs.", required=True)
_BUDGET = flags.DEFINE_float(
    "budget", 2.0, "Value of alpha * beta^2 * gamma^2 in the grid, within 10 %."
)
_STEP = flags.DEFINE_float("step", 0.1, "Step of the grid over alpha, beta and gamma.")
_PHI = flags.DEFINE_float(
    "phi", 2.0, "The final comparison is between networks with budget^phi times the MACs."
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Number of seeds of each network in the final comparison.", lower_bound=1
)
_ACCEPT = define_accept()
_CONFIG = define_config("scaling_small")
define_commands("scaling")


def search(argv: list[str]) -> None:
    from flax_cnns.names import make_console
    from flax_cnns.studies.search import scaling

    del argv
    folder = pathlib.Path(_WORKDIR.value)
    options: dict[str, Any] = dict(
        budget=_BUDGET.value, step=_STEP.value, phi=_PHI.value, seeds=_SEEDS.value
    )
    result = scaling.search(_CONFIG.value, folder, **options, accept_changed_data=_ACCEPT.value)
    make_console(width=120).print(scaling.make_table(result))
    alpha, beta, gamma = result.winner
    print(f"winner of the grid: alpha {alpha:g}, beta {beta:g}, gamma {gamma:g}")
    scaling.save(result, folder / "scaling.json", options)
    scaling.draw(result, folder / "scaling.png")
    print(f"written to {folder}: scaling.json, scaling.png")
