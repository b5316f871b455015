"""What a data set is, and where it comes from: digits, TFDS, official archives, a folder of images,
or noise.

Whatever the source, the splits get their roles here: `train`; `test`, looked at once, at the end;
`validation`, by which everything else is chosen. Where a data set has no labelled test split its
validation split serves as test (ImageNet); where it has neither, a fifth of train does, seeded and
stratified. Where no validation split is left it is taken from train. Of the classes a config may
choose some, before all that; of the training examples that are left it may keep a fraction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data import images as img
from flax_cnns.data import splits as data_splits
from flax_cnns.data.splits import Split
from flax_cnns.errors import UserError, did_you_mean

COVARIANCE_OF = 2000  # images, evenly spread over those that are streamed
EVAL_SHARE = 0.875  # of the shorter side, in evaluation of networks trained on random crops


class Known(NamedTuple):
    """What is published about a data set; mean and std per channel in 0..1, of the training
    images."""

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()


_DIGITS = tuple("0123456789")
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_IMAGENET = Known(1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

KNOWN = {
    "digits": Known(10, (0.3054,), (0.3758,), _DIGITS),  # tests/data/test_digits.py computes them
    "mnist": Known(10, (0.1307,), (0.3081,), _DIGITS),
    "fashion_mnist": Known(10, (0.2860,), (0.3530,), _CLOTHES),
    "cifar10": Known(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _CIFAR10),
    "cifar100": Known(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn_cropped": Known(10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), _DIGITS),
    "imagenet2012": _IMAGENET,
    "imagenet2012_subset": _IMAGENET,
}
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as PIL has it


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # H, W, C as the network sees it
    mean: tuple[float, ...]  # per channel, in 0..1
    std: tuple[float, ...]
    normalized_by: str  # where mean and std come from: published, training images, ImageNet
    splits: dict[str, Split]  # train, test, and validation if there is one
    eval_share: float = 1.0  # of the shorter side that evaluation sees
    # [C C] of the training images' colours in 0..1; (): not needed, as data.augment.pca is off.
    covariance: tuple[tuple[float, ...], ...] = ()
    # Images left out because they could not be decoded; it grows while a split is streamed.
    damaged: list[str] = dataclasses.field(default_factory=list)
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # files by kind
    # Files with several pictures, of which the first is used; grows while a split is streamed.
    several: set[str] = dataclasses.field(default_factory=set)
    notes: tuple[str, ...] = ()  # what may be intended, but would otherwise go unnoticed
    own_validation: bool = False  # the validation split is the data set's, not taken from train
    # See flax_cnns/data/fingerprint.py; {} for noise, and if it was not computed.
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seen(self) -> fingerprints.Seen:
        counts = {role: len(split) for role, split in self.splits.items()}
        mean = self.mean if self.normalized_by == "training images" else ()
        return fingerprints.Seen(self.fingerprint, counts, mean)

    @property
    def in_memory(self) -> bool:
        """False: images are decoded as they come, and the loader does the random resized crop."""
        return self.splits["train"].images is not None

    def as_dict(self) -> dict[str, Any]:
        """What it is, without its images, as JSON has it."""
        found = ("splits", "damaged", "left_out", "several", "notes", "own_validation")
        fields = (f.name for f in dataclasses.fields(self) if f.name not in found)
        return {name: getattr(self, name) for name in fields}

    def describe(self) -> list[str]:
        """Lines for the user: how many images each split has, what was left out, notes."""
        counts = ", ".join(f"{role} {len(split):,}" for role, split in self.splits.items())
        lines = [f"{self.name}: {self.num_classes} classes; images: {counts}"]
        if said := data_splits.describe(self.left_out):
            lines.append(f"left out: {said}")
        if self.several:
            lines.append(
                f"files with several pictures, of which the first is used: {len(self.several)}"
            )
        return lines + [f"note: {note}" for note in self.notes]

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Dataset:
        """Of `as_dict`, perhaps by way of JSON: a data set of no splits."""
        known = {f.name for f in dataclasses.fields(cls)}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in known}
        return cls(**plain, splits={})


class Raw(NamedTuple):
    """What a reader found, before roles, sizes and memory."""

    sources: dict[str, img.Source]  # by the data set's own split names
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]  # None: they vary
    left_out: Mapping[str, int] = MappingProxyType({})  # as Dataset has them
    several: set[str] | None = None
    about: dict[str, Any] = {}  # noqa: RUF012 (never changed) see `fingerprints.compute`


def load(config: Any, *, begun: bool = False) -> Dataset:
    """The data set that `config` (`config.data` of configs/common.py) describes.

    Raises UserError: unknown name, label or folder; no network; missing package; damaged file; a
    split that cannot be made, or of which no image can be decoded; one class alone. `begun`: a
    run of this config exists, and goes on with an ambiguous `data.classes`.
    """
    _check(config)
    if config.mock > 0:
        return _mock(config)
    raw = _read(config)
    for split, source in raw.sources.items():
        data_splits.check_source(source, f"{config.name}, {split} split", raw.num_classes)
    raw, notes = _choose_classes(raw, config, begun)
    if raw.num_classes < 2:
        raise UserError(f"expected two classes or more; {config.name} has {raw.num_classes}")
    found = fingerprints.compute(raw.sources, raw.class_names, raw.about)
    sources = data_splits.assign_roles(raw.sources, config.name, config.split_seed)
    own = raw.image_shape[2]
    size, channels = config.image_size, config.channels or own
    varies = None in raw.image_shape
    crops = bool(config.augment.random_resized_crop)
    share = EVAL_SHARE if varies and crops else 1.0
    in_memory = _fits(config, sum(map(len, sources.values())) * size * size * channels)
    if in_memory and varies and crops and config.in_memory == "auto":
        # Crops of what has been shrunk to image_size already would be enlarged and dull.
        in_memory = False

    splits, damaged = {}, []
    for role, source in sources.items():
        if not in_memory:
            splits[role] = Split(labels=source.labels, source=source)
            continue
        images, labels, skipped = img.read_all(
            source,
            size,
            channels,
            share=1.0 if role == "train" else share,
            threads=config.threads if varies else 1,
            skip_damaged=config.skip_damaged,
        )
        if not len(images):
            raise data_splits.decoding_error(role, source)
        splits[role] = Split(labels=labels, images=images)
        damaged += skipped
    own_validation = "validation" in splits
    if not own_validation and config.validation:
        splits = data_splits.take_from_train(
            splits, "validation", config.validation, config.split_seed
        )
    if config.fraction < 1:
        splits = data_splits.keep_fraction(splits, config.fraction, config.split_seed)
    for role, split in splits.items():
        if split.source is not None:
            data_splits.check_decodes(role, split.source, config.skip_damaged)
    notes += data_splits.find_notes(splits, raw.class_names, config.batch_size)

    mean, std, normalized_by = _statistics(config, own, channels, splits["train"])
    return Dataset(
        covariance=_covariance(config, size, channels, splits["train"]),
        name=config.name,
        num_classes=raw.num_classes,
        class_names=raw.class_names,
        image_shape=(size, size, channels),
        mean=mean,
        std=std,
        normalized_by=normalized_by,
        splits=splits,
        eval_share=share,
        damaged=damaged,
        left_out=raw.left_out,
        several=set() if raw.several is None else raw.several,
        notes=tuple(notes),
        fingerprint=found,
        own_validation=own_validation,
    )


def read_fingerprint(config: Any) -> dict[str, Any]:
    """The fingerprint of the data set that `config` describes, as `load` gives it; no image is
    decoded and nothing is downloaded. Raises UserError."""
    _check(config)
    if config.mock > 0:
        return {}
    raw, _ = _choose_classes(_read(config, prepare=False), config, begun=True)
    return fingerprints.compute(raw.sources, raw.class_names, raw.about)


def base_name(name: str) -> str:
    """TFDS's name without config and version: imagenet2012_subset/10pct:5.0.0."""
    return name.split("/")[0].split(":")[0]


