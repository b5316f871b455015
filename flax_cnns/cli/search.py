r"""Searches over networks and settings.

sanity: the checks of a config that come before any search.
scaling: the best way to scale up a network, as in the EfficientNet paper.
tune: the best values of a config's fields, by trials on the validation split.
nas: the best architecture of a space.

flax-cnns search sanity --config=digits_lenet5 --workdir=runs/sanity

`sanity` checks the network, data, loss, optimizer and learning rate of a run's config, and writes a
page that says what is wrong, what is fine and what to try. It exits with 0 if nothing is wrong, and
with 1 if something is. Without --workdir it only prints. It takes one to three minutes for the
digits on two CPU cores, and never reads the test split. Repeated, it makes the checks that WORKDIR
lacks.

flax-cnns search scaling --workdir=runs/scaling
flax-cnns search scaling --workdir=runs/s \
    --config=configs/scaling_small.py:fashion_mnist
flax-cnns search tune --workdir=runs/tune --config=configs/digits_lenet5.py \
    --trials=20 --pruner=median
flax-cnns search tune --workdir=runs/t --config=configs/digits_lenet5.py \
    --budget=20000 --pruner=hyperband --dry-run
flax-cnns search tune --workdir=runs/stages --config=configs/search_digits.py \
    --trials=40 --stages=2 --seeds=5
flax-cnns search tune --workdir=runs/tune --report
flax-cnns search tune --workdir=runs/compare --config=configs/search_digits.py \
    --compare=none,hyperband --budget=3024 --sampler=random --seeds=3

flax-cnns search nas --space=layers --workdir=runs/nas --config=configs/digits_nas.py \
    --layers=4 --trials=64
flax-cnns search nas --space=layers --workdir=runs/nas --config=configs/digits_nas.py \
    --layers=4 --trials=64 --method=random
flax-cnns search nas --space=cells --workdir=runs/cells
flax-cnns search nas --space=cells --workdir=runs/table --table \
    --data-dir=DIR

`scaling` searches a grid of factors for depth (alpha), width (beta) and resolution (gamma).

`tune` searches the fields that space() in the config file names. A trial is a run in
WORKDIR/trials/N. It is never tested, and its value is its best validation. At the end, report.md,
trials.csv, pictures and winner.py, the config of the best trial, are written.

`nas` proposes networks, trains each for a short time, and learns from its validation accuracy. The
space `layers` has the filters and skips of Zoph & Le 2016. The space `cells` has 729 cells of
NAS-Bench-201's kind. A table has the accuracy of each, so that --seeds searches of each method, by
default 20, take a minute. --table trains the cells again, for about 15 minutes on one CPU core.

If you repeat a command, complete runs are not repeated. If the data changed, the command ends with
an error; with --accept-changed-data it continues. docs/search.md has a section for each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from flax_cnns.cli import search_nas, search_sanity, search_scaling, search_tune
from flax_cnns.cli.flags import define_accept, define_commands, define_config
from flax_cnns.errors import UserError

flags.DEFINE_string("workdir", "", "The folder of the search's runs.")
flags.DEFINE_integer(
    "seeds",
    0,
    "Number of seeds of each final network; 0: 3. tune: of the given config and of the winner,"
    " which are trained again and tested; 0: none. nas, cells: searches of each method; 0: 20.",
    lower_bound=0,
)
flags.DEFINE_float(
    "budget",
    2.0,
    "scaling: the value of alpha * beta^2 * gamma^2 in the grid, within 10 %. tune: no trial begins"
    " once the trials have taken so many training steps.",
)
flags.DEFINE_float("step", 0.1, "scaling: step of the grid over alpha, beta and gamma.")
flags.DEFINE_float(
    "phi", 2.0, "scaling: the final comparison is between networks with budget^phi times the MACs."
)
flags.DEFINE_integer(
    "trials",
    None,
    "tune, nas: number of trials, with those that are there already; nas: 64, cells: 50.",
)
flags.DEFINE_string("sampler", "tpe", "tune: how values are drawn: tpe, random, qmc or grid.")
flags.DEFINE_string(
    "pruner", "none", "tune: which trials stop early: none, median, halving or hyperband."
)
flags.DEFINE_string(
    "metric",
    "auto",
    "tune: the validation metric that is searched for, as in train.best_by; auto: that of the"
    " config.",
)
flags.DEFINE_integer(
    "jobs",
    None,
    "tune, nas: how many trials run at once. On GPUs, each trial has one GPU, and all GPUs are used"
    " by default. On a CPU, trials share the cores equally; the default is 1.",
    lower_bound=1,
)
flags.DEFINE_integer("seed", None, "tune: seed of the draws; by default that of the config.")
flags.DEFINE_integer(
    "stages",
    1,
    "tune: number of stages, coarse to fine, that share the trials: each has ranges around the best"
    " trials of the one before.",
    lower_bound=1,
)
flags.DEFINE_bool("report", False, "tune: only write the report of the trials that have ended.")
flags.DEFINE_list(
    "compare",
    [],
    "tune: compare searches with these pruners, such as none,hyperband, at --budget training steps"
    " each, with --seeds seeds (3).",
)
flags.DEFINE_bool("dry-run", False, "tune, nas: only show the plan and the time that it will take.")
flags.DEFINE_string("space", "", "nas: the space of networks: layers or cells.")
flags.DEFINE_bool("table", False, "nas, cells: make the table of all cells again. Takes long.")
flags.DEFINE_string(
    "data-dir", "", "nas, cells, with --table: the folder of Fashion-MNIST's four IDX files."
)
flags.DEFINE_string(
    "method", "controller", "nas: who proposes networks: controller (REINFORCE), or random."
)
flags.DEFINE_integer("layers", 4, "nas, layers: number of layers.", lower_bound=1)
flags.DEFINE_bool("skips", True, "nas, layers: whether skip connections are searched.")
flags.DEFINE_bool("strides", False, "nas, layers: whether strides are searched.")
flags.DEFINE_string(
    "child-duration",
    "",
    "nas, layers: how long a proposed network trains, such as '8 epochs'; by default as long as the"
    " config's network.",
)
flags.DEFINE_float("controller-rate", 6e-4, "nas: learning rate of the controller.")
flags.DEFINE_integer(
    "update-every",
    8,
    "nas: the controller learns after so many trials, which --jobs may train at once.",
    lower_bound=1,
)
flags.DEFINE_float(
    "entropy", 0.0, "nas: weight of the controller's entropy, which keeps it exploring; 0: none."
)
flags.DEFINE_list(
    "checks", [], "sanity: which checks: inputs, loss, layers, overfit, rate, capacity; '': all."
)
flags.DEFINE_integer(
    "steps",
    0,
    "sanity: steps of the range test and of each short training; 0: 100, and as many as take about"
    " a minute on two CPU cores.",
    lower_bound=0,
)
define_accept()
_CONFIG = define_config("scaling_small", only="scaling")


class SearchKind(NamedTuple):
    """A kind of search."""

    search: Callable[[Any], int | None]  # takes the config; returns the exit code
    flags: tuple[str, ...]  # that it takes
    required: tuple[str, ...] = ("workdir",)


KINDS: dict[str, SearchKind] = {
    "sanity": SearchKind(
        search_sanity.check_sanity, ("config", "workdir", "checks", "steps"), ("config",)
    ),
    "scaling": SearchKind(
        search_scaling.search_scaling,
        ("config", "workdir", "seeds", "budget", "step", "phi", "accept-changed-data"),
    ),
    "tune": SearchKind(
        search_tune.search_tune,
        (
            *("config", "workdir", "trials", "budget", "sampler", "pruner", "metric", "jobs"),
            *("seed", "seeds", "stages", "report", "compare", "dry-run", "accept-changed-data"),
        ),
    ),
    "nas": SearchKind(
        search_nas.search_nas,
        (
            *("config", "workdir", "space", "method", "trials", "seeds", "jobs", "layers", "skips"),
            *("strides", "child-duration", "controller-rate", "update-every", "entropy"),
            *("table", "data-dir", "dry-run", "accept-changed-data"),
        ),
        required=("workdir", "space"),
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
