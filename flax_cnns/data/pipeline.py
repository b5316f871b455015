"""Batches of this process, in an order that depends only on the seed and the step.

Images in memory are gathered by NumPy, a hundred thousand small images a second, and augmented on
the device. Other images are decoded and cropped by Grain's threads or worker processes. Both give
the same examples in the same order, so a run may switch from one to the other.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import multiprocessing.resource_tracker
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from flax_cnns.data import batch_stream
from flax_cnns.data.images import center_box, read_box
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.streams import (
    EvalStream,
    TrainStream,
    alternates_flips,
    find_row,
    is_mirrored,
)
from flax_cnns.data.types import (
    ArrayRows,
    Dataset,
)
from flax_cnns.errors import ProcessLost, UserError
from flax_cnns.types import Batch


def train_batches(
    dataset: Dataset,
    config: Any,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch] | batch_stream.TrainBatches:
    """Yields this process's rows of each global batch, from batch `start_step` on and without end:
    {"image": u8 [n H W C], "label": i32 [n]}. A user's own images may be f32, and labels f32 [n K].
    With `augment.alternate_flip` also {"mirror": bool [n]}: the images to mirror.
    Closing the generator stops its threads and worker processes. For a data set of `from_batches`,
    the result is a `batch_stream.TrainBatches`, which can also compute the `digest` of a batch.

    `config` is a run's `config.data`; n = batch_size / process_count, and this process has the rows
    process_index*n to (process_index+1)*n. The permutations of all epochs form one long sequence,
    and global batch s is its positions s*B to (s+1)*B. No example is dropped, and a batch may be
    larger than the training set. The order does not depend on processes, threads or workers. A
    checkpoint therefore needs only the step; Grain's own state would fit one number of workers.

    Raises UserError if `batch_size` is not a multiple of `process_count`, and DamagedImage while
    iterating.
    """
    train, batch_size = dataset.splits["train"], config.batch_size
    n = _local_size("batch_size", batch_size, process_count)
    first = process_index * n
    if dataset.is_stream:
        process = process_index, process_count
        return batch_stream.TrainBatches(dataset, batch_size, start_step, process)
    alternate = alternates_flips(config.augment)
    if train.images is not None:
        assert train.labels is not None
        rows = _yield_rows(len(train.images), seed, start_step, batch_size, first, n, alternate)
        return _gather_batches(train.images, train.labels, rows)
    assert train.source is not None
    crop, start = tuple(config.augment.random_resized_crop), start_step * batch_size
    order = seed, start, batch_size, first, n
    rules = config.skip_damaged, config.decoder, alternate
    stream = TrainStream(train.source, dataset.image_shape, crop, *order, *rules)
    return _record_locations(_through_grain(stream, n, config), stream, dataset)


def train_rows(
    size: int,
    config: Any,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch]:
    """Yields {"rows": i32 [n]} for each batch, from batch `start_step` on and without end: the rows
    of a training set of `size` examples that `train_batches` gathers. With `augment.alternate_flip`
    also {"mirror": bool [n]}.

    Raises UserError if `batch_size` is not a multiple of `process_count`.
    """
    n = _local_size("batch_size", config.batch_size, process_count)
    alternate = alternates_flips(config.augment)
    first = process_index * n
    return _yield_rows(size, seed, start_step, config.batch_size, first, n, alternate)


def eval_batches(
    dataset: Dataset,
    split: str,
    config: Any,
    *,
    process_index: int = 0,
    process_count: int = 1,
    reader: Callable[[Image.Image], np.ndarray] | None = None,
) -> Generator[Batch]:
    """Yields every example of `split` once, in order: {"image", "label", "mask" f32 [n]}, with n =
    eval_batch_size / process_count.

    `reader` turns a stored image into an array of one shape for all images; the default is the
    central square at the data set's size. Black images with mask 0 fill the last batches, so that
    every process has the same number of batches. They also replace damaged images if
    `config.skip_damaged`. Raises UserError for an unknown split, if `process_count` does not divide
    `eval_batch_size`, and for a `reader` of images that are not stored as bytes; DamagedImage while
    iterating.
    """
    if split not in dataset.splits:
        known = ", ".join(sorted(dataset.splits))
        raise UserError(f"{dataset.name} has no {split!r} split; it has: {known}")
    examples, batch_size = dataset.splits[split], config.eval_batch_size
    n = _local_size("eval_batch_size", batch_size, process_count)
    if dataset.is_stream and reader is None:
        return batch_stream.eval_batches(dataset, split, batch_size, (process_index, process_count))
    number, first = -(-len(examples) // batch_size), process_index * n
    source = examples.source
    if examples.images is not None:
        assert examples.labels is not None
        if reader is None:
            return _eval_in_memory(examples.images, examples.labels, number, batch_size, first, n)
        if examples.images.dtype == np.uint8 and examples.labels.ndim == 1:
            source = ArraySource(examples.images, examples.labels, f"{dataset.name}, {split}")
    if source is None:
        raise UserError(
            f"{dataset.name}: its images can be read at the network's size only; crops and sizes"
            " need images stored as bytes, with one class each"
        )
    if reader is None:
        box_of = functools.partial(center_box, share=dataset.eval_share)
        size, _, channels = dataset.image_shape
        reader = functools.partial(
            read_box, box_of=box_of, size=size, channels=channels, decoder=config.decoder
        )
    stream = EvalStream(source, reader, number, batch_size, first, n, config.skip_damaged)
    return _record_locations(_through_grain(stream, n, config), stream, dataset)


def _local_size(name: str, batch_size: int, process_count: int) -> int:
    """Returns the rows of each process in a global batch."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"data.{name} must be a positive multiple of the number of processes, "
            f"{process_count}; got {batch_size}"
        )
    return batch_size // process_count


