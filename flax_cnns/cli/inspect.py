"""Lists the tree of a checkpoint with shapes, dtypes and sizes, without loading it.

flax-cnns inspect runs/digits
flax-cnns inspect runs/digits@best --depth=2
flax-cnns inspect runs/digits@1200 --filter='params/head/.*' --verify
flax-cnns inspect path/of/an/orbax/checkpoint

RUN alone means the checkpoint that was tested for summary.json; in an unfinished run, the latest.
The paths are those that the rules of `graft` use. Like a rule, a filter must match the whole path.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import define_arguments

_DEPTH = flags.DEFINE_integer("depth", 0, "Number of levels of the tree to show; 0: all.")
_FILTER = flags.DEFINE_string("filter", "", "Show only leaves whose whole path matches this regex.")
_VERIFY = flags.DEFINE_bool("verify", False, "Read the shown leaves and check their CRC32s.")
define_arguments(
    "a run (RUN, RUN@best, RUN@latest, RUN@1200) or the path of a checkpoint", "RUN|PATH", most=1
)


def inspect(argv: list[str]) -> None:
    from flax_cnns.checkpoint.listing import print_listing

    print_listing(argv[1], depth=_DEPTH.value, pattern=_FILTER.value, verify=_VERIFY.value)
