"""The fingerprint of a data set: a run keeps it, to notice when its data changed.

A fingerprint is plain JSON; {} stands for noise (`data.mock`), which never changes.

reader    folder, archive, tfds, or arrays of the user's own
builder   of TFDS: name, config and version
classes   their names, in the order of the labels
sized     of a folder: whether the digests hold the sizes of the files
splits    by the data set's own names, before roles:
          images   how many
          classes  how many of each class; absent where it would take reading every example, and
                   where an example has more than one
          digests  of a folder: one for each class (names within the class's folder, and sizes);
                   of arrays: one (pixels and labels)
          bytes    of a user's own TFDS builder, whose version may stay the same

It does not depend on where the data lies, and needs no extra walk over the files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_SIZED_FILES = 100_000  # files whose sizes are asked for: on a network each is a round trip
DIGEST_LENGTH = 16  # of a digest, against accidents: a data set may have 20,000 classes
MAX_SHOWN = 6  # differences in one message
MEAN_TOLERANCE = (
    1e-4  # of values in 0..1: decoders of JPEG differ by less, an image in 1000 makes more
)


class DataSnapshot(NamedTuple):
    """A data set as it is now."""

    fingerprint: dict[str, Any]
    counts: dict[str, int] = {}  # noqa: RUF012 (never changed) examples by role
    mean: tuple[float, ...] = ()  # per channel, where it was computed from the training images


def compute(
    sources: Mapping[str, Any], class_names: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The fingerprint of the sources of the data set's own splits.

    `about`: what the reader adds, {"reader": "tfds", "builder": ...}; "bytes" go to their splits.
    """
    about = dict(about)
    sizes = about.pop("bytes", {})
    bases = {split: _base(source) for split, source in sources.items()}
    found = {**about, "classes": list(class_names)}
    files = sum(len(rows) for base, rows in bases.values() if hasattr(base, "paths"))
    if files:
        found["sized"] = files <= MAX_SIZED_FILES
    found["splits"] = {}
    for split, (base, rows) in bases.items():
        one: dict[str, Any] = {"images": len(rows)}
        labels = sources[split].labels
        if labels is not None and np.ndim(labels) == 1:
            labels = np.asarray(labels)
            one["classes"] = np.bincount(labels, minlength=len(class_names)).tolist()
        if hasattr(base, "paths"):
            one["digests"] = _of_files(base, rows, labels, class_names, found["sized"])
        elif hasattr(base, "images"):
            one["digests"] = [_of_arrays(base.images, rows, labels)]
        if split in sizes:
            one["bytes"] = int(sizes[split])
        found["splits"][split] = one
    return found


def _base(source: Any) -> tuple[Any, np.ndarray]:
    """(the innermost source, below Subset and Relabeled, the rows of it that are used)."""
    rows = np.arange(len(source))
    while hasattr(source, "source"):
        rows = getattr(source, "rows", np.arange(len(source)))[rows]
        source = source.source
    return source, rows


def _of_files(
    files: Any, rows: np.ndarray, labels: np.ndarray, class_names: Sequence[str], sized: bool
) -> list[str]:
    digests, names = [hashlib.sha256() for _ in class_names], files.relative_paths
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        name = _within_class(names[row], class_names[label])
        size = _size(files.paths[row]) if sized else 0
        digests[label].update(os.fsencode(name) + b"\0%d\n" % size)
    return [digest.hexdigest()[:DIGEST_LENGTH] for digest in digests]


def _within_class(path: str, name: str) -> str:
    """train/CLASS/a/b.png and CLASS/a/b.png -> a/b.png, so that a renamed class differs in its
    name alone."""
    first, _, rest = path.partition(os.sep)
    if first == name:
        return rest
    second, _, below = rest.partition(os.sep)
    return below if second == name else path


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # reading the file gives a better error
        return -1