# ---- in memory


def _gather_batches(
    images: np.ndarray | ArrayRows, labels: np.ndarray, batches: Iterable[Batch]
) -> Generator[Batch]:
    for batch in batches:
        rows = batch.pop("rows")
        yield {"image": images[rows], "label": labels[rows], **batch}


def _yield_rows(
    size: int, seed: int, step: int, batch_size: int, first: int, n: int, alternate: bool
) -> Generator[Batch]:
    while True:
        places = range(step * batch_size + first, step * batch_size + first + n)
        batch = {"rows": np.array([find_row(place, seed, size) for place in places], np.int32)}
        if alternate:
            batch["mirror"] = np.array([is_mirrored(place, seed, size) for place in places])
        yield batch
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


def _record_locations(
    examples: Iterable[Batch], stream: TrainStream | EvalStream, dataset: Dataset
) -> Generator[Batch]:
    """Yields the batches without the keys "skipped" and "multi_frame". These hold example numbers,
    or -1; their locations are added to `dataset.damaged` and `dataset.multi_frame_files`.

    The numbers are part of the batches because worker processes cannot change the data set.
    """
    damaged, location = dataset.damaged, stream.source.location
    batches: Any = iter(examples)
    try:
        for batch in batches:
            batch = dict(batch)
            for example in batch.pop("skipped"):
                if example >= 0 and (name := location(int(example))) not in damaged:
                    damaged.append(name)
            for example in batch.pop("multi_frame"):
                if example >= 0:
                    dataset.multi_frame_files.add(location(int(example)))
            yield batch
    finally:
        batches.close()


def _through_grain(stream: TrainStream | EvalStream, n: int, config: Any) -> Iterable[Batch]:
    import grain  # takes a second, and only streamed data needs it

    examples = grain.MapDataset.source(stream)
    threads = max(1, config.threads)
    if not config.workers:
        # Threads share the examples of a batch, so that the first batch is ready soon.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * n + threads)
        return examples.to_iter_dataset(options).batch(n)
    check_main_guard(config.workers)
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags, which only absl.app parses
    # Workers take turns with whole batches, so the order is the same as without workers.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    processes = grain.MultiprocessingOptions(num_workers=config.workers)
    return _from_workers(
        examples.batch(n).to_iter_dataset(options).mp_prefetch(processes, _start_worker)
    )


# ---- worker processes

_PARENT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the parent handles these


def _start_worker(index: int, count: int) -> None:
    """Runs in every worker before its first example.

    The worker ends when its parent does; Python's resource tracker then removes the shared memory.
    The worker ignores Ctrl-C and a cluster's SIGTERM, because the parent must still save.
    """
    for number in _PARENT_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@contextlib.contextmanager
def _starting_processes() -> Iterator[None]:
    """A context in which new processes start with the parent's signals blocked.

    It starts Python's resource tracker with warnings off. Otherwise the tracker would warn of
    Grain's unread batches even when a run ends normally.
    """
    before, ignore = os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENT_SIGNALS)
    try:
        os.environ["PYTHONWARNINGS"] = f"{before},{ignore}" if before else ignore
        multiprocessing.resource_tracker.ensure_running()
        del os.environ["PYTHONWARNINGS"]
        if before:
            os.environ["PYTHONWARNINGS"] = before
        # The tracker's start unblocked the signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, _PARENT_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _from_workers(examples: Iterable[Batch]) -> Generator[Batch]:
    """Yields the examples. Raises `ProcessLost` if Grain reports that a worker has ended."""
    batches: Any = iter(examples)
    try:
        with _starting_processes():
            first = next(batches)
        yield first
        yield from batches
    except StopIteration:
        return
    except RuntimeError as error:
        match = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if match is None:
            raise
        code = int(match[1])
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        causes = {-int(signal.SIGKILL): ", as the system does when memory runs out"}
        causes |= {-int(signal.SIGBUS): ", as the system does when /dev/shm is full"}
        raise ProcessLost(
            f"a worker process that reads images (data.workers) {end}{causes.get(code, '')}"
        ) from None
    finally:
        batches.close()


def check_main_guard(workers: int) -> None:
    """Raises `UserError` if the running script makes this call outside `if __name__ ==
    "__main__":`. Every worker imports the script, and would run that call again."""
    main = sys.modules["__main__"]
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)):
        frame = frame.f_back
    try:
        file = str(main.__file__)
        statements = ast.parse(pathlib.Path(file).read_bytes()).body
    except (AttributeError, OSError, SyntaxError, ValueError):  # a notebook, a prompt
        return
    line = frame.f_lineno if frame else -1
    running = [s for s in statements if s.lineno <= line <= (s.end_lineno or s.lineno)]
    if running and not any(isinstance(inner, ast.If) for s in running for inner in ast.walk(s)):
        raise UserError(
            f"data.workers={workers}: each worker process imports {file}, which would run again"
            f" from line {running[0].lineno}; move its code below"
            ' `if __name__ == "__main__":`, or set data.workers=0'
        )
