"""A folder of images: root/split/class/*.jpg, or root/class/*.jpg, from which the splits are
cut.

Images are the files of SUFFIXES in a class's folder, at any depth. Links are followed; hidden and
system folders are not entered. What is left out is counted by kind. No file is opened here, and
only links cost a stat each.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from flax_cnns.data.types import ImageSource, RawDataset, describe_counts
from flax_cnns.errors import UserError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif"),
)
CODECS = {".webp": "webp", ".jp2": "jpg_2000", ".avif": "avif"}  # Pillow may be built without them
SPLIT_NAMES = dict.fromkeys(("train", "training"), "train")
SPLIT_NAMES |= dict.fromkeys(("test", "testing"), "test")
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation"), "validation")
# What operating systems leave behind (copies, thumbnails, indices), besides names with a dot.
SYSTEM_NAMES = {"system volume information", "thumbs.db", "desktop.ini"}
SYSTEM_NAMES |= {
    "__macosx",
    "@eadir",
    "@recycle",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "lost+found",
}
UNKNOWN_INODES = {0, 2**32 - 1, 2**64 - 1}  # that user-space file systems may give to every file
LFS_PREFIX = b"version https://git-lfs"  # how a pointer begins, whose file was not fetched


@dataclasses.dataclass(frozen=True)
class FileSource:
    paths: Sequence[str]
    labels: np.ndarray
    name: str
    root: str = ""  # of the data set: all paths begin with it
    # Paths of opened files that hold more than one picture; each process has its own.
    multi_frame_files: set[str] = dataclasses.field(default_factory=set)

    @property
    def relative_paths(self) -> list[str]:
        """The paths below the root, which do not change when the data set moves."""
        return [path[len(self.root) + 1 :] for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, i: int) -> tuple[Image.Image, int]:
        path = self.paths[i]
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            with open(path, "rb") as file:
                if file.read(len(LFS_PREFIX)) != LFS_PREFIX:
                    raise
            raise UnidentifiedImageError(
                "it is a pointer of Git LFS_PREFIX, not an image; run git lfs pull"
            ) from None
        if getattr(image, "is_animated", False) and image.format != "MPO":
            self.multi_frame_files.add(path)  # only the first is used
        return image, self.labels[i]

    def location(self, i: int) -> str:
        return self.paths[i]

    def fetch(self, rows: np.ndarray) -> ImageSource:
        return self

    def __repr__(self) -> str:
        return f"FileSource({self.name}, {len(self)})"


class _Image(NamedTuple):
    path: str
    is_link: bool
    real: str  # the path without links; "" if it has none
    inode: int


def read(directory: str, name: str) -> RawDataset:
    """Paths and labels; nothing is decoded yet. Classes are the folders of train, sorted.

    A file counts once in its class, however many links lead to it. Raises UserError: a folder,
    split or class that is missing or holds no image, one class alone, a file that is in two splits
    or classes.
    """
    if not directory:
        raise UserError(f"data.name={name} needs data.dir, a folder of one folder per class")
    root = str(pathlib.Path(directory).expanduser())  # keeps LINK/.., which the system resolves
    if not os.path.isdir(root):
        raise UserError(f"data.dir={directory} is not a folder")
    left_out: collections.Counter[str] = collections.Counter()
    roots = _split_folders(root, left_out)
    classes = tuple(_folders(roots["train"]))
    _check_classes(root, roots["train"], classes)
    found = {}
    for split, folder in roots.items():
        for one in _folders(folder):
            path = os.path.join(folder, one)
            if one not in classes:
                raise UserError(f"{path}: no class of that name in {roots['train']}")
            found[split, one] = _images(path, root, left_out)
        loose = _count_loose(folder)
        if not any(of == split for of, _ in found):
            raise UserError(_without_classes(split, folder, loose[_LOOSE], classes))
        left_out += loose
    left_out += _count_loose(root) if root not in roots.values() else {}
    _keep_once(found, root, left_out)
    sources, several = {}, set()
    for split in roots:
        paths, labels = [], []
        for label, one in enumerate(classes):
            images = found.get((split, one), [])
            paths += [image.path for image in images]
            labels += [label] * len(images)
        labels = np.array(labels, np.int32)
        sources[split] = FileSource(tuple(paths), labels, f"{name} {split}", root, several)
    return RawDataset(sources, len(classes), classes, (None, None, 3), dict(left_out), several)


# ---- splits and classes

_LOOSE = "images outside the class folders"


def _split_folders(root: str, left_out: collections.Counter[str]) -> dict[str, str]:
    """{split: folder}; train is `root` itself if no folder has the name of a split."""
    roots, others = {}, []
    for one in _folders(root):
        split, path = SPLIT_NAMES.get(one.lower()), os.path.join(root, one)
        if split in roots:
            raise UserError(f"{roots[split]} and {path} are both the {split} split; keep one")
        if split is None:
            others.append(one)
        else:
            roots[split] = path
    if not roots:
        return {"train": root}
    if "train" not in roots:
        named = ", ".join(map(os.path.basename, roots.values()))
        cure = f"; if {_some(sorted(_folders(root)))} are classes, move them to {root}/train"
        raise UserError(f"{root} has {named} but no train folder{cure if others else ''}")
    if others:
        left_out[f"folders that are no split ({_some(others)})"] = len(others)
    return roots


def _check_classes(root: str, train: str, classes: tuple[str, ...]) -> None:
    """Raises UserError if the folders of train are not classes, or if there is only one."""
    if not classes:
        raise UserError(_without_classes("train", train, _count_loose(train)[_LOOSE], ()))
    for one in classes if train == root else ():
        path = os.path.join(train, one)
        if os.path.isdir(os.path.join(path, "train")) and _folders(os.path.join(path, "train")):
            raise UserError(
                f"{path} has a train folder of its own: it is a data set, not a class; did you "
                f"mean data.dir={path}?"
            )
    if len(classes) > 1:
        return
    likely = path = os.path.join(train, classes[0])
    while len(inner := _folders(likely)) == 1:
        likely = os.path.join(likely, inner[0])
    cure = f"; did you mean data.dir={likely}?" if inner else ""
    if inner and train != root:
        cure = f"; if {_some(inner)} are the classes, move them from {likely} to {train}"
    raise UserError(f"expected two classes or more; {train} holds one class folder, {path}{cure}")


def _without_classes(split: str, folder: str, loose: int, classes: tuple[str, ...]) -> str:
    holds = f"{loose} images but no class folders" if loose else "no class folders"
    named = f", named as in train ({_some(classes)})" if classes else ""
    cure = f", or move {folder} out of data.dir" if classes else ""
    return (
        f"the {split} split: {folder} holds {holds}; expected one folder of images per class"
        f"{named}: make them{cure}"
    )


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# ---- the walk


def _entries(folder: str) -> list[os.DirEntry]:
    """What a folder holds, by name. Raises UserError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _folders(folder: str) -> list[str]:
    return [e.name for e in _entries(folder) if not _is_hidden(e.name) and _is_folder(e)]


