"""The fingerprint of a data set. A run stores it to notice later changes of the data.

A fingerprint is plain JSON with these keys. It is {} for noise (`data.mock`), which never changes.

reader    folder, archive or tfds; arrays or batches for a user's own data
builder   of TFDS: name, config and version
classes   class names, in the order of the labels
decoder   opencv, if it decodes the JPEGs; absent: Pillow
sized     of a folder: whether the digests include file sizes
splits    by the data set's own split names, before roles are assigned:
          images   number of images
          classes  images per class; absent if the labels are not known without reading every
                   example, and if an example may have several classes
          digests  of a folder: one per class (file names within the class folder, and sizes);
                   of arrays: one (pixels and labels)
          bytes    of a user's own TFDS builder: its version may not change when its data does

The fingerprint does not depend on the data's location, and needs no extra walk over the files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# With more files, sizes are not read, because each is a round trip on a network drive.
MAX_SIZED_FILES = 100_000
DIGEST_LENGTH = 16  # hex digits; short, because a data set may have 20,000 classes
MAX_SHOWN = 6  # differences in one message
# For values in 0..1. Means by two JPEG decoders differ by less; a change of one image in 1000
# shifts them by more.
MEAN_TOLERANCE = 1e-4


class DataSnapshot(NamedTuple):
    """The facts about a data set that a run compares with those it stored."""

    fingerprint: dict[str, Any]
    counts: dict[str, int] = {}  # noqa: RUF012 (never changed) examples by role
    mean: tuple[float, ...] = ()  # per channel, if it was computed from the training images


def compute(
    sources: Mapping[str, Any], class_names: Sequence[str], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Computes the fingerprint from the sources of the data set's own splits.

    `provenance` is what the reader adds, such as {"reader": "tfds", "builder": ...}. If it has
    "bytes" by split, each number moves to the entry of its split.
    """
    facts = dict(provenance)
    sizes = facts.pop("bytes", {})
    bases = {split: _base(source) for split, source in sources.items()}
    fingerprint = {**facts, "classes": list(class_names)}
    files = sum(len(rows) for base, rows in bases.values() if hasattr(base, "paths"))
    if files:
        fingerprint["sized"] = files <= MAX_SIZED_FILES
    fingerprint["splits"] = {}
    for split, (base, rows) in bases.items():
        entry: dict[str, Any] = {"images": len(rows)}
        labels = sources[split].labels
        if labels is not None and np.ndim(labels) == 1:
            labels = np.asarray(labels)
            entry["classes"] = np.bincount(labels, minlength=len(class_names)).tolist()
        if hasattr(base, "paths"):
            sized = fingerprint["sized"]
            entry["digests"] = _digest_files(base, rows, labels, class_names, sized)
        elif hasattr(base, "images"):
            entry["digests"] = [_digest_arrays(base.images, rows, labels)]
        if split in sizes:
            entry["bytes"] = int(sizes[split])
        fingerprint["splits"][split] = entry
    return fingerprint


def _base(source: Any) -> tuple[Any, np.ndarray]:
    """Returns (the innermost source inside Subset and Relabeled, the rows of it that are used)."""
    rows = np.arange(len(source))
    while hasattr(source, "source"):
        rows = getattr(source, "rows", np.arange(len(source)))[rows]
        source = source.source
    return source, rows


def _digest_files(
    files: Any, rows: np.ndarray, labels: np.ndarray, class_names: Sequence[str], sized: bool
) -> list[str]:
    digests, names = [hashlib.sha256() for _ in class_names], files.relative_paths
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        name = _strip_class(names[row], class_names[label])
        size = _file_size(files.paths[row]) if sized else 0
        digests[label].update(os.fsencode(name) + b"\0%d\n" % size)
    return [digest.hexdigest()[:DIGEST_LENGTH] for digest in digests]


def _strip_class(path: str, name: str) -> str:
    """Returns a/b.png for train/CLASS/a/b.png and CLASS/a/b.png, so that renaming a class does not
    change its digest."""
    first, _, rest = path.partition(os.sep)
    if first == name:
        return rest
    second, _, below = rest.partition(os.sep)
    return below if second == name else path


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # reading the file will give a better error
        return -1


