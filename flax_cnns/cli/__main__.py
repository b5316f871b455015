"""`flax-cnns COMMAND ...`, also as `python -m flax_cnns.cli COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from flax_cnns.errors import EXIT_USER_ERROR, did_you_mean

# A command is the module of this name in this folder, with a function of the same name in it.
COMMANDS = (
    *("train", "evaluate", "predict", "inspect", "compare"),
    *("convert", "finetune", "ablate", "search"),
)
_HELP = ("help", "--help", "-help", "-h")


def main() -> None:
    """Runs the command that the first argument names; its exit codes are those of `flags.main`."""
    name, *rest = sys.argv[1:] or [""]
    if name in _HELP:
        print(make_overview())
        return
    if name not in COMMANDS:
        said = f"unknown command {name!r}" if name else "expected a command, got none"
        print(f"error: {said}{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    if (here := os.getcwd()) not in sys.path:  # as `python -m` has it, but behind what is installed
        sys.path.append(here)
    sys.argv = [f"flax-cnns {name}", *rest]
    from flax_cnns.cli import flags

    flags.main(getattr(importlib.import_module(f"flax_cnns.cli.{name}"), name))


def make_overview() -> str:
    """What `flax-cnns --help` shows: the commands, with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {read_purpose(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "flax-cnns: convolutional networks in JAX and Flax, trained, examined and compared.",
            "",
            *lines,
            "",
            "flax-cnns COMMAND --help: examples and flags of a command",
            "flax-cnns COMMAND --help-fields [PATTERN]: the fields of a config",
        ]
    )


def read_purpose(name: str) -> str:
    """The first line of a command's docstring; the module is not imported."""
    text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return text.partition('"""')[2].partition("\n")[0]


if __name__ == "__main__":
    main()
