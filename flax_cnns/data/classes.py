"""The classes that `data.classes` selects, by name or number."""

from __future__ import annotations

from typing import Any

import numpy as np

from flax_cnns.data.decode import read_labels
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import ImageSource, RawDataset, Relabeled, Subset, take_rows
from flax_cnns.errors import UserError, did_you_mean


def select_classes(
    raw: RawDataset, config: Any, begun: bool, name: str = ""
) -> tuple[RawDataset, list[str]]:
    """Returns (the examples of the classes in `config.classes`, labeled by their order there;
    notes).

    `name` is the data set's name for messages; "" stands for `config.name`. `begun` is as in
    `find_class_indices`. Raises UserError if a split has no image of these classes.
    """
    name = name or config.name
    selected, notes = find_class_indices(config, raw.class_names, begun, name)
    if not selected:
        return raw, notes
    new = np.full(raw.num_classes, -1, np.int32)
    new[selected] = np.arange(len(selected))

    class_names = tuple(raw.class_names[i] for i in selected)

    def select(role: str, source: ImageSource) -> ImageSource:
        labels = new[read_labels(source)]
        rows, suffix = np.flatnonzero(labels >= 0), f"classes {selected}"
        if not len(rows):
            raise UserError(
                f"data.classes: the {role} split of {name} has no image of {', '.join(class_names)}"
            )
        if isinstance(source, ArraySource):  # stays an array, so that nothing is decoded
            images = take_rows(source.images, rows)
            return ArraySource(images, labels[rows], f"{source.name}, {suffix}")
        return Relabeled(Subset(source, rows, suffix), labels[rows], suffix)

    raw = raw._replace(
        sources={role: select(role, source) for role, source in raw.sources.items()},
        num_classes=len(selected),
        class_names=class_names,
    )
    return raw, notes


def find_class_indices(
    config: Any, names: tuple[str, ...], begun: bool = False, name: str = ""
) -> tuple[list[int], list[str]]:
    """Returns the indices of the classes in `config.classes`, and notes.

    A number that is also the name of another class is ambiguous. It raises UserError, unless
    `begun` says that a run with this config already exists: then the number is an index, and a note
    says so. Unknown and repeated classes also raise UserError.
    """
    name = name or config.name
    indices, notes = [], []
    for given in config.classes:
        if isinstance(given, int) and str(given) in names and names.index(str(given)) != given:
            has_index = 0 <= given < len(names)
            other = (
                f"number {given} is {names[given]!r}" if has_index else f"no class number {given}"
            )
            problem = (
                f"data.classes: {given} is ambiguous: {name} has a class named {str(given)!r}, and"
                f" {other}"
            )
            if not begun or not has_index:
                raise UserError(f"{problem}; give names, in quotes: {str(given)!r}")
            notes.append(f"{problem}; this run took the number")
        if given in names:
            indices.append(names.index(given))
        elif isinstance(given, int) and 0 <= given < len(names):
            indices.append(given)
        else:
            near = did_you_mean(given, names) if isinstance(given, str) else ""
            known = near or f"; it has 0 to {len(names) - 1}"
            raise UserError(f"data.classes: {name} has no class {given!r}{known}")
    if len(indices) == 1 or len(set(indices)) < len(indices):
        raise UserError(
            f"data.classes: expected two classes or more, each once; got {tuple(config.classes)}"
        )
    return indices, notes