def _check(config: Any) -> None:
    for name, allowed in {
        "source": ("auto", "tfds", "archive", "folder"),
        "in_memory": ("auto", "yes", "no"),
        "channels": (0, 1, 3),
    }.items():
        if config[name] not in allowed:
            raise UserError(f"data.{name} is one of {allowed}; got {config[name]!r}")
    if config.image_size < 1:
        raise UserError(f"data.image_size is in pixels, at least 1; got {config.image_size}")
    if config.validation < 0 or (config.validation >= 1 and config.validation % 1):
        raise UserError(
            f"data.validation is a fraction below 1, a count, or 0; got {config.validation}"
        )
    if not 0 < config.fraction <= 1:
        raise UserError(f"data.fraction is above 0, at most 1; got {config.fraction}")


def _read(config: Any, *, prepare: bool = True) -> Raw:
    """Chooses the reader by `source` and by what lies in `dir`."""
    # Late imports: TFDS takes half a second, and a folder of images needs none of it.
    from flax_cnns.data import archives, folder

    source, name, directory = config.source, config.name, config.dir
    if source == "auto":
        if name == "digits":
            source = "tfds"
        elif name == "folder":
            source = "folder"
        elif directory and archives.find(name, directory):
            source = "archive"
        else:
            source = "tfds"
    if source == "folder":
        return folder.read(directory, name)._replace(about={"reader": source})
    if source == "archive":
        raw = archives.read(name, directory, config.labels)
        return raw._replace(about={"reader": source})
    from flax_cnns.data import tfds_reader

    return tfds_reader.read(name, directory, config.labels, prepare=prepare)


