"""What is in a checkpoint: its tree with shapes, dtypes and sizes, without loading it.

flax-cnns inspect runs/digits
flax-cnns inspect runs/digits@best --depth=2
flax-cnns inspect runs/digits@1200 --filter='params/head/.*' --verify
flax-cnns inspect path/of/an/orbax/checkpoint

RUN alone is the checkpoint that was tested for its summary.json; in an unfinished run, the latest.
Paths are what the rules of `graft` name, and a filter matches as a rule does: the whole path.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import define_arguments

_DEPTH = flags.DEFINE_integer("depth", 0, "How deep the tree is shown; 0 is all of it.")
_FILTER = flags.DEFINE_string("filter", "", "Only leaves whose whole path this regex matches.")
_VERIFY = flags.DEFINE_bool("verify", False, "Read these leaves and compare their CRC32s.")
define_arguments(
    "a run (RUN, RUN@best, RUN@latest, RUN@1200) or the path of a checkpoint", "RUN|PATH", most=1
)


def inspect(argv: list[str]) -> None:
    from flax_cnns.checkpoint.listing import print_listing

    print_listing(argv[1], depth=_DEPTH.value, pattern=_FILTER.value, verify=_VERIFY.value)
