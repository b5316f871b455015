"""A folder of images: root/split/class/*.jpg, or root/class/*.jpg, which is then split.

Images are the files in a class's folder, at any depth, whose suffix is in SUFFIXES. Links are
followed; hidden and system folders are not entered. Files that are left out are counted by kind. No
file is opened here, and only links cost a stat each.
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
# Files and folders of operating systems (copies, thumbnails, indices). Names that begin with a dot
# are hidden too.
SYSTEM_NAMES = {
    *("system volume information", "thumbs.db", "desktop.ini", "__macosx", "@eadir", "@recycle"),
    *("#recycle", "#snapshot", "$recycle.bin", "lost+found"),
}
# User-space file systems may give one of these to all files.
UNKNOWN_INODES = {0, 2**32 - 1, 2**64 - 1}
LFS_PREFIX = b"version https://git-lfs"  # of a pointer to a file that was not fetched


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files and their labels."""

    paths: Sequence[str]
    labels: np.ndarray
    name: str
    root: str = ""  # the data set's folder, with which all paths start
    # Paths of opened files that have more than one frame. Each process has its own set.
    multi_frame_files: set[str] = dataclasses.field(default_factory=set)

    @property
    def relative_paths(self) -> list[str]:
        """The paths relative to the root, which do not change when the data set moves."""
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
                "it is a Git LFS pointer, not an image; run git lfs pull"
            ) from None
        if getattr(image, "is_animated", False) and image.format != "MPO":
            self.multi_frame_files.add(path)  # only the first frame is used
        return image, self.labels[i]

    def location(self, i: int) -> str:
        return self.paths[i]

    def fetch(self, rows: np.ndarray) -> ImageSource:
        return self

    def __repr__(self) -> str:
        return f"FileSource({self.name}, {len(self)})"


class _ImageFile(NamedTuple):
    path: str
    is_link: bool
    real: str  # the path with all links resolved; "" if there are none
    inode: int


def read(directory: str, name: str) -> RawDataset:
    """Finds paths and labels, without opening files. Classes are the folders of train, sorted.

    A file counts once in its class, however many links lead to it. Raises UserError if a folder,
    split or class is missing or holds no image, if there is a single class, and if a file is in two
    splits or classes.
    """
    if not directory:
        raise UserError(f"data.name={name} needs data.dir, a folder with one folder per class")
    root = str(pathlib.Path(directory).expanduser())  # keeps LINK/.. for the system to resolve
    if not os.path.isdir(root):
        raise UserError(f"data.dir={directory} is not a folder")
    left_out: collections.Counter[str] = collections.Counter()
    roots = _split_folders(root, left_out)
    classes = tuple(_list_folders(roots["train"]))
    _check_classes(root, roots["train"], classes)
    files: dict[tuple[str, str], list[_ImageFile]] = {}
    for split, folder in roots.items():
        for class_name in _list_folders(folder):
            path = os.path.join(folder, class_name)
            if class_name not in classes:
                raise UserError(f"{path}: no class of that name in {roots['train']}")
            files[split, class_name] = _find_images(path, root, left_out)
        loose = _count_loose(folder)
        if not any(key[0] == split for key in files):
            raise UserError(_describe_missing_classes(split, folder, loose[_LOOSE], classes))
        left_out += loose
    if root not in roots.values():
        left_out += _count_loose(root)
    _remove_duplicates(files, root, left_out)
    sources: dict[str, FileSource] = {}
    multi_frame_files: set[str] = set()
    for split in roots:
        paths: list[str] = []
        labels: list[int] = []
        for label, class_name in enumerate(classes):
            images = files.get((split, class_name), [])
            paths += [image.path for image in images]
            labels += [label] * len(images)
        array = np.array(labels, np.int32)
        sources[split] = FileSource(tuple(paths), array, f"{name} {split}", root, multi_frame_files)
    shape = None, None, 3
    return RawDataset(sources, len(classes), classes, shape, dict(left_out), multi_frame_files)