def _choose_classes(raw: Raw, config: Any, begun: bool) -> tuple[Raw, list[str]]:
    """The examples of `config.classes` alone, labeled in the order in which these are given; and
    notes."""
    chosen, notes = _classes(config, raw.class_names, begun)
    if not chosen:
        return raw, notes
    new = np.full(raw.num_classes, -1, np.int32)
    new[chosen] = np.arange(len(chosen))

    class_names = tuple(raw.class_names[i] for i in chosen)

    def choose(role: str, source: img.Source) -> img.Source:
        labels = new[img.read_labels(source)]
        rows, name = np.flatnonzero(labels >= 0), f"classes {chosen}"
        if not len(rows):
            raise UserError(
                f"data.classes: the {role} split of {config.name} has no image of "
                f"{', '.join(class_names)}"
            )
        if isinstance(source, img.ArraySource):  # arrays stay arrays: nothing is decoded
            return img.ArraySource(source.images[rows], labels[rows], f"{source.name}, {name}")
        return img.Relabelled(img.Subset(source, rows, name), labels[rows], name)

    raw = raw._replace(
        sources={role: choose(role, source) for role, source in raw.sources.items()},
        num_classes=len(chosen),
        class_names=class_names,
    )
    return raw, notes


def _classes(
    config: Any, names: tuple[str, ...], begun: bool = False
) -> tuple[list[int], list[str]]:
    """`config.classes` as numbers, and notes. Raises UserError for one that there is not, or there
    twice, and for a number that is another class's name, which is a note where a run is `begun`."""
    chosen, notes = [], []
    for given in config.classes:
        if isinstance(given, int) and str(given) in names and names.index(str(given)) != given:
            counted = names[given : given + 1] if given >= 0 else ()
            said = (
                f"data.classes: {given} is ambiguous: {config.name} has a class named "
                f"{str(given)!r}, and number {given} is {repr(*counted) if counted else 'none'}"
            )
            if not begun or not counted:
                raise UserError(f"{said}; give names, in quotes: {str(given)!r}")
            notes.append(f"{said}; this run took the number")
        if given in names:
            chosen.append(names.index(given))
        elif isinstance(given, int) and 0 <= given < len(names):
            chosen.append(given)
        else:
            near = did_you_mean(given, names) if isinstance(given, str) else ""
            known = near or f"; it has 0 to {len(names) - 1}"
            raise UserError(f"data.classes: {config.name} has no class {given!r}{known}")
    if len(chosen) == 1 or len(set(chosen)) < len(chosen):
        raise UserError(
            f"data.classes: expected two classes or more, each once; got {tuple(config.classes)}"
        )
    return chosen, notes


def _fits(config: Any, size: int) -> bool:
    """Whether so many bytes of images go to memory."""
    if config.in_memory == "auto":
        return size < config.memory_limit * 2**30
    return config.in_memory == "yes"


