r"""Compares strategies of transfer learning on data sets of different size and similarity.

flax-cnns finetune --workdir=runs/finetune --strategies=all \
    --fractions=0.01,0.1,1 --seeds=3
flax-cnns finetune --workdir=runs/own --config=configs/finetune/folder.py \
    --config.dir=FOLDER --config.source=torchvision:resnet18 --strategies=head_then_all
flax-cnns finetune --workdir=runs/smoke --strategies=scratch,features \
    --config=configs/finetune/fashion_digits.py:smoke

Writes finetune.json and finetune.png into the folder of the runs. The directory of a run is
TARGET/FRACTION/SEED/STRATEGY. If you repeat the command, complete runs are not repeated, unless
their data changed; --accept-changed-data keeps these runs too.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from flax_cnns.cli.flags import define_accept, define_config

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of all runs.", required=True)
_STRATEGIES = flags.DEFINE_list("strategies", ["all"], "Names of strategies, or all.")
_FRACTIONS = flags.DEFINE_list(
    "fractions", ["1"], "Fractions of the training examples to use, above 0 and at most 1."
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each strategy.", lower_bound=1)
_ACCEPT = define_accept()
_CONFIG = define_config("finetune/fashion_digits", runs=r"pretrain|targets\.\w+")


def finetune(argv: list[str]) -> None:
    from flax_cnns.errors import UserError
    from flax_cnns.names import make_console
    from flax_cnns.studies.finetune import compare, report

    del argv
    folder = pathlib.Path(_WORKDIR.value)
    try:
        fractions = [float(fraction) for fraction in _FRACTIONS.value]
    except ValueError:
        raise UserError(f"--fractions: expected numbers, got {_FRACTIONS.value}") from None
    options: dict[str, Any] = dict(
        strategies=_STRATEGIES.value, fractions=fractions, seeds=_SEEDS.value
    )
    result = compare.compare_strategies(
        _CONFIG.value, folder, **options, accept_changed_data=_ACCEPT.value
    )
    console = make_console(width=120)
    for table in report.make_tables(result):
        console.print(table)
    for line in report.describe_speed(result):
        print(line)
    report.save(result, folder / "finetune.json", options)
    report.draw(result, folder / "finetune.png")
    print(f"written to {folder}: finetune.json, finetune.png")
