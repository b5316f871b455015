"""Shared by all commands: flags, one-line messages for user errors, and exit codes."""

from __future__ import annotations

import ast
import contextlib
import errno
import itertools
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from flax_cnns import recipes
from flax_cnns.cli import help
from flax_cnns.cli.paths import check_paths
from flax_cnns.config import FIELDS, flatten, set_config_field
from flax_cnns.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    ProcessLost,
    UserError,
    describe_out_of_memory,
    did_you_mean,
)
from flax_cnns.files import check_regular_file, check_writable
from flax_cnns.names import escape_unencodable
from flax_cnns.runtime import compilation_cache, launch, output

_CACHE = flags.DEFINE_string(
    "compilation-cache",
    "",
    "The folder that keeps compiled programs for later runs, or off. The default is"
    " JAX_COMPILATION_CACHE_DIR if it is set, otherwise flax_cnns/xla under XDG_CACHE_HOME or"
    " ~/.cache.",
)


def main(function: Callable[[list[str]], int | None]) -> None:
    """Reads the flags, turns JAX's compilation cache on and runs `function(argv)`.

    Exit codes:
    - 0: success.
    - 1: a bug in flax_cnns, with its traceback; or another process of the run has died, explained
      in one line.
    - 2: user error, explained in one line.
    - 75: the run saved after SIGTERM or SIGUSR1; the same command continues it.
    - 130: Ctrl-C. A run saves first, unless Ctrl-C came before the first step, or twice.

    Output that cannot be written does not change the exit code.
    """

    def parse(argv: list[str]) -> list[str]:
        module = sys.modules[function.__module__]
        doc = module.__doc__ or ""
        if text := help.find_help(argv, module.__name__, doc, _usage(), _run_paths()):
            print(text)
            sys.exit(0)
        rest = _parse(argv)
        check_paths(rest[1:])
        return rest

    def start(argv: list[str]) -> int | None:
        launch.keep_memory()
        escape_unencodable()
        compilation_cache.enable(_CACHE.value)
        _on_interrupt(signal.default_int_handler)
        return function(argv)

    with output.safe():
        # Until JAX is imported: a KeyboardInterrupt could crash the import.
        _on_interrupt(_exit_at_once)
        try:
            app.run(start, flags_parser=parse)
        except UserError as error:
            _say(error)
            _leave(EXIT_USER_ERROR)
        except KeyboardInterrupt as error:
            _say(str(error) or _INTERRUPTED)
            _leave(EXIT_INTERRUPTED)
        except ProcessLost as error:
            _say(error)
            _leave(EXIT_FAULT)
        except Exception as error:
            if line := describe_out_of_memory(error):
                _say(line)
                _leave(EXIT_USER_ERROR)
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                name = os.fspath(error.filename or "")
                _say(f"{name[:100]}…: expected names of at most 255 bytes; choose a shorter one")
                _leave(EXIT_USER_ERROR)
            first = (str(error).strip().splitlines() or [""])[0]
            _say(f"{type(error).__name__}: {first}")
            traceback.print_exception(error)
            _leave(EXIT_FAULT)
        finally:
            _on_interrupt(signal.SIG_DFL)  # nothing is left to save, and JAX may take long to exit


def _on_interrupt(handler: Any) -> None:
    """Sets the handler of Ctrl-C, unless Ctrl-C is ignored, as in a background job of a shell
    script."""
    ours = (signal.default_int_handler, _exit_at_once)
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) in ours:
        signal.signal(signal.SIGINT, handler)