def _statistics(
    config: Any, own: int, channels: int, train: Split
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and std per channel in 0..1, and where they come from."""
    if config.mean:
        if {len(config.mean), len(config.std)} - {1, channels}:
            raise UserError(
                f"data.mean and data.std: expected 1 or {channels} numbers each, got "
                f"{tuple(config.mean)} and {tuple(config.std)}"
            )
        mean, std = (np.broadcast_to(given, channels) for given in (config.mean, config.std))
        return tuple(map(float, mean)), tuple(map(float, std)), "config"
    known, by = KNOWN.get(base_name(config.name)), "published"
    if known is None or (own == 3 and channels == 1):
        # The spread of the grey image doesn't follow from those of the colours, which go together.
        if train.images is not None:
            mean, std = moments(train.images)
            return mean, std, "training images"
        if known is None:
            known, by = _IMAGENET, "ImageNet"
    mean, std = np.array(known.mean), np.array(known.std)
    if channels == 1 and len(mean) == 3:
        mean, std = _LUMA @ mean[:, None], _LUMA @ std[:, None]
    mean, std = np.broadcast_to(mean, channels), np.broadcast_to(std, channels)
    return tuple(map(float, mean)), tuple(map(float, std)), by


def moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of u8 [N H W C], in 0..1, exactly, by counting the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[-1]):
        share = np.zeros(256)
        for start in range(0, len(images), 4096):  # bincount makes int64 of what it counts
            part = images[start : start + 4096, ..., channel]
            share += np.bincount(part.ravel(), minlength=256)
        share /= share.sum()
        mean.append(float(share @ values))
        # A constant channel is left at 0, not divided by 0.
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return tuple(mean), tuple(std)


def _covariance(
    config: Any, size: int, channels: int, train: Split
) -> tuple[tuple[float, ...], ...]:
    """Of the colours of all training images; of up to COVARIANCE_OF where they are streamed."""
    if not config.augment.pca:
        return ()
    images = train.images
    if images is None:
        count = min(COVARIANCE_OF, len(train))
        some = img.Subset(train.source, np.arange(count) * len(train) // count, "for colours")
        images, _, _ = img.read_all(
            some,
            size,
            channels,
            share=1.0,
            threads=config.threads,
            skip_damaged=config.skip_damaged,
        )
        if not len(images):
            raise data_splits.decoding_error("train", some)
    return covariance(images)


def covariance(images: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Between the channels of u8 [N H W C], over all pixels, of values in 0..1: [C C]."""
    channels = images.shape[-1]
    total, products = np.zeros(channels), np.zeros((channels, channels))
    for start in range(0, len(images), 1024):
        pixels = images[start : start + 1024].reshape(-1, channels) / 255
        total += pixels.sum(0)
        products += pixels.T @ pixels
    count = images.size // channels
    mean = total / count
    return tuple(map(tuple, (products / count - np.outer(mean, mean)).tolist()))


def _mock(config: Any) -> Dataset:
    """Random images of the data set's own classes and channels: nothing is read or downloaded."""
    num_classes, class_names, own = _facts(config)
    chosen, notes = _classes(config, class_names)
    if chosen:
        num_classes, class_names = len(chosen), tuple(class_names[i] for i in chosen)
    size, channels = config.image_size, config.channels or own
    rng = np.random.default_rng(config.split_seed)
    counts = {"train": config.mock, "test": max(1, config.mock // 5)}
    if config.validation:
        counts["validation"] = counts["test"]
    splits = {}
    for role, count in counts.items():
        images = rng.integers(0, 256, (count, size, size, channels), np.uint8)
        labels = rng.permutation(np.arange(count, dtype=np.int32) % num_classes)
        if _fits(config, images.nbytes):
            splits[role] = Split(labels=labels, images=images)
        else:
            source = img.ArraySource(images, labels, f"mock {config.name} {role}")
            splits[role] = Split(labels=labels, source=source)
    if config.fraction < 1:
        splits = data_splits.keep_fraction(splits, config.fraction, config.split_seed)
    return Dataset(
        name=config.name,
        num_classes=num_classes,
        class_names=class_names,
        image_shape=(size, size, channels),
        mean=(0.5,) * channels,
        std=(0.2887,) * channels,  # 1/sqrt(12): uniform
        covariance=_covariance(config, size, channels, splits["train"]),
        normalized_by="uniform noise",
        splits=splits,
        notes=tuple(notes),
    )


def _facts(config: Any) -> tuple[int, tuple[str, ...], int]:
    """Classes, their names and channels of a data set that need not be there."""
    if config.name == "folder":
        return 10, _DIGITS, 3
    from flax_cnns.data import tfds_reader

    return tfds_reader.facts(config.name, config.dir, config.labels)