def _digest_arrays(images: Any, rows: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256(str((len(rows), *images.shape[1:])).encode())
    whole = len(rows) == len(images)
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        digest.update(np.ascontiguousarray(images[part if whole else rows[part]]).data)
    dtype = np.int32 if labels.ndim == 1 else np.float32
    digest.update(np.ascontiguousarray(labels, dtype).data)
    return digest.hexdigest()[:DIGEST_LENGTH]


# ---- comparing


def find_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes the differences between two fingerprints; [] if there are none."""
    if not was or not now:
        return []
    for name in ("reader", "builder"):
        # Another reader orders the examples differently: nothing else is comparable.
        if was.get(name) != now.get(name):
            return [f"it was read as {_name_reader(was)}, now it is read as {_name_reader(now)}"]
    differences = find_class_differences(was["classes"], now["classes"])
    decoders = [each.get("decoder", "pillow") for each in (was, now)]
    if decoders[0] != decoders[1]:
        differences.append("JPEGs were decoded by {}, now by {}".format(*decoders))
    index = {name: i for i, name in enumerate(was["classes"])}
    pairs = [(index[name], i) for i, name in enumerate(now["classes"]) if name in index]
    for split in dict.fromkeys([*was["splits"], *now["splits"]]):
        old, new = was["splits"].get(split), now["splits"].get(split)
        if old is None:
            differences.append(f"the split {split} is new ({new['images']} images)")
        elif new is None:
            differences.append(f"the split {split} is gone (it had {old['images']} images)")
        else:
            is_comparable = was.get("sized") == now.get("sized")
            differences += _find_split_differences(
                split, old, new, pairs, now["classes"], is_comparable
            )
    return differences


def _name_reader(fingerprint: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (fingerprint.get("reader"), fingerprint.get("builder"))))


def find_class_differences(was: Sequence[str], now: Sequence[str]) -> list[str]:
    """Describes the differences between class names: "class 0 was 'arch', is 'vault'"."""
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


def _find_split_differences(
    split: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    is_comparable: bool,
) -> list[str]:
    """Describes the differences in a split. `pairs` holds the (old, new) index of each class that
    both have; `is_comparable` says that the digests of files were made in the same way."""
    old_counts, new_counts = old.get("classes"), new.get("classes")
    old_digests, new_digests = old.get("digests", []), new.get("digests", [])
    per_class = len(new_digests) == len(names) > 1
    differences = []
    if old_counts and new_counts:
        for a, b in pairs:
            where = f"{split}/{names[b]}"
            if old_counts[a] != new_counts[b]:
                differences.append(f"{where} had {old_counts[a]} images, has {new_counts[b]}")
            elif per_class and is_comparable and old_digests[a] != new_digests[b]:
                differences.append(f"{where} has other files (still {new_counts[b]})")
    if not differences and old["images"] != new["images"]:
        differences.append(f"{split} had {old['images']} images, has {new['images']}")
    if not differences and not per_class and old_digests != new_digests:
        differences.append(f"{split} has other pixels or labels (still {new['images']} images)")
    if not differences and old.get("bytes") != new.get("bytes"):
        differences.append(f"{split} had {old.get('bytes')} bytes, has {new.get('bytes')}")
    return differences


def find_count_differences(
    summary: Mapping[str, Any], batch_size: int, counts: Mapping[str, int]
) -> list[str]:
    """Describes the differences in the number of examples, for a run without a fingerprint."""
    if summary.get("damaged_images"):  # these were left out, perhaps while streaming
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
    """Describes a difference in the training images' mean, for a run without a fingerprint."""
    if len(was) == len(now) and np.allclose(was, now, rtol=0, atol=MEAN_TOLERANCE):
        return []
    old, new = (", ".join(f"{value:.4g}" for value in values) for values in (was, now))
    return [f"the mean of the training images was ({old}), is ({new})"]


def join_first(items: Iterable[str], limit: int = MAX_SHOWN, separator: str = "; ") -> str:
    """Joins the first `limit` items, and says how many more there are."""
    items = list(items)
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
