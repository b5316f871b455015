"""A folder of images: root/split/class/*.jpg, or root/class/*.jpg, from which the splits are
cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flax_cnns.data.datasets import Raw
from flax_cnns.data.images import FileSource
from flax_cnns.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "validation"
)


def read(directory: str, name: str) -> Raw:
    """Paths and labels; nothing is decoded yet. Classes are the folders of train, sorted.

    Images lie in a class's folder at any depth. Raises UserError.
    """
    if not directory:
        raise UserError(f"data.name={name} needs data.dir, a folder of one folder per class")
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise UserError(f"data.dir={directory} is not a folder")
    roots = {SPLITS[folder.name]: folder for folder in _folders(root) if folder.name in SPLITS} or {
        "train": root
    }
    if "train" not in roots:
        raise UserError(f"{root} has {', '.join(sorted(roots))} but no train folder")
    classes = tuple(folder.name for folder in _folders(roots["train"]))
    if not classes:
        raise UserError(
            f"{roots['train']} holds no class folders; expected one folder of images per class"
        )
    sources = {}
    for split, folder in roots.items():
        paths, labels = [], []
        for one in _folders(folder):
            if one.name not in classes:
                raise UserError(f"{one}: no class of that name in {roots['train']}")
            images = _images(one)
            if not images:
                raise UserError(f"{one} holds no image ({', '.join(SUFFIXES)})")
            paths += images
            labels += [classes.index(one.name)] * len(images)
        sources[split] = FileSource(tuple(paths), np.array(labels, np.int32), f"{name} {split}")
    return Raw(sources, len(classes), classes, (None, None, 3))


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[str]:
    return sorted(
        str(path)
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.name[0] != "."
    )
