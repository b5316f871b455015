r"""Searches. `scaling` is EfficientNet's: how much deeper, wider and finer a network should become.

flax-cnns search scaling --workdir=runs/scaling
flax-cnns search scaling --workdir=runs/s \
    --config=configs/scaling_small.py:fashion_mnist

The same command again repeats no complete run. It refuses if the data changed since; with
--accept-changed-data it goes on.
"""

from __future__ import annotations

import pathlib

from absl import flags

from flax_cnns.cli.flags import define_accept, define_commands, define_config

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of all its runs.", required=True)
_BUDGET = flags.DEFINE_float("budget", 2.0, "What alpha * beta^2 * gamma^2 is, within 10 %.")
_STEP = flags.DEFINE_float("step", 0.1, "Of the grid over alpha, beta and gamma.")
_PHI = flags.DEFINE_float("phi", 2.0, "Networks of budget^phi times the MACs are compared.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Of each of these.", lower_bound=1)
_ACCEPT = define_accept()
_CONFIG = define_config("scaling_small")
define_commands("scaling")


def search(argv: list[str]) -> None:
    from flax_cnns.names import make_console
    from flax_cnns.studies.search import scaling

    del argv
    folder = pathlib.Path(_WORKDIR.value)
    flags_given = dict(budget=_BUDGET.value, step=_STEP.value, phi=_PHI.value, seeds=_SEEDS.value)
    accept = _ACCEPT.value
    result = scaling.search(_CONFIG.value, folder, **flags_given, accept_changed_data=accept)
    make_console(width=120).print(scaling.make_table(result))
    alpha, beta, gamma = result.winner
    print(f"winner of the grid: alpha {alpha:g}, beta {beta:g}, gamma {gamma:g}")
    scaling.save(result, folder / "scaling.json", flags_given)
    scaling.draw(result, folder / "scaling.png")
    print(f"written to {folder}: scaling.json, scaling.png")
