"""Examples -> batches of this process, in an order that is a function of the seed and step alone.

What is in memory is gathered by NumPy, a hundred thousand small images a second, and augmented on
the device. What isn't is decoded and cropped by Grain's threads or worker processes. Both hand out
the same examples in the same order, so that a run may move from one to the other.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import multiprocessing.resource_tracker
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from flax_cnns.data import batch_stream, decode
from flax_cnns.data.splits import decoding_error
from flax_cnns.data.types import (
    ArrayRows,
    DamagedImage,
    Dataset,
    ImageSource,
    find_multi_frame_files,
)
from flax_cnns.errors import ProcessLost, UserError
from flax_cnns.types import Batch

_ENDLESS = 2**60  # examples: what Grain is told, as it wants a length


def train_batches(
    dataset: Dataset,
    config: Any,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch]:
    """Yields this process's rows of each global batch from batch `start_step` on, without end:
    {"image": u8 [n H W C], "label": i32 [n]}; images of a user's own data may be f32, and labels
    f32 [n K]. Closing the generator stops its threads and worker processes. A data set made by
    `from_batches` gives a `batch_stream.TrainBatches`, which can also compute a batch's `digest`.

    `config` is `config.data`; n = batch_size / process_count, and this process has the rows
    process_index*n to (process_index+1)*n. Global batch s holds the positions s*B to (s+1)*B of
    all epochs' permutations, one after the other. No example is dropped, and a batch may be larger
    than the training set. The order depends on neither processes nor threads nor workers. So the
    step alone is the position, and Grain's own state, which fits a single number of workers, is
    not saved. Raises UserError if `batch_size` is not a multiple of `process_count`, and
    DamagedImage while iterating.
    """
    train, batch_size = dataset.splits["train"], config.batch_size
    n = _local_size("batch_size", batch_size, process_count)
    first = process_index * n
    if dataset.is_stream:
        process = process_index, process_count
        return batch_stream.TrainBatches(dataset, batch_size, start_step, process)
    if train.images is not None:
        return _gather_batches(train.images, train.labels, seed, start_step, batch_size, first, n)
    crop, start = tuple(config.augment.random_resized_crop), start_step * batch_size
    order = seed, start, batch_size, first, n
    stream = TrainStream(train.source, dataset.image_shape, crop, *order, config.skip_damaged)
    return _note_found(_through_grain(stream, n, config), stream, dataset)


def eval_batches(
    dataset: Dataset,
    split: str,
    config: Any,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch]:
    """Every example of `split` once, in order: {"image", "label", "mask" f32 [n]}, n =
    eval_batch_size / process_count.

    The last batches are filled up with black images of mask 0, so that every process has the same
    number of batches; so is what cannot be decoded, where `config.skip_damaged`. Raises UserError.
    """
    if split not in dataset.splits:
        known = ", ".join(sorted(dataset.splits))
        raise UserError(f"{dataset.name} has no {split!r} split here; it has: {known}")
    part, batch_size = dataset.splits[split], config.eval_batch_size
    n = _local_size("eval_batch_size", batch_size, process_count)
    if dataset.is_stream:
        return batch_stream.eval_batches(dataset, split, batch_size, (process_index, process_count))
    number = -(-len(part) // batch_size)
    first = process_index * n
    if part.images is not None:
        return _eval_in_memory(part.images, part.labels, number, batch_size, first, n)
    stream = EvalStream(
        part.source,
        dataset.image_shape,
        dataset.eval_share,
        number,
        batch_size,
        first,
        n,
        config.skip_damaged,
    )
    return _note_found(_through_grain(stream, n, config), stream, dataset)


def _local_size(name: str, batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"data.{name} must be a positive multiple of the number of processes, "
            f"{process_count}; got {batch_size}"
        )
    return batch_size // process_count


# ---- the order


@functools.lru_cache(maxsize=3)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` examples in an epoch, the same on every machine."""
    stream = np.random.SeedSequence([seed, epoch])
    return np.random.Generator(np.random.Philox(stream)).permutation(size)


