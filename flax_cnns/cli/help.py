"""The texts of `COMMAND --help` and `COMMAND --help-fields [PATTERN]`. Does not import JAX."""

from __future__ import annotations

import fnmatch
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from absl import flags

from flax_cnns.config.entries import Field, Section
from flax_cnns.config.fields import STRATEGY, TABLE, walk
from flax_cnns.errors import UserError, did_you_mean

_VALUES = {
    "string": "TEXT",
    "int": "N",
    "float": "NUMBER",
    "comma separated list of strings": "A,B",
}
_PATTERN_CHARACTERS = set("*?[")


def find_help(
    argv: Sequence[str], module: str, doc: str, arguments: str, run_paths: Sequence[str] = ()
) -> str:
    """Returns the help text that the flags in `argv` ask for; "" if they do not ask for help.

    `module` is the name of the command's module, and `doc` its docstring. `arguments` is the usage
    line's word for the arguments that are not flags. `run_paths` are the paths of the configs of
    whole runs in the command's config. Raises `UserError` if no field matches the pattern.
    """
    given = list(itertools.takewhile(lambda argument: argument != "--", argv[1:]))
    for argument, following in zip(given, [*given[1:], ""]):
        flag, equals, _ = argument.replace("_", "-").lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if flag == "help-fields":
            pattern = argument.partition("=")[2] if equals else following
            return make_fields_page("" if pattern.startswith("-") else pattern)
        if flag in ("help", "h", "helpshort") and not equals:
            return make_page(name_command(argv[0], module), module, doc, arguments, run_paths)
    return ""


def name_command(started: str, module: str) -> str:
    """Returns how the command was started: `flax-cnns train` or `python -m experiments.train`."""
    name = module.rpartition(".")[2]
    return started if started.startswith("flax-cnns ") else f"python -m experiments.{name}"


def show_switch(name: str, usage: str) -> str:
    """Shows how a boolean flag is written, with the arguments of the usage line that follow it."""
    usage = usage.strip("[]")
    return usage if f"--{name} " in usage else f"--{name} or --no{name}"


def make_page(command: str, module: str, doc: str, arguments: str, run_paths: Sequence[str]) -> str:
    """Returns the help page of a command: purpose, examples and flags."""
    prefix = command.removesuffix(module.rpartition(".")[2])
    doc = re.sub(r"(?m)^flax-cnns (?=\w)", prefix, doc.strip())
    return "\n".join(
        [
            " ".join(filter(None, [command, arguments, "[--FLAG=VALUE ...]"])),
            "",
            doc,
            "",
            "Flags (underscores also work in place of dashes):",
            *itertools.chain.from_iterable(_entry(*entry) for entry in _flags(module, run_paths)),
        ]
    )


def _flags(module: str, run_paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (flag with its kind of value, meaning) for the command's own flags, and then for the
    flags that all commands share."""
    known = flags.FLAGS.flags_by_module_dict()
    shared = [flag for flag in known.get("flax_cnns.cli.flags", []) if flag.name != "config"]
    for flag in known.get(module, []):
        yield _format_flag(flag), _describe(flag)
    if "config" in flags.FLAGS:
        yield "--config=RECIPE[:MODE] or FILE.py[:MODE]", flags.FLAGS["config"].help
        for path in run_paths or [""]:
            front = f"--config.{path}{path and '.'}"
            text = f"Sets a field, such as {front}optimizer.name=adam or {front}seed=1."
            yield f"{front}SECTION.FIELD=VALUE", text
    for flag in shared:
        yield _format_flag(flag), _describe(flag)
    yield "--help", "Shows this page."
    yield (
        "--help-fields [PATTERN]",
        "Shows the fields of a config with their defaults. PATTERN, a shell pattern or a part of a"
        " name, selects fields: 'optimizer.*' or decay.",
    )


def _format_flag(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--no-{flag.name}" if flag.default else f"--{flag.name}"
    if values := getattr(flag.parser, "enum_values", None):
        return f"--{flag.name}={'|'.join(values)}"
    return f"--{flag.name}={_VALUES.get(flag.flag_type(), 'VALUE')}"


def _describe(flag: flags.Flag) -> str:
    meaning = re.sub(r"^<[^>]*>: ", "", flag.help)  # absl puts the values of an enum in front
    default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    # A flag with bounds has a validator too.
    if any("must have a value" in validator.message for validator in flag.validators):
        return f"{meaning} Required."
    if flag.boolean or default in ("", None):
        return meaning
    return f"{meaning} Default: {default}."


def make_fields_page(pattern: str = "") -> str:
    """Returns the page of config fields with their defaults, meanings and expected values.

    The page has the fields whose path contains `pattern`, or matches it if it is a shell pattern.
    Raises `UserError` if there are no such fields.
    """
    pattern = pattern.removeprefix("--").removeprefix("config.").partition("=")[0]
    known = dict(walk(TABLE))
    known |= {"strategy": STRATEGY, **dict(walk(STRATEGY, "strategy."))}
    selected = dict(_select(known, pattern))
    if not selected:
        hint = did_you_mean(pattern, [p for p, field in known.items() if isinstance(field, Field)])
        raise UserError(
            f"--help-fields: no field matches {pattern!r}{hint}; the fields of a network, such as"
            " drop_path, are set as --config.model.FIELD"
        )
    lines = []
    for path, part in selected.items():
        if isinstance(part, Section):
            lines += ["", f"{path}: {part.meaning}", ""]
            continue
        expected = part.check(None)
        meaning = f"{part.meaning} Expected: {expected}." if expected else part.meaning
        if path.startswith("strategy."):
            meaning = f"Only in finetune. {meaning}"
        lines += _entry(f"--config.{path}={part.default!r}", meaning)
    lines += ["", "These are the defaults. A recipe or a config file may set other values."]
    return "\n".join(lines)


def _select(
    known: dict[str, Field | Section], pattern: str
) -> Iterable[tuple[str, Field | Section]]:
    if not pattern:
        return known.items()
    is_match = (
        (lambda path: fnmatch.fnmatchcase(path, pattern))
        if _PATTERN_CHARACTERS & set(pattern)
        else (lambda path: pattern in path)
    )
    return ((p, part) for p, part in known.items() if isinstance(part, Field) and is_match(p))


def _entry(name: str, meaning: str) -> list[str]:
    width = max(50, min(100, shutil.get_terminal_size().columns))
    indent = " " * 6
    return [
        f"  {name}",
        *textwrap.wrap(
            meaning,
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ),
    ]
