"""The table of config fields as a page: `python -m flax_cnns.config > docs/config.md`."""

from __future__ import annotations

from collections.abc import Iterator

from flax_cnns.config.fields import IN_ALL_RUNS, STRATEGY, TABLE, Field, Section, walk

HEAD = """# Config fields

Made by `python -m flax_cnns.config > docs/config.md` of flax_cnns/config/fields.py, which says what
durations and rules are. A new run refuses a field that is not at its default and cannot act under
the other choices. "Older runs" is what a run has that was made before the field.
"""
COLUMNS = ("field", "default", "expected", "meaning", "older runs")


def make_page() -> str:
    """The page as Markdown: a heading and a table for each section."""
    parts = [("", TABLE), *walk(TABLE), ("strategy", STRATEGY)]
    sections = [(path, part) for path, part in parts if isinstance(part, Section)]
    return "\n".join([HEAD, *(line for path, part in sections for line in _write(path, part))])


def _write(path: str, part: Section) -> Iterator[str]:
    if path:
        yield f"## {path}\n\n{part.meaning}\n"
    if not part.fields:
        return
    yield _row(COLUMNS)
    yield _row(["---"] * len(COLUMNS))
    for name, field in part.fields.items():
        if isinstance(field, Field):
            older = "" if field.older_runs is IN_ALL_RUNS else f"`{field.older_runs!r}`"
            expected = field.check(None) or ""
            yield _row((f"`{name}`", f"`{field.default!r}`", expected, field.meaning, older))
    yield ""


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    print(make_page(), end="")
