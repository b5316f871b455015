"""The program `flax-cnns COMMAND ...`, also started as `python -m flax_cnns.cli COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from flax_cnns.errors import EXIT_USER_ERROR, did_you_mean

# Each command is a module in this folder with a function of the same name.
COMMANDS = (
    *("train", "evaluate", "predict", "inspect", "compare"),
    *("tabulate", "convert", "finetune", "ablate", "search", "visualize", "fits", "audit"),
)
_HELP = ("help", "--help", "-help", "-h")


def main() -> None:
    """Runs the command that the first argument names. Exits with the codes of `flags.main`."""
    name, *rest = sys.argv[1:] or [""]
    if name in _HELP:
        print(make_overview())
        return
    if name not in COMMANDS:
        message = f"unknown command {name!r}" if name else "expected a command, got none"
        print(f"error: {message}{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    # Makes the user's modules importable, as `python -m` does, but after the installed packages.
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    sys.argv = [f"flax-cnns {name}", *rest]
    from flax_cnns.cli import flags

    flags.main(getattr(importlib.import_module(f"flax_cnns.cli.{name}"), name))


def make_overview() -> str:
    """Returns the text of `flax-cnns --help`: one line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {read_purpose(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "flax-cnns trains, evaluates and compares convolutional networks in JAX and Flax.",
            "",
            *lines,
            "",
            "flax-cnns COMMAND --help: shows examples and flags of a command",
            "flax-cnns COMMAND --help-fields [PATTERN]: shows the fields of a config",
        ]
    )


def read_purpose(name: str) -> str:
    """Returns the first line of a command's docstring without importing its module."""
    text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return text.partition('"""')[2].partition("\n")[0]


if __name__ == "__main__":
    main()