def _exit_at_once(*_: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {_INTERRUPTED}\n".encode())
    os._exit(EXIT_INTERRUPTED)


_INTERRUPTED = "interrupted; the same command goes on from what is saved, or else starts anew"


def _say(message: object) -> None:
    print(f"error: {message}", file=sys.stderr)


def _leave(code: int) -> NoReturn:
    # An ordinary exit would wait for the other processes, which wait for this one.
    launch.exit_if_distributed(code)
    sys.exit(code)


def define_config(default: str, *, runs: str = "", only: str = "") -> flags.FlagHolder:
    """Defines the flag --config, whose default is `configs/<default>.py`, or None for "".

    If the config contains the configs of whole runs, the regex `runs` matches their paths. With
    `only`, the default is that of this one of the command's kinds.
    """
    # With a default, ml_collections would apply overrides while it defines the flag, and fail.
    if default:
        _DEFAULT[only] = str(recipes.FOLDER / f"{default}.py")
    _RUNS.append(re.compile(rf"({runs})\." if runs else ""))
    text = (
        "The name of a recipe, or your own config file. MODE is a mode of that file, such as smoke."
        f" Default: {default or 'none'}{only and f' for {only}'}."
    )
    holder = config_flags.DEFINE_config_file("config", None, text)
    flags.FLAGS["config"].parser = _ConfigParser()
    return holder


_DEFAULT: dict[str, str] = {}  # by the command's kind; "" for all
_RUNS: list[re.Pattern] = []


def define_accept() -> flags.FlagHolder:
    """Defines the flag --accept-changed-data."""
    text = "Continue even if the data changed since a run began; the change is recorded."
    return flags.DEFINE_bool("accept-changed-data", False, text)


def define_trust() -> flags.FlagHolder:
    """Defines the flag --trust."""
    text = (
        "Import the code that the run's config names (package.module:Name). That code can do"
        " anything that you can do."
    )
    return flags.DEFINE_bool("trust", False, text)


def _as_defined(argument: str) -> str:
    """Returns the argument with its flag spelled as defined: `--image_size` becomes `--image-size`,
    and `--no-head` becomes `--nohead`."""
    name, equals, value = argument.removeprefix("--").partition("=")
    if argument.startswith("--"):
        if name.startswith(("no-", "no_")) and name not in flags.FLAGS:
            name = f"no{name[3:]}"
        for other in (name, name.replace("_", "-"), name.replace("-", "_")):
            if other in flags.FLAGS or other.removeprefix("no") in flags.FLAGS:
                return f"--{other}{equals}{value}"
    return argument


def _check_fields_are_of_the_config(argv: Sequence[str]) -> None:
    """Raises `UserError` if a flag is a config field without `config.` in front."""
    if "config" not in flags.FLAGS:
        return
    for argument in itertools.takewhile(lambda argument: argument != "--", argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name in flags.FLAGS or name.startswith("config"):
            continue
        run = _RUNS[0].match(name) if _RUNS else None
        field = name[run.end() :] if run else name
        if field in FIELDS or field.startswith(("model.", "own.")):
            prefixes = [""] if run else [f"{path}." for path in _run_paths()]
            right = " or ".join(f"--config.{prefix}{name}{equals}{value}" for prefix in prefixes)
        elif field.partition(".")[0] in _SECTIONS and "." in field:
            near = did_you_mean(f"--config.{field}", (f"--config.{known}" for known in FIELDS))
            raise UserError(f"--{name}: there is no such flag or field{near}")
        elif fields := [p for p in FIELDS if p.rpartition(".")[2] == field.replace("-", "_")]:
            right = " or ".join(f"--config.{path}{equals}{value}" for path in fields)
        else:
            continue
        raise UserError(f"--{name}: a config field needs config. in front; write {right}")


_SECTIONS = {path.partition(".")[0] for path in FIELDS if "." in path}


def define_commands(*names: str) -> None:
    """Makes the command's first argument one of these names; `argv[1]` is the one given."""
    _COMMANDS.extend(names)


_COMMANDS: list[str] = []


def define_arguments(what: str, word: str, most: int | None = None, least: int = 1) -> None:
    """Lets the command take from `least` to `most` arguments, mixed with flags in any order.

    Messages describe the arguments as `what`, and the usage line shows `word`.
    """
    flags.FLAGS.set_gnu_getopt()
    _ARGUMENTS.append((what, word, most, least))


_ARGUMENTS: list[tuple[str, str, int | None, int]] = []


def _run_paths() -> list[str]:
    """Returns the paths of the configs of whole runs in the config, as a user writes them."""
    pattern = _RUNS[0].pattern if _RUNS else ""
    parts = pattern.removeprefix("(").removesuffix(r")\.").split("|") if pattern else []
    return [part.replace(r"\w+", "NAME").replace("\\", "") for part in parts]


def _usage() -> str:
    """Returns the word in the usage line for the command's arguments."""
    words = ["|".join(_COMMANDS)] if _COMMANDS else []
    return " ".join([*words, *(word for _, word, _, _ in _ARGUMENTS)])


def choose_picture_path(
    flag: flags.FlagHolder, inputs: Sequence[str] = (), default: str = ""
) -> tuple[str, str]:
    """Returns (path of the picture to write, its description for a message).

    The path is the flag's value. Without the flag, the path is `default`, or else the flag's
    default, with a number if that file exists. Raises `UserError` if the file is one of the
    `inputs` or cannot be written.
    """
    path = pathlib.Path(flag.value or default)
    if not flags.FLAGS[flag.name].present:
        names = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2))
        path = next(name for name in itertools.chain([path], names) if not os.path.lexists(name))
    known = [other for other in inputs if os.path.exists(other)]
    if any(path.exists() and os.path.samefile(path, other) for other in known):
        raise UserError(f"--{flag.name}: {path} is one of the photos; name another file")
    check_writable(path)
    return str(path), f"{path}, which replaces the old file" if path.exists() else str(path)


