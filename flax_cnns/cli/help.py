"""What `COMMAND --help` and `COMMAND --help-fields [PATTERN]` show. No JAX."""

from __future__ import annotations

import fnmatch
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from absl import flags

from flax_cnns.config.fields import STRATEGY, TABLE, Field, Section, walk
from flax_cnns.errors import UserError, did_you_mean

_VALUES = {
    "string": "TEXT",
    "int": "N",
    "float": "NUMBER",
    "comma separated list of strings": "A,B",
}
_IN_PATTERNS = set("*?[")


def find_help(
    argv: Sequence[str], module: str, doc: str, arguments: str, places: Sequence[str] = ()
) -> str:
    """The text that the flags `argv` of a command ask for; "" if they ask for no help. `module`:
    the command's, whose docstring is `doc`. `arguments`: what it takes beside flags, as a word.
    `places`: the parts of its config that are configs of runs. Raises `UserError` if no field fits
    the pattern."""
    given = list(itertools.takewhile(lambda argument: argument != "--", argv[1:]))
    for argument, after in zip(given, [*given[1:], ""]):
        flag, equals, _ = argument.replace("_", "-").lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if flag == "help-fields":
            pattern = argument.partition("=")[2] if equals else after
            return make_fields_page("" if pattern.startswith("-") else pattern)
        if flag in ("help", "h", "helpshort") and not equals:
            return make_page(name_command(argv[0], module), module, doc, arguments, places)
    return ""


def name_command(started: str, module: str) -> str:
    """How the command was started: `flax-cnns train` or `python -m experiments.train`."""
    name = module.rpartition(".")[2]
    return started if started.startswith("flax-cnns ") else f"python -m experiments.{name}"


def make_page(command: str, module: str, doc: str, arguments: str, places: Sequence[str]) -> str:
    """Purpose, examples and flags of a command."""
    prefix = command.removesuffix(module.rpartition(".")[2])
    doc = re.sub(r"(?m)^flax-cnns (?=\w)", prefix, doc.strip())
    return "\n".join(
        [
            " ".join(filter(None, [command, arguments, "[--FLAG=VALUE ...]"])),
            "",
            doc,
            "",
            "Flags (dashes may be underscores):",
            *itertools.chain.from_iterable(_entry(*entry) for entry in _flags(module, places)),
        ]
    )


def _flags(module: str, places: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(a flag with what it takes, its meaning) of the command and of what all commands share."""
    known = flags.FLAGS.flags_by_module_dict()
    of_all = [flag for flag in known.get("flax_cnns.cli.flags", []) if flag.name != "config"]
    for flag in known.get(module, []):
        yield _spelled(flag), _meaning(flag)
    if "config" in flags.FLAGS:
        yield "--config=RECIPE[:MODE] or FILE.py[:MODE]", flags.FLAGS["config"].help
        for place in places or [""]:
            front = f"--config.{place}{place and '.'}"
            text = f"Sets a field, such as {front}optimizer.name=adam or {front}seed=1."
            yield f"{front}SECTION.FIELD=VALUE", text
    for flag in of_all:
        yield _spelled(flag), _meaning(flag)
    yield "--help", "Shows this page."
    yield (
        "--help-fields [PATTERN]",
        "Shows the fields of a config with their defaults: all, or those that fit a shell pattern"
        " or a part of a name, such as 'optimizer.*' or decay.",
    )


def _spelled(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--no-{flag.name}" if flag.default else f"--{flag.name}"
    if values := getattr(flag.parser, "enum_values", None):
        return f"--{flag.name}={'|'.join(values)}"
    return f"--{flag.name}={_VALUES.get(flag.flag_type(), 'VALUE')}"


def _meaning(flag: flags.Flag) -> str:
    default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    if flag.default is None and flag.validators:
        return f"{flag.help} Required."
    if flag.boolean or default in ("", None):
        return flag.help
    return f"{flag.help} Default: {default}."


def make_fields_page(pattern: str = "") -> str:
    """The config fields whose path fits a shell pattern or holds a text: default, expected value
    and meaning. Raises `UserError` if there are none."""
    pattern = pattern.removeprefix("--").removeprefix("config.").partition("=")[0]
    known = dict(walk(TABLE))
    known |= {"strategy": STRATEGY, **dict(walk(STRATEGY, "strategy."))}
    found = dict(_select(known, pattern))
    if not found:
        hint = did_you_mean(pattern, [p for p, field in known.items() if isinstance(field, Field)])
        raise UserError(f"--help-fields: no field fits {pattern!r}{hint}")
    lines = []
    for path, part in found.items():
        if isinstance(part, Section):
            lines += ["", f"{path}: {part.meaning}", ""]
            continue
        expected = part.check(None)
        meaning = f"{part.meaning} Expected: {expected}." if expected else part.meaning
        lines += _entry(f"--config.{path}={part.default!r}", meaning)
    return "\n".join(lines)


def _select(
    known: dict[str, Field | Section], pattern: str
) -> Iterable[tuple[str, Field | Section]]:
    if not pattern:
        return known.items()
    fits = (
        (lambda path: fnmatch.fnmatchcase(path, pattern))
        if _IN_PATTERNS & set(pattern)
        else (lambda path: pattern in path)
    )
    return ((p, part) for p, part in known.items() if isinstance(part, Field) and fits(p))


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
