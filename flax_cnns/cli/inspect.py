"""Lists the tree of a checkpoint with shapes, dtypes and sizes, or the layers of a network.

flax-cnns inspect runs/digits
flax-cnns inspect runs/digits@best --depth=2
flax-cnns inspect runs/digits@1200 --filter='params/head/.*' --verify
flax-cnns inspect path/of/an/orbax/checkpoint
flax-cnns inspect --model=vgg16 --cost
flax-cnns inspect --model=googlenet_2014 --cost --depth=1 --size=256x320
flax-cnns inspect runs/digits --cost --csv=layers.csv

RUN alone means the checkpoint that was tested for summary.json; in an unfinished run, the latest.
The paths are those that the rules of `graft` use. Like a rule, a filter must match the whole path.

--cost shows for each layer its output, parameters, multiply-adds (MACs), the values and bytes of
its output, and its receptive field: how many pixels a position of the output sees, and how many
pixels lie between two positions. `image` stands for outputs that see the whole image. Pooling has
rows too. The total of activations is that of the rows. No weights are read. --model is a network's
name, or package.module:Name with --trust.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import define_arguments, define_trust
from flax_cnns.errors import UserError

_DEPTH = flags.DEFINE_integer("depth", 0, "Number of levels of the tree to show; 0: all.")
_FILTER = flags.DEFINE_string("filter", "", "Show only leaves whose whole path matches this regex.")
_VERIFY = flags.DEFINE_bool("verify", False, "Read the shown leaves and check their CRC32s.")
_COST = flags.DEFINE_bool("cost", False, "Show the table of the network's layers instead.")
_MODEL = flags.DEFINE_string("model", "", "--cost: the network, if there is no run.")
_SIZE = flags.DEFINE_string(
    "size", "", "--cost: SIDE or HEIGHTxWIDTH of the images. Default: the network's or the run's."
)
_BATCH = flags.DEFINE_integer("batch", 1, "--cost: number of images.", lower_bound=1)
_CSV = flags.DEFINE_string("csv", "", "--cost: a file to write the rows to.")
_TRUST = define_trust()
define_arguments(
    "a run (RUN, RUN@best, RUN@latest, RUN@1200) or the path of a checkpoint",
    "[RUN|PATH]",
    most=1,
    least=0,
)

_OF_COST = ("model", "size", "batch", "csv", "trust")
_OF_CHECKPOINTS = ("filter", "verify")


def inspect(argv: list[str]) -> None:
    wrong = _OF_CHECKPOINTS if _COST.value else _OF_COST
    for name in wrong:
        if flags.FLAGS[name].present:
            needs = "does not go with" if _COST.value else "needs"
            raise UserError(f"--{name} {needs} --cost")
    if not _COST.value:
        if not argv[1:]:
            raise UserError(
                "expected a run (RUN, RUN@best, RUN@latest, RUN@1200) or the path of a"
                " checkpoint, got none; for a network without a run: --model=NAME --cost"
            )
        from flax_cnns.checkpoint.listing import print_listing

        print_listing(argv[1], depth=_DEPTH.value, pattern=_FILTER.value, verify=_VERIFY.value)
        return
    if bool(argv[1:]) == bool(_MODEL.value):
        raise UserError("--cost: expected a run or --model=NAME, one of them")
    from flax_cnns.runs import layer_table

    if _MODEL.value:
        network = layer_table.find_network(_MODEL.value, _SIZE.value, trust=_TRUST.value)
    else:
        network = layer_table.find_network_of_run(argv[1], _SIZE.value, trust=_TRUST.value)
    table = layer_table.make_layer_table(network, batch=_BATCH.value, depth=_DEPTH.value)
    layer_table.print_layer_table(table, network.title)
    if _CSV.value:
        layer_table.write_layer_table(table, _CSV.value)
        print(f"written to {_CSV.value}")