def _check_arguments(given: list[str]) -> None:
    what, _, most, least = _ARGUMENTS[0] if _ARGUMENTS else ("", "", 0, 0)
    if len(given) < least:
        raise UserError(f"expected {what}, got none")
    if most is not None and len(given) > most:
        raise UserError(f"unexpected argument {given[most]!r}; flags begin with --")


def _find_config(argv: list[str]) -> tuple[list[str], str]:
    """Returns (`argv`, path) with the file or recipe that --config names replaced by its path. The
    path is "" without --config. Raises `UserError` if the file or recipe does not exist."""
    arguments, file, rest = [], "", iter(argv)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            name, colon, mode = (value if equals else next(rest, "")).partition(":")
            try:
                file = recipes.find(name)
            except UserError as error:
                raise UserError(f"--config: {error}") from None
            argument = f"--config={file}{colon}{mode}"
        arguments.append(argument)
    return arguments, file


class _ConfigParser(flags.ArgumentParser):
    """Loads recipes as modules of `flax_cnns.recipes`, and other files as ml_collections does."""

    def parse(self, argument: str) -> Any:
        file, colon, mode = argument.partition(":")
        try:
            module = recipes.load(file)
            if not callable(getattr(module, "get_config", None)):
                raise UserError(f"{file} has no function get_config() that returns the config")
            config = module.get_config(*([mode] if colon else []))
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise ValueError(traceback.format_exc()) from error
        if callable(getattr(config, "lock", None)):
            config.lock()
        return config

    def flag_type(self) -> str:
        return "config object"


def _take_new_fields(argv: list[str], file: str) -> tuple[list[str], dict[str, Any]]:
    """Returns (the remaining arguments, {path: value} of the fields that the config file lacks).

    Only fields of the network and of the user's own parts can be new. The network and these parts
    check them.
    """
    run = f"(?:{_RUNS[0].pattern})?" if _RUNS else ""
    fields = r"(model\.\w+|own\.\w+\.\w+)"
    new = re.compile(rf"--?config\.(?P<path>{run}{fields})=(?P<value>.*)", re.S)
    matches = {argument: match for argument in argv if (match := new.fullmatch(argument))}
    if not any(match["path"] not in FIELDS for match in matches.values()):
        return argv, {}
    mode = next((a.partition(":")[2] for a in argv if re.match(r"--?config=", a)), "")
    try:
        make = recipes.load(file).get_config
        known = flatten(make(mode) if mode else make())
    except Exception:  # the parser will raise this error again, with a message
        return argv, {}
    added = {m["path"]: _literal(m["value"]) for m in matches.values() if m["path"] not in known}
    return [a for a in argv if a not in matches or matches[a]["path"] in known], added


