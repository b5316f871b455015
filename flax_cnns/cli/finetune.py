r"""The strategies of transfer learning beside each other: accuracy by data size and similarity.

flax-cnns finetune --workdir=runs/finetune --strategies=all \
    --fractions=0.01,0.1,1 --seeds=3
flax-cnns finetune --workdir=runs/own --config=configs/finetune/folder.py \
    --config.dir=FOLDER --config.source=torchvision:resnet18 --strategies=head_then_all
flax-cnns finetune --workdir=runs/smoke --strategies=scratch,features \
    --config=configs/finetune/fashion_digits.py:smoke

Writes finetune.json and finetune.png into the folder beside the runs, whose directories are
TARGET/FRACTION/SEED/STRATEGY. The same command again repeats no complete run, except those whose
data changed; --accept-changed-data keeps these too.
"""

from __future__ import annotations

import pathlib

from absl import flags

from flax_cnns.cli.flags import define_accept, define_config

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of all its runs.", required=True)
_STRATEGIES = flags.DEFINE_list("strategies", ["all"], "Names of strategies, or all.")
_FRACTIONS = flags.DEFINE_list("fractions", ["1"], "Of the training examples, above 0 to 1.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Of each.", lower_bound=1)
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
    given = dict(strategies=_STRATEGIES.value, fractions=fractions, seeds=_SEEDS.value)
    accept = _ACCEPT.value
    result = compare.compare_strategies(_CONFIG.value, folder, **given, accept_changed_data=accept)
    console = make_console(width=120)
    for table in report.make_tables(result):
        console.print(table)
    for line in report.describe_speed(result):
        print(line)
    report.save(result, folder / "finetune.json", given)
    report.draw(result, folder / "finetune.png")
    print(f"written to {folder}: finetune.json, finetune.png")
