"""What every script shares: flags in, one line for what the user can mend, honest exit codes."""

from __future__ import annotations

import pathlib
import sys
import traceback
from collections.abc import Callable

from absl import app

from flax_cnns.errors import UserError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def main(function: Callable[[list[str]], int | None]) -> None:
    """Runs `function(argv)` after absl has read the flags.

    Exit codes: 0 done; 1 a fault of ours, with its traceback; 2 something that the user can mend,
    said in one line; 75 saved after a signal, run the same command again.
    """
    try:
        app.run(function)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # A mistyped override, or one of another type, is raised by the flags' parser.
        frames = traceback.extract_tb(error.__traceback__)
        if any("config_flags" in frame.filename for frame in frames):
            said = str(error.args[0] if error.args else error).replace("\n", " ")
            print(f"error: config: {said}", file=sys.stderr)
            sys.exit(2)
        _unexpected(error)
    except Exception as error:
        _unexpected(error)


def _unexpected(error: BaseException) -> None:
    first = str(error).strip().splitlines()
    print(f"error: {type(error).__name__}: {first[0] if first else ''}", file=sys.stderr)
    traceback.print_exception(error)
    sys.exit(1)