def row_at(position: int, seed: int, size: int) -> int:
    """The example at a position of the endless stream."""
    epoch, place = divmod(position, size)
    return int(permutation(seed, epoch, size)[place])


# ---- in memory


def _gather_batches(
    images: np.ndarray | ArrayRows,
    labels: np.ndarray,
    seed: int,
    step: int,
    batch_size: int,
    first: int,
    n: int,
) -> Generator[Batch]:
    size = len(images)
    while True:
        start = step * batch_size + first
        rows = [row_at(start + i, seed, size) for i in range(n)]
        yield {"image": images[rows], "label": labels[rows]}
        step += 1


def _eval_in_memory(
    images: np.ndarray | ArrayRows,
    labels: np.ndarray,
    number: int,
    batch_size: int,
    first: int,
    n: int,
) -> Generator[Batch]:
    for b in range(number):
        rows = b * batch_size + first + np.arange(n)
        mask = rows < len(images)
        rows = np.where(mask, rows, 0)
        yield {
            "image": images[rows] * mask[:, None, None, None],  # u8 * bool stays u8
            "label": labels[rows] * (mask if labels.ndim == 1 else mask[:, None]),
            "mask": mask.astype(np.float32),
        }


# ---- through Grain


@dataclasses.dataclass(frozen=True)
class TrainStream:
    """One process's training examples, decoded and cropped, as Grain's random-access source."""

    source: ImageSource
    image_shape: tuple[int, int, int]
    crop: tuple[float, float] | tuple[()]
    seed: int
    start: int  # position of the first global batch
    batch_size: int
    first: int  # this process's rows of each global batch
    n: int
    skip_damaged: bool

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> Batch:
        batch, row = divmod(int(i), self.n)
        position = self.start + batch * self.batch_size + self.first + row
        size, _, channels = self.image_shape
        example, skipped = row_at(position, self.seed, len(self.source)), -1
        for _ in range(len(self.source)):
            # Keyed by the place in the global stream, as on the device. The 1 keeps it apart from
            # the permutations.
            rng = np.random.Generator(
                np.random.Philox(np.random.SeedSequence([self.seed, position, 1]))
            )
            try:
                image, label = decode.read_example(
                    self.source, example, size, channels, crop=self.crop, rng=rng
                )
                seen = {"image": image, "label": np.int32(label), "skipped": skipped}
                return seen | _find_multi_frame(self.source, example)
            except DamagedImage:
                if not self.skip_damaged:
                    raise
                skipped = example
                example = (example + 1) % len(self.source)  # the next one takes its place
        raise decoding_error("training", self.source)


@dataclasses.dataclass(frozen=True)
class EvalStream:
    """One process's examples of a split, in order, filled up to whole batches."""

    source: ImageSource
    image_shape: tuple[int, int, int]
    share: float
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
        size, _, channels = self.image_shape
        skipped = -1
        if example < len(self.source):
            try:
                source, share = self.source, self.share
                image, label = decode.read_example(source, example, size, channels, share=share)
                seen = {"image": image, "label": np.int32(label), "mask": np.float32(1)}
                return seen | {"skipped": -1} | _find_multi_frame(self.source, example)
            except DamagedImage:
                if not self.skip_damaged:
                    raise
                skipped = example
        black = np.zeros(self.image_shape, np.uint8)
        unseen = {"image": black, "label": np.int32(0), "mask": np.float32(0)}
        return unseen | {"skipped": skipped, "multi_frame": -1}


def _find_multi_frame(source: ImageSource, example: int) -> dict[str, int]:
    """{"multi_frame": the example's number if its file holds several pictures, else -1}."""
    files = find_multi_frame_files(source)
    return {"multi_frame": example if files and source.location(example) in files else -1}