def _of_arrays(images: Any, rows: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256(str((len(rows), *images.shape[1:])).encode())
    whole = len(rows) == len(images)
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        digest.update(np.ascontiguousarray(images[part if whole else rows[part]]))
    digest.update(np.ascontiguousarray(labels, np.int32 if labels.ndim == 1 else np.float32))
    return digest.hexdigest()[:DIGEST_LENGTH]


# ---------------------------------------------------------------------------- comparing


def find_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; [] where nothing does."""
    if not was or not now:
        return []
    for name in ("reader", "builder"):
        if was.get(name) != now.get(
            name
        ):  # the order of examples differs: nothing else is comparable
            return [f"it was read as {_reader(was)}, and is read as {_reader(now)} now"]
    found = find_class_differences(was["classes"], now["classes"])
    place = {name: i for i, name in enumerate(was["classes"])}
    pairs = [(place[name], i) for i, name in enumerate(now["classes"]) if name in place]
    for split in dict.fromkeys([*was["splits"], *now["splits"]]):
        old, new = was["splits"].get(split), now["splits"].get(split)
        if old is None:
            found.append(f"the split {split} is new ({new['images']} images)")
        elif new is None:
            found.append(f"the split {split} is gone (it had {old['images']} images)")
        else:
            same_names = was.get("sized") == now.get("sized")
            found += _of_split(split, old, new, pairs, now["classes"], same_names)
    return found


def _reader(fingerprint: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (fingerprint.get("reader"), fingerprint.get("builder"))))


def find_class_differences(was: Sequence[str], now: Sequence[str]) -> list[str]:
    """Of the classes' names: "class 0 was 'arch', is 'vault'"."""
    was, now = list(was), list(now)
    if was == now:
        return []
    if len(was) != len(now):
        sides = (
            ("gone", [n for n in was if n not in now]),
            ("new", [n for n in now if n not in was]),
        )
        lists = [
            f"{word}: {join_first(map(repr, names), 3, ', ')}" for word, names in sides if names
        ]
        listed = f" ({'; '.join(lists)})" if lists else ""
        return [f"it had {len(was)} classes, has {len(now)}{listed}"]
    changed = [(i, a, b) for i, (a, b) in enumerate(zip(was, now)) if a != b]
    shown = [f"class {i} was {a!r}, is {b!r}" for i, a, b in changed[:3]]
    more = len(changed) - len(shown)
    return [*shown, f"{more} more classes have other names"] if more else shown


def _of_split(
    split: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    comparable: bool,
) -> list[str]:
    counts = old.get("classes"), new.get("classes")
    digests = old.get("digests", []), new.get("digests", [])
    per_class = len(digests[1]) == len(names) > 1
    found = []
    if all(counts):
        for a, b in pairs:
            here = f"{split}/{names[b]}"
            if counts[0][a] != counts[1][b]:
                found.append(f"{here} had {counts[0][a]} images, has {counts[1][b]}")
            elif per_class and comparable and digests[0][a] != digests[1][b]:
                found.append(f"{here} has other files ({counts[1][b]} still)")
    if not found and old["images"] != new["images"]:
        found.append(f"{split} had {old['images']} images, has {new['images']}")
    if not found and not per_class and digests[0] != digests[1]:
        found.append(f"{split} has other pixels or labels ({new['images']} images still)")
    if not found and old.get("bytes") != new.get("bytes"):
        found.append(f"{split} had {old.get('bytes')} bytes, has {new.get('bytes')}")
    return found


def find_count_differences(
    summary: Mapping[str, Any], batch_size: int, counts: Mapping[str, int]
) -> list[str]:
    """What differs in the number of examples, for a run without a fingerprint."""
    if summary.get("damaged_images"):  # they were left out, perhaps while they were streamed
        return []
    then = {"test": summary.get("test/examples")}
    if summary.get("epochs"):
        then["train"] = round(summary["step"] * batch_size / summary["epochs"])
    return [
        f"{role} had {count} images, has {counts[role]}"
        for role, count in then.items()
        if count is not None and role in counts and count != counts[role]
    ]


def find_mean_differences(was: Sequence[float], now: Sequence[float]) -> list[str]:
    """What differs in the mean of the training images, for a run without a fingerprint."""
    if len(was) == len(now) and np.allclose(was, now, rtol=0, atol=MEAN_TOLERANCE):
        return []
    old, new = (", ".join(f"{value:.4g}" for value in values) for values in (was, now))
    return [f"the mean of the training images was ({old}), is ({new})"]


def join_first(found: Iterable[str], most: int = MAX_SHOWN, between: str = "; ") -> str:
    """The first ones, and how many more there are."""
    found = list(found)
    more = f"{between}and {len(found) - most} more" if len(found) > most else ""
    return between.join(found[:most]) + more
