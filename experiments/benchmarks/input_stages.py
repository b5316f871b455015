"""Times the stages of the input pipeline on one core, and other loaders beside it: `input`."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import torch_side
from experiments.benchmarks.flags import parse_positive_int, parse_size
from experiments.benchmarks.inputs import write_jpegs
from experiments.benchmarks.report import Bars, BenchmarkReport
from flax_cnns.analysis.timing import Comparison
from flax_cnns.errors import UserError

COLUMNS = ("what", "images/s", "µs per image", "of it this stage", "time over ours", "cores")
CROP = (0.08, 1.0)  # the share of the area of a random crop
STAGES = ("read", "decode", "crop and resize", "batch", "copy to the device")
OURS = STAGES[3]  # what the other loaders do too
READ_AHEAD = 3  # batches; ours reads two ahead
BY_OPENCV = "flax_cnns, opencv"  # data.decoder
LOADERS = (BY_OPENCV, "torchvision", "Grain + OpenCV", "tf.data")


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=parse_positive_int, default=64)
    parser.add_argument("--size", type=parse_positive_int, default=224, help="of the crops")
    parser.add_argument("--jpegs", type=parse_positive_int, default=256, help="number of JPEGs")
    parser.add_argument(
        "--jpeg-size", type=parse_size, default="500x375", metavar="WxH", help="size of the JPEGs"
    )
    parser.add_argument(
        "--images",
        choices=("photos", "noise"),
        default="noise",
        help="photos: parts of scikit-image's photographs, which decode faster than noise",
    )
    parser.add_argument("--rounds", type=parse_positive_int, default=5, help="number of rounds")
    parser.add_argument("--batches", type=parse_positive_int, default=5, help="batches per round")
    parser.add_argument(
        "--images-per-second",
        type=parse_positive_int,
        default=1000,
        help="what a device needs; the last column says how many cores give it",
    )


def measure_input(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times the stages of random crops of JPEGs on one core, and torchvision, Grain with OpenCV,
    and tf.data, where they are installed.

    A stage's time includes the stages before it; "of it this stage" is the difference. The other
    loaders do what ours does up to "batch". A device takes part of the core to copy.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_on_one_core(report))
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.images == "photos":
            write_photos(root, args.jpegs, args.jpeg_size)
        else:
            write_jpegs(root, args.jpegs, args.jpeg_size)
        candidates = make_stages(root, args.batch, args.size)
        makers = make_by_opencv, make_torchvision, make_opencv, make_tf_data
        for name, make in zip(LOADERS, makers):
            try:
                candidates[name] = make(root, args.batch, args.size)
            except ImportError as error:
                report.print_line(f"{name}: skipped, {error.name} is not installed")
            except UserError as error:
                report.print_line(f"{name}: skipped, {error}")
        report.print_line("measuring " + ", ".join(candidates))
        times = time_streams(candidates, args.rounds, args.batches)
    before = 0.0
    for name, timed in times.as_dict().items():
        seconds = timed["median"] / args.batch
        row = {
            "what": name,
            "seconds_per_image": seconds,
            "images_per_second": 1 / seconds,
            "cores": args.images_per_second * seconds,
            "rounds": timed["rounds"],
        }
        cells = [name, f"{1 / seconds:,.0f}", f"{seconds * 1e6:,.0f}", "", ""]
        if name in STAGES:
            row["stage_seconds"], before = seconds - before, seconds
            cells[3] = f"{row['stage_seconds'] * 1e6:,.0f}"
        else:
            ratio = times.ratio(name, OURS)
            row["over_ours"], cells[4] = ratio._asdict(), str(ratio)
        report.add(row, (*cells, f"{row['cores']:.1f}"))
    whole = next(row for row in report.rows if row["what"] == STAGES[-1])
    cores = math.ceil(whole["cores"])
    report.print_line(
        f"{args.images_per_second:,} images/s need {cores} core{'s' * (cores > 1)} like this one"
    )
    shown = [row for row in report.rows if row["what"] in (OURS, *LOADERS)]
    names = ["flax_cnns" if row["what"] == OURS else row["what"] for row in shown]
    speeds = [row["images_per_second"] for row in shown]
    report.bars = Bars(names, {"": speeds}, "images per second on one core")


def time_streams(
    candidates: dict[str, Callable[[], Iterator[Any]]], rounds: int, batches: int
) -> Comparison:
    """Times the batches of each candidate in turn, A B A B; a call is one batch.

    A candidate is stopped before the next one starts, since loaders read ahead. The first batches
    are not timed: then a loader that reads ahead is as fast as its slowest part.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, make in candidates.items():
            with contextlib.closing(make()) as stream:
                for _ in range(READ_AHEAD):
                    next(stream)
                began = time.perf_counter()
                for _ in range(batches):
                    next(stream)
                seconds[name].append((time.perf_counter() - began) / batches)
    return Comparison(seconds, dict.fromkeys(candidates, batches))