def _note_found(
    examples: Iterable[Batch], stream: TrainStream | EvalStream, dataset: Dataset
) -> Generator[Batch]:
    """The batches without "skipped" and "multi_frame". The names of these examples (-1: none) go to
    `dataset.damaged` and `dataset.multi_frame_files`.

    They travel with the batches because worker processes keep what they note to themselves.
    """
    damaged, location = dataset.damaged, stream.source.location
    examples = iter(examples)
    try:
        for batch in examples:
            batch = dict(batch)
            for example in batch.pop("skipped"):
                if example >= 0 and (name := location(int(example))) not in damaged:
                    damaged.append(name)
            for example in batch.pop("multi_frame"):
                if example >= 0:
                    dataset.multi_frame_files.add(location(int(example)))
            yield batch
    finally:
        examples.close()


def _through_grain(stream: TrainStream | EvalStream, n: int, config: Any) -> Iterable[Batch]:
    import grain  # a second to import, for streamed data only

    examples = grain.MapDataset.source(stream)
    threads = max(1, config.threads)
    if not config.workers:
        # Examples are decoded side by side, so that the first batch is there soon.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * n + threads)
        return examples.to_iter_dataset(options).batch(n)
    check_main_guard(config.workers)
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads some; without absl.app none are parsed
    # Whole batches go round the workers: they come out in the same order as without workers.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    processes = grain.MultiprocessingOptions(num_workers=config.workers)
    return _from_workers(
        examples.batch(n).to_iter_dataset(options).mp_prefetch(processes, _start_worker)
    )


# ---- worker processes

_PARENTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the parent answers these


def _start_worker(index: int, count: int) -> None:
    """Runs in every worker before its first example. The worker ends with its parent, however the
    parent ends; Python's resource tracker then removes what Grain shares with the worker. It
    ignores Ctrl-C and a cluster's SIGTERM, which come to all processes: the parent still has to
    save."""
    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _starting_processes() -> Iterator[None]:
    """A context in which started processes inherit a mask against the parent's signals. Python's
    resource tracker is started too, without its warnings: it would report what Grain had under way,
    even at an ordinary end."""
    before, ignore = os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)
    try:
        os.environ["PYTHONWARNINGS"] = f"{before},{ignore}" if before else ignore
        multiprocessing.resource_tracker.ensure_running()
        del os.environ["PYTHONWARNINGS"]
        if before:
            os.environ["PYTHONWARNINGS"] = before
        signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)  # the tracker's start unblocked them
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _from_workers(examples: Iterable[Batch]) -> Generator[Batch]:
    """The same examples; raises `ProcessLost` if Grain says that a worker process has ended."""
    examples = iter(examples)
    try:
        with _starting_processes():
            first = next(examples)
        yield first
        yield from examples
    except StopIteration:
        return
    except RuntimeError as error:
        found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if found is None:
            raise
        code = int(found[1])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        why = {-signal.SIGKILL: ", as the system does when memory runs out"}
        why |= {-signal.SIGBUS: ", as the system does when /dev/shm is full"}
        raise ProcessLost(
            f"a worker process that reads images (data.workers) {how}{why.get(code, '')}"
        ) from None
    finally:
        examples.close()


def check_main_guard(workers: int) -> None:
    """Raises `UserError` if the running script would start itself again in every worker, which
    imports it: if it makes this call outside `if __name__ == "__main__":`."""
    main = sys.modules["__main__"]
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)):
        frame = frame.f_back
    try:
        file = main.__file__
        statements = ast.parse(pathlib.Path(file).read_bytes()).body
    except (AttributeError, OSError, SyntaxError, ValueError):  # a notebook, a prompt
        return
    at = [s for s in statements if frame and s.lineno <= frame.f_lineno <= s.end_lineno]
    if at and not any(isinstance(inner, ast.If) for s in at for inner in ast.walk(s)):
        raise UserError(
            f"data.workers={workers}: each of these processes imports {file}, which would run"
            f" again from line {at[0].lineno}; put what it does below"
            ' `if __name__ == "__main__":`, or set data.workers=0'
        )
