"""The examples of one process in their order, as random-access sources of Grain."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from flax_cnns.data import decode
from flax_cnns.data.splits import decoding_error
from flax_cnns.data.types import DamagedImage, ImageSource, find_multi_frame_files
from flax_cnns.types import Batch

_ENDLESS = 2**60  # the number of examples for Grain, which needs a length


@functools.lru_cache(maxsize=3)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of `size` examples in an epoch. It is the same on every machine."""
    stream = np.random.SeedSequence([seed, epoch])
    return np.random.Generator(np.random.Philox(stream)).permutation(size)


def find_row(position: int, seed: int, size: int) -> int:
    """Returns the example at a position of the endless stream."""
    epoch, offset = divmod(position, size)
    return int(permutation(seed, epoch, size)[offset])


def alternates_flips(augment: Any) -> bool:
    """Whether images are mirrored in every second epoch. Batches then say which images. `augment`
    is the section `config.data.augment`."""
    return augment.flip and augment.alternate_flip


@functools.lru_cache(maxsize=2)
def _mirrored_first(seed: int, size: int) -> np.ndarray:
    """Returns which of `size` examples are mirrored in the first epoch: bool [size]."""
    stream = np.random.SeedSequence([seed, 0, 2])  # the 2 separates it from other random numbers
    return np.random.Generator(np.random.Philox(stream)).random(size) < 0.5


def is_mirrored(position: int, seed: int, size: int) -> bool:
    """Whether the example at a position of the endless stream is mirrored, if flips alternate: each
    example is mirrored in every second epoch (Jordan 2024, arXiv 2404.00498, section 3.6)."""
    first = _mirrored_first(seed, size)[find_row(position, seed, size)]
    return bool(first) ^ bool(position // size % 2)


@dataclasses.dataclass(frozen=True)
class TrainStream:
    """One process's training examples, decoded and cropped, as a random-access source of Grain."""

    source: ImageSource
    image_shape: tuple[int, int, int]
    crop: tuple[float, float] | tuple[()]
    seed: int
    start: int  # position of the first global batch
    batch_size: int
    first: int  # this process's first row in each global batch
    n: int  # this process's rows in each global batch
    skip_damaged: bool
    decoder: str
    alternate: bool  # whether the batches say which images are mirrored

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> Batch:
        batch, row = divmod(int(i), self.n)
        position = self.start + batch * self.batch_size + self.first + row
        size, _, channels = self.image_shape
        example, skipped = find_row(position, self.seed, len(self.source)), -1
        for _ in range(len(self.source)):
            # Seeded by the position in the global stream, as on the device. The 1 separates these
            # random numbers from those of the permutations.
            seeds = np.random.SeedSequence([self.seed, position, 1])
            rng = np.random.Generator(np.random.Philox(seeds))
            try:
                image, label = decode.read_example(
                    *(self.source, example, size, channels),
                    crop=self.crop,
                    rng=rng,
                    decoder=self.decoder,
                )
                result = {"image": image, "label": np.int32(label), "skipped": skipped}
                if self.alternate:
                    mirror = is_mirrored(position, self.seed, len(self.source))
                    result["mirror"] = np.bool_(mirror)
                return result | _find_multi_frame(self.source, example)
            except DamagedImage:
                if not self.skip_damaged:
                    raise
                skipped = example
                example = (example + 1) % len(self.source)  # the next one takes its place
        raise decoding_error("training", self.source)


@dataclasses.dataclass(frozen=True)
class EvalStream:
    """One process's examples of a split, in order, padded to whole batches."""

    source: ImageSource
    reader: Callable[[Image.Image], np.ndarray]
    number: int
    batch_size: int
    first: int
    n: int
    skip_damaged: bool

    def __len__(self) -> int:
        return self.number * self.n

    def __getitem__(self, i: int) -> Batch:
        batch, row = divmod(int(i), self.n)
        example = batch * self.batch_size + self.first + row
        skipped = -1
        if example < len(self.source):
            try:
                image, label = decode.read_with(self.source, example, self.reader)
                result = {"image": image, "label": np.int32(label), "mask": np.float32(1)}
                return result | {"skipped": -1} | _find_multi_frame(self.source, example)
            except DamagedImage:
                if not self.skip_damaged:
                    raise
                skipped = example
        padding = {"image": self._black, "label": np.int32(0), "mask": np.float32(0)}
        return padding | {"skipped": skipped, "multi_frame": -1}

    @functools.cached_property
    def _black(self) -> np.ndarray:
        """A black image, read as the others are."""
        return self.reader(Image.new("RGB", (8, 8)))


def _find_multi_frame(source: ImageSource, example: int) -> dict[str, int]:
    """Returns {"multi_frame": `example` if its file has several frames, otherwise -1}."""
    files = find_multi_frame_files(source)
    return {"multi_frame": example if files and source.location(example) in files else -1}