@contextlib.contextmanager
def _on_one_core(report: BenchmarkReport) -> Iterator[None]:
    """Keeps this thread, and those that it starts, on one core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        report.print_line("this system cannot keep a process on one core: threads use all")
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def write_photos(root: Path, count: int, size: tuple[int, int]) -> None:
    """Writes random parts of scikit-image's photographs as JPEGs: `root/class/n.jpg`."""
    from PIL import Image
    from skimage import data

    photos = [Image.fromarray(read()) for read in (data.astronaut, data.coffee, data.rocket)]
    rng = np.random.default_rng(0)
    for i in range(count):
        photo, share = photos[i % len(photos)], rng.uniform(0.6, 1)
        scale = share * min(photo.width / size[0], photo.height / size[1])
        width, height = size[0] * scale, size[1] * scale
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        part = photo.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        folder = root / f"class{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        part.save(folder / f"{i}.jpg", quality=90)


def make_stages(root: Path, batch: int, size: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """Returns {stage: a function that starts its batches, with the stages before it}."""
    from PIL import Image

    from flax_cnns.data.images import convert_channels, random_box, read_box

    files = itertools.cycle(sorted(root.glob("*/*.jpg")))
    rng = np.random.default_rng(0)

    def box_of(width: int, height: int) -> tuple[float, float, float, float]:
        return random_box(rng, width, height, CROP)

    def decode(image: Image.Image) -> None:
        left, top, right, bottom = box_of(*image.size)
        wide, high = size / (right - left), size / (bottom - top)
        image.draft(None, (math.ceil(image.width * wide), math.ceil(image.height * high)))
        convert_channels(image, 3)

    def take(use: Callable[[bytes], Any]) -> Iterator[None]:
        while True:
            for file in itertools.islice(files, batch):
                use(file.read_bytes())
            yield

    def open_image(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data))

    load = make_loader(root, batch, size, "pillow")

    def copy() -> Iterator[Any]:
        with contextlib.closing(load()) as batches:
            for each in batches:
                yield jax.block_until_ready(jax.device_put(each))

    starts: tuple[Callable[[], Iterator[Any]], ...] = (
        lambda: take(lambda data: None),
        lambda: take(lambda data: decode(open_image(data))),
        lambda: take(lambda data: read_box(open_image(data), box_of, size, 3)),
        load,
        copy,
    )
    return dict(zip(STAGES, starts))


def make_loader(root: Path, batch: int, size: int, decoder: str) -> Callable[[], Iterator[Any]]:
    """Returns what starts our batches of random crops, decoded in one thread."""
    from flax_cnns.config import default_config
    from flax_cnns.data import pipeline
    from flax_cnns.data.load import load_dataset

    config = default_config().data
    config.update(name="folder", source="folder", dir=str(root), batch_size=batch)
    config.update(in_memory="no", image_size=size, validation=0.0, threads=1, workers=0)
    config.decoder = decoder
    config.augment.random_resized_crop = CROP
    dataset = load_dataset(config)
    return lambda: (each for each in pipeline.train_batches(dataset, config, seed=0))


def make_by_opencv(root: Path, batch: int, size: int) -> Callable[[], Iterator[Any]]:
    """Returns what starts our batches with `data.decoder="opencv"`, which is antialiased."""
    return make_loader(root, batch, size, "opencv")


def make_torchvision(root: Path, batch: int, size: int) -> Callable[[], Iterator[Any]]:
    """Returns what starts torchvision's DataLoader of random crops, decoded by PIL in this
    process."""
    torch, torchvision = torch_side.import_torch(), torch_side.import_torchvision()
    datasets, transforms = torchvision.datasets, torchvision.transforms
    torch.set_num_threads(1)
    crop = [transforms.RandomResizedCrop(size, scale=CROP), transforms.PILToTensor()]
    images = datasets.ImageFolder(str(root), transforms.Compose(crop))
    loader = torch.utils.data.DataLoader(images, batch, shuffle=True)
    return lambda: (example for _ in itertools.count() for example in loader)


def make_opencv(root: Path, batch: int, size: int) -> Callable[[], Iterator[Any]]:
    """Returns what starts Grain's batches of random crops that OpenCV decodes whole, and resizes
    without antialiasing."""
    import cv2
    import grain

    from flax_cnns.data.images import random_box

    cv2.setNumThreads(1)
    files = sorted(root.glob("*/*.jpg"))

    def read(i: int, rng: np.random.Generator) -> np.ndarray:
        image = cv2.imdecode(np.fromfile(files[i], np.uint8), cv2.IMREAD_COLOR_RGB)
        left, top, right, bottom = map(round, random_box(rng, image.shape[1], image.shape[0], CROP))
        return cv2.resize(image[top:bottom, left:right], (size, size))

    examples = grain.MapDataset.range(len(files)).seed(0).shuffle().repeat().random_map(read)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch)
    data = examples.to_iter_dataset(options).batch(batch)
    return lambda: (each for each in iter(data))


def make_tf_data(root: Path, batch: int, size: int) -> Callable[[], Iterator[Any]]:
    """Returns what starts tf.data's batches of random crops. It decodes only the crop, in one
    thread, and resizes without antialiasing."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    files = [str(file) for file in sorted(root.glob("*/*.jpg"))]

    def read(file: Any) -> Any:
        data = tf.io.read_file(file)
        shape = tf.io.extract_jpeg_shape(data)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((0, 0, 4)),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=CROP,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
        return tf.cast(tf.image.resize(image, (size, size)), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat().map(read)
    data = data.batch(batch).prefetch(1).with_options(options)
    return lambda: (each for each in data.as_numpy_iterator())
