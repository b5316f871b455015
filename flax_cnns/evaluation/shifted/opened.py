"""An opened set: its images and classes, as one network sees them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flax_cnns.data.match_classes import match_classes
from flax_cnns.data.types import Split
from flax_cnns.evaluation.shifted.rows import CORRUPTIONS, SETS, SetRow


class NetworkClasses(NamedTuple):
    """The classes among which a network chooses, and ImageNet's names for them."""

    owner: str  # the network, for messages
    names: Sequence[str]  # [K]
    imagenet_names: Sequence[str] = ()  # [1000], in the order of the usual logits
    wnids: Sequence[str] = ()  # [1000]

    def match(self, names: Sequence[str], where: str) -> np.ndarray:
        """Returns i64 [len(names)], the classes that names or ImageNet's ids mean. Raises
        UserError."""
        usual = (tuple(self.imagenet_names), tuple(map(str, range(1000))))
        by_id = {wnid: k for k, wnid in enumerate(self.wnids)}
        aliases = by_id if tuple(self.names) in usual else {}
        return match_classes(names, self.names, aliases, where=where, owner=self.owner)


@dataclasses.dataclass(frozen=True)
class SetCell:
    """Images that are evaluated together: the set, or one corruption at one severity."""

    # (H, W, C) that the network takes -> the images, labeled with the network's classes
    open: Callable[[tuple[int, int, int]], Split]
    corruption: str = ""
    severity: int = 0


@dataclasses.dataclass(frozen=True)
class OpenedSet:
    """A set in a folder, for one network."""

    name: str
    row: SetRow
    folder: str
    cells: tuple[SetCell, ...]
    classes: np.ndarray  # i64, sorted: the network's classes that occur
    num_images: int | None = None  # None: unknown before the cells are opened
    # Of ReaL: the classes that count as correct for each image. The labels are then the images'
    # numbers. None: the labels are the classes.
    answers: tuple[frozenset[int], ...] | None = None
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def describe_difference(self) -> str:
        """Returns how the folder differs from the published set; "" if it does not."""
        parts = []
        if self.row.num_images and self.num_images not in (None, self.row.num_images):
            parts.append(f"{self.num_images:,} images, not {self.row.num_images:,}")
        if self.row.num_classes and len(self.classes) != self.row.num_classes:
            parts.append(f"{len(self.classes):,} classes, not {self.row.num_classes:,}")
        corruptions = {cell.corruption for cell in self.cells} - {""}
        if corruptions and (missing := [c for c in CORRUPTIONS if c not in corruptions]):
            parts.append(f"no {', '.join(missing)}")
        if not parts:
            return ""
        return (
            f"{self.folder} is not the whole of {self.row.title}: it has {' and '.join(parts)};"
            " published numbers are of the whole set"
        )


def list_folders(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the names of the folders in a folder that are not hidden, sorted; [] if the folder
    cannot be read."""
    try:
        with os.scandir(os.fspath(folder)) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []


def describe_missing(name: str, folder: str, fits: Callable[[str], bool]) -> str:
    """Returns the message for a folder that is not as the set is published.

    A folder inside it for which `fits` returns True is proposed.
    """
    row = SETS[name]
    inner = [os.path.join(folder, each) for each in list_folders(folder)]
    near = next((each for each in inner if fits(each)), "")
    hint = f"; did you mean --set-dir={near}?" if near else ""
    download = f"; download it from {row.url}" if row.url else ""
    return f"--set-dir={folder}: {row.title} needs {row.expected}{hint or download}"
