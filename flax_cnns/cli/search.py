r"""Searches over networks and settings.

scaling: the best way to scale up a network, as in the EfficientNet paper.

flax-cnns search scaling --workdir=runs/scaling
flax-cnns search scaling --workdir=runs/s \
    --config=configs/scaling_small.py:fashion_mnist

`scaling` searches a grid of factors for depth (alpha), width (beta) and resolution (gamma).

If you repeat a command, complete runs are not repeated. If the data changed, the command ends with
an error; with --accept-changed-data it continues. docs/search.md has a section for each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from flax_cnns.cli import search_scaling
from flax_cnns.cli.flags import define_accept, define_commands, define_config
from flax_cnns.errors import UserError

flags.DEFINE_string("workdir", "", "The folder of the search's runs.")
flags.DEFINE_integer("seeds", 0, "Number of seeds of each final network; 0: 3.", lower_bound=0)
flags.DEFINE_float(
    "budget", 2.0, "scaling: the value of alpha * beta^2 * gamma^2 in the grid, within 10 %."
)
flags.DEFINE_float("step", 0.1, "scaling: step of the grid over alpha, beta and gamma.")
flags.DEFINE_float(
    "phi", 2.0, "scaling: the final comparison is between networks with budget^phi times the MACs."
)
define_accept()
_CONFIG = define_config("scaling_small", only="scaling")


class SearchKind(NamedTuple):
    """A kind of search."""

    search: Callable[[Any], int | None]  # takes the config; returns the exit code
    flags: tuple[str, ...]  # that it takes
    required: tuple[str, ...] = ("workdir",)


KINDS: dict[str, SearchKind] = {
    "scaling": SearchKind(
        search_scaling.search_scaling,
        ("config", "workdir", "seeds", "budget", "step", "phi", "accept-changed-data"),
    ),
}
define_commands(*KINDS)


def search(argv: list[str]) -> int | None:
    kind = KINDS[argv[1]]
    _check_flags(argv[1], kind)
    return kind.search(_CONFIG.value)


def _check_flags(name: str, kind: SearchKind) -> None:
    """Raises UserError for a flag that this kind does not take, and for one that it lacks."""
    known = [*flags.FLAGS.flags_by_module_dict()[__name__], flags.FLAGS["config"]]
    for flag in known:
        if flag.present and flag.name not in kind.flags:
            takers = [other for other, each in KINDS.items() if flag.name in each.flags]
            raise UserError(f"{name} takes no --{flag.name}; {', '.join(takers)} would")
    for flag_name in kind.required:
        if not flags.FLAGS[flag_name].value:
            raise UserError(f"{name}: expected --{flag_name}")