def _count_loose(folder: str) -> collections.Counter[str]:
    """What lies beside class folders: hidden folders, links to nothing, and images, which have no
    label there."""
    found: collections.Counter[str] = collections.Counter()
    for entry in _entries(folder):
        if _is_hidden(entry.name):
            found["hidden folders"] += _is_folder(entry)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            found["broken links"] += 1
        elif _suffix(entry.name) in SUFFIXES:
            found[_LOOSE] += not _is_folder(entry)
    return found


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _images(folder: str, root: str, left_out: collections.Counter[str]) -> list[_Image]:
    """The images of a class, sorted by path. Raises UserError where there is none.

    Each real folder is entered once, so that links cannot lead in a circle.
    """
    found, entered, here = [], set(), collections.Counter()
    missing = {suffix for suffix in CODECS if not _has_codec(suffix)}
    real = os.path.realpath(folder)
    todo = collections.deque([(folder, real, real != _real(folder, root))])
    while todo:
        path, real, linked = todo.popleft()
        if real in entered:
            here["folders that are linked twice"] += 1
            continue
        entered.add(real)
        for entry in _entries(path):
            link, suffix = entry.is_symlink(), _suffix(entry.name)
            target = os.path.realpath(entry.path) if link else f"{real}/{entry.name}"
            if _is_folder(entry):
                if _is_hidden(entry.name):
                    here["hidden folders"] += 1
                elif link:  # later, so that a file is known by its own name
                    todo.append((entry.path, target, True))
                else:
                    todo.appendleft((entry.path, target, linked))
            elif _is_hidden(entry.name):
                here["hidden files"] += 1
            elif link and not os.path.exists(target):
                here["broken links"] += 1
            elif suffix not in SUFFIXES:
                here[suffix or "files without a suffix"] += 1
            elif suffix in missing:
                here[f"{suffix}, which this Pillow cannot decode"] += 1
            elif not entry.is_file():
                here["pipes, sockets and devices"] += 1
            else:
                real_path = target if linked or link else ""
                found.append(_Image(entry.path, link, real_path, entry.inode()))
    if not found:
        there = f"; it holds {describe_counts(here)}" if here else ""
        raise UserError(f"{folder} holds no image ({', '.join(SUFFIXES)}){there}")
    left_out += here
    return sorted(found)


def _real(path: str, root: str) -> str:
    """The real path of what is below `root` without a link on the way."""
    return os.path.realpath(root) + path[len(root) :]


def _has_codec(suffix: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a codec that an older Pillow has never heard of
        return suffix not in CODECS or bool(features.check(CODECS[suffix]))


def _keep_once(
    found: dict[tuple[str, str], list[_Image]], root: str, left_out: collections.Counter[str]
) -> None:
    """Drops what is in a class twice, by symbolic or hard links. Raises UserError where a file is
    in two splits or classes: a run would be tested on what it trained on."""
    inodes = np.array([i.inode for images in found.values() for i in images], np.uint64)
    values, counts = np.unique(inodes, return_counts=True)
    shared = set(values[counts > 1].tolist()) - UNKNOWN_INODES
    if not shared and not any(i.real for images in found.values() for i in images):
        return
    base = os.path.realpath(root)
    seen: dict[object, tuple[str, str, str]] = {}
    for (split, one), images in found.items():
        kept = []
        for image in sorted(images, key=lambda image: image.is_link):  # a file before links to it
            keys: list[object] = [image.real or base + image.path[len(root) :]]
            if image.inode in shared:
                status = os.stat(image.path)
                # A file without hard links counts by its path: some network drives reuse numbers.
                keys += [(status.st_dev, status.st_ino)] if status.st_nlink > 1 else []
            before = next((seen[key] for key in keys if key in seen), None)
            if before is None:
                kept.append(image)
                seen |= dict.fromkeys(keys, (split, one, image.path))
            elif before[:2] == (split, one):
                left_out["links to images that are there already"] += 1
            else:
                what = "splits" if before[0] != split else "classes"
                raise UserError(
                    f"{before[2]} and {image.path} are one file in two {what}; remove one of them"
                )
        found[split, one] = sorted(kept)