def _literal(text: str) -> Any:
    """Parses a number, tuple, True, False or None; returns any other text as it is."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags with absl. Raises `UserError` with one line for each kind of mistake."""
    command = ""
    if _COMMANDS:
        command = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else ""
        if command not in _COMMANDS:
            hint = did_you_mean(command, _COMMANDS) if command else ""
            few, many = " or ".join(_COMMANDS), f"one of {', '.join(_COMMANDS)}"
            known = few if len(_COMMANDS) < 4 else many
            raise UserError(f"expected {known} first, got {command!r}{hint}")
    argv = [argv[0], *map(_as_defined, argv[2 if _COMMANDS else 1 :])]
    _check_fields_are_of_the_config(argv[1:])
    given = any(a.lstrip("-").partition("=")[0] == "config" and a[:1] == "-" for a in argv)
    default = _DEFAULT.get(command, _DEFAULT.get(""))
    if default and not given:
        argv = [argv[0], f"--config={default}", *argv[1:]]
    argv, file = _find_config(argv)
    check_regular_file(file)
    for argument in argv:
        field, equals, _ = argument.removeprefix("-").removeprefix("-config.").partition("=")
        run = _RUNS[0].match(field) if _RUNS and argument.startswith("--config.") else None
        field = field[run.end() :] if run else ""
        if equals and field and not field.startswith(("model.", "own.")) and field not in FIELDS:
            raise UserError(f"config: unknown field {field!r}{did_you_mean(field, FIELDS)}")
    argv, added = _take_new_fields(argv, file)
    before, sys.argv = sys.argv, argv  # ml_collections looks for overrides in sys.argv
    try:
        rest = flags.FLAGS(argv)
        if not any(argument.startswith(("--verbosity", "-v")) for argument in argv):
            logging.set_verbosity(logging.WARNING)  # JAX reports every missing backend
        if "config" in flags.FLAGS and (config := flags.FLAGS["config"].value) is not None:
            config.keys()  # reads the file now, so that its errors are caught here
            for path, value in added.items():
                set_config_field(config, path, value)
        _check_arguments(rest[1:])
        return [rest[0], command, *rest[1:]] if command else rest
    except OSError as error:
        raise UserError(f"--config: cannot load {file}: {str(error).splitlines()[-1]}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error.__context__, UserError):  # raised by the config file
            raise UserError(
                f"--config: {str(error.__context__).removeprefix('config: ')}"
            ) from None
        lines = str(error.args[0] if error.args else error).strip().splitlines()
        # ml_collections puts a config file's traceback into the message. Its last line is enough.
        lines = lines[-1:] if "Traceback" in str(lines) else lines
        message = " ".join(lines).removeprefix("ValueError: ")
        if isinstance(error, (AttributeError, KeyError)):
            field = message.strip('"')
            message = f"config: unknown field {field}; a config file may add fields"
        elif missing := re.match(r"flag --([\w-]+)=None: .* must have a value", message):
            message = f"expected --{missing[1]}=VALUE, got none"
        elif bad := re.match(r"flag --([\w-]+)=(.*): \('Non-boolean argument", message):
            message = f"expected {help.show_switch(bad[1], _usage())}, got --{bad[1]}={bad[2]}"
        raise UserError(f"{message} (--help lists the flags)") from None
    finally:
        sys.argv = before