def find_class_files(folder: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Returns ({class folder's name: sorted paths of its images}, files left out by kind).

    Folders and files are found as in `read`, but a folder may have one class. Raises UserError if
    there is no class folder or a class has no image, and if a file is in two classes.
    """
    left_out: collections.Counter[str] = collections.Counter()
    names = _list_folders(folder)
    if not names:
        raise UserError(f"{folder} holds no folders; expected one folder of images per class")
    paths = {name: os.path.join(folder, name) for name in names}
    files = {("", name): _find_images(path, folder, left_out) for name, path in paths.items()}
    left_out += _count_loose(folder)
    _remove_duplicates(files, folder, left_out)
    found = {name: [image.path for image in images] for (_, name), images in files.items()}
    return found, dict(left_out)


# ---- splits and classes

_LOOSE = "images outside the class folders"


def _split_folders(root: str, left_out: collections.Counter[str]) -> dict[str, str]:
    """Returns {split: folder}. Train is `root` itself if no folder has the name of a split."""
    roots: dict[str, str] = {}
    others = []
    for folder in _list_folders(root):
        split, path = SPLIT_NAMES.get(folder.lower()), os.path.join(root, folder)
        if split is None:
            others.append(folder)
            continue
        if split in roots:
            raise UserError(f"{roots[split]} and {path} are both the {split} split; keep one")
        roots[split] = path
    if not roots:
        return {"train": root}
    if "train" not in roots:
        named = ", ".join(map(os.path.basename, roots.values()))
        listed = _list_first(sorted(_list_folders(root)))
        remedy = f"; if {listed} are classes, move them to {root}/train" if others else ""
        raise UserError(f"{root} has {named} but no train folder{remedy}")
    if others:
        left_out[f"folders that are not splits ({_list_first(others)})"] = len(others)
    return roots


def _check_classes(root: str, train: str, classes: tuple[str, ...]) -> None:
    """Raises UserError if the folders of train are not classes, or if there is only one."""
    if not classes:
        loose = _count_loose(train)[_LOOSE]
        raise UserError(_describe_missing_classes("train", train, loose, ()))
    for class_name in classes if train == root else ():
        path = os.path.join(train, class_name)
        inner_train = os.path.join(path, "train")
        if os.path.isdir(inner_train) and _list_folders(inner_train):
            raise UserError(
                f"{path} has its own train folder: it is a data set, not a class; did you mean "
                f"data.dir={path}?"
            )
    if len(classes) > 1:
        return
    likely = path = os.path.join(train, classes[0])
    while len(inner := _list_folders(likely)) == 1:
        likely = os.path.join(likely, inner[0])
    remedy = f"; did you mean data.dir={likely}?" if inner else ""
    if inner and train != root:
        remedy = f"; if {_list_first(inner)} are the classes, move them from {likely} to {train}"
    raise UserError(f"expected two classes or more; {train} holds one class folder, {path}{remedy}")


def _describe_missing_classes(split: str, folder: str, loose: int, classes: tuple[str, ...]) -> str:
    """Returns the error message for a split without class folders but `loose` images."""
    holds = f"{loose} images but no class folders" if loose else "no class folders"
    named = f", named as in train ({_list_first(classes)})" if classes else ""
    remedy = f", or move {folder} out of data.dir" if classes else ""
    return (
        f"the {split} split: {folder} holds {holds}; expected one folder of images per class"
        f"{named}: create them{remedy}"
    )


def _list_first(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# ---- the walk


def _entries(folder: str) -> list[os.DirEntry]:
    """Returns the entries of a folder, by name. Raises UserError if the folder cannot be read."""
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


def _list_folders(folder: str) -> list[str]:
    return [e.name for e in _entries(folder) if not _is_hidden(e.name) and _is_folder(e)]


def _count_loose(folder: str) -> collections.Counter[str]:
    """Counts entries next to the class folders in `folder`: hidden folders, broken links, and
    images, which have no label there."""
    counts: collections.Counter[str] = collections.Counter()
    for entry in _entries(folder):
        if _is_hidden(entry.name):
            counts["hidden folders"] += _is_folder(entry)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            counts["broken links"] += 1
        elif _suffix(entry.name) in SUFFIXES:
            counts[_LOOSE] += not _is_folder(entry)
    return counts


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _find_images(folder: str, root: str, left_out: collections.Counter[str]) -> list[_ImageFile]:
    """Returns the images of a class, sorted by path, and adds to `left_out`. Raises UserError if
    there are no images.

    Each real folder is entered once, so links cannot lead in a circle.
    """
    images: list[_ImageFile] = []
    entered: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()
    missing = {suffix for suffix in CODECS if not _has_codec(suffix)}
    real = os.path.realpath(folder)
    queue = collections.deque([(folder, real, real != _join_real(folder, root))])
    while queue:
        path, real, linked = queue.popleft()
        if real in entered:
            counts["folders that are linked twice"] += 1
            continue
        entered.add(real)
        for entry in _entries(path):
            link, suffix = entry.is_symlink(), _suffix(entry.name)
            target = os.path.realpath(entry.path) if link else f"{real}/{entry.name}"
            if _is_folder(entry):
                if _is_hidden(entry.name):
                    counts["hidden folders"] += 1
                elif link:  # entered last, so that a file gets the path without links
                    queue.append((entry.path, target, True))
                else:
                    queue.appendleft((entry.path, target, linked))
            elif _is_hidden(entry.name):
                counts["hidden files"] += 1
            elif link and not os.path.exists(target):
                counts["broken links"] += 1
            elif suffix not in SUFFIXES:
                counts[suffix or "files without a suffix"] += 1
            elif suffix in missing:
                counts[f"{suffix}, which this Pillow cannot decode"] += 1
            elif not entry.is_file():
                counts["pipes, sockets and devices"] += 1
            else:
                real_path = target if linked or link else ""
                images.append(_ImageFile(entry.path, link, real_path, entry.inode()))
    if not images:
        contents = f"; it holds {describe_counts(counts)}" if counts else ""
        raise UserError(f"{folder} holds no image ({', '.join(SUFFIXES)}){contents}")
    left_out += counts
    return sorted(images)


def _join_real(path: str, root: str) -> str:
    """Returns the real path of `path` if there is no link between it and `root`."""
    return os.path.realpath(root) + path[len(root) :]


def _has_codec(suffix: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow warns of unknown codecs
        return suffix not in CODECS or bool(features.check(CODECS[suffix]))


def _remove_duplicates(
    files: dict[tuple[str, str], list[_ImageFile]], root: str, left_out: collections.Counter[str]
) -> None:
    """Removes files that are in a class more than once, by symbolic or hard links. Raises UserError
    if a file is in two splits or classes: a run would be tested on its own training images."""
    inodes = np.array([i.inode for images in files.values() for i in images], np.uint64)
    values, counts = np.unique(inodes, return_counts=True)
    shared = set(values[counts > 1].tolist()) - UNKNOWN_INODES
    if not shared and not any(i.real for images in files.values() for i in images):
        return
    base = os.path.realpath(root)
    seen: dict[object, tuple[str, str, str]] = {}
    for (split, class_name), images in files.items():
        kept = []
        for image in sorted(images, key=lambda image: image.is_link):  # files before links
            keys: list[object] = [image.real or base + image.path[len(root) :]]
            if image.inode in shared:
                status = os.stat(image.path)
                # Only a file with hard links has its inode as key: network drives reuse inodes.
                keys += [(status.st_dev, status.st_ino)] if status.st_nlink > 1 else []
            before = next((seen[key] for key in keys if key in seen), None)
            if before is None:
                kept.append(image)
                seen |= dict.fromkeys(keys, (split, class_name, image.path))
            elif before[:2] == (split, class_name):
                left_out["links to images that are already counted"] += 1
            else:
                kind = "splits" if before[0] != split else "classes"
                raise UserError(
                    f"{before[2]} and {image.path} are the same file in two {kind}; remove one"
                )
        files[split, class_name] = sorted(kept)
