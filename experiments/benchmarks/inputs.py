"""Times the input pipeline alone, in images per second: `pipeline`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.flags import parse_positive_int, parse_size
from experiments.benchmarks.report import Bars, BenchmarkReport
from flax_cnns import recipes
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.errors import UserError, did_you_mean

COLUMNS = (
    *("source", "images", "batch", "images/s", "slowest to fastest round"),
    "speed over config's, per round",
)
SOURCES = ("config", "folder", "arrays")


def add_pipeline_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default="configs/digits_lenet5.py",
        help="the config, as file.py or file.py:mode, that defines the data",
    )
    parser.add_argument(
        "--source",
        default=",".join(SOURCES[:2]),
        help="config: the config's data; folder: new JPEGs of noise, decoded and cropped at random "
        "to --size; arrays: the config's training images as a user's arrays, timed against the "
        "config's data",
    )
    parser.add_argument(
        "--mock", type=int, default=0, help="number of noise images to use; 0: the config's data"
    )
    parser.add_argument("--batch", type=int, default=0, help="batch size; 0: the config's")
    parser.add_argument("--batches", type=parse_positive_int, default=20, help="batches per round")
    parser.add_argument("--size", type=int, default=224, help="size of the folder's decoded images")
    parser.add_argument(
        "--jpegs", type=parse_positive_int, default=256, help="number of JPEGs in the folder"
    )
    parser.add_argument(
        "--jpeg-size", type=parse_size, default="500x375", metavar="WxH", help="size of the JPEGs"
    )
    parser.add_argument(
        "--orientation",
        type=int,
        choices=range(1, 9),
        default=1,
        help="EXIF orientation of the JPEGs",
    )
    parser.add_argument(
        "--decoder", choices=("pillow", "opencv"), default="", help="if not given, the config's"
    )
    parser.add_argument(
        "--images-per-second",
        type=parse_positive_int,
        default=1000,
        help="what a device needs; a line says how many cores give it",
    )
    parser.add_argument("--threads", type=int, default=0, help="decoding threads; 0: the config's")
    parser.add_argument(
        "--workers", type=int, default=-1, help="worker processes; -1: the config's"
    )


def measure_pipeline(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times how fast the host makes training batches, before they are copied to a device."""
    # Only this command needs Grain and TFDS, which the data package imports.
    from flax_cnns.data import pipeline as pipelines
    from flax_cnns.data.load import load_dataset

    sources = args.source.split(",")
    for source in sources:
        if source not in SOURCES:
            raise UserError(f"--source: unknown {source!r}{did_you_mean(source, SOURCES)}")
    with contextlib.ExitStack() as stack:
        for source in sources:
            config = _data_config(args)
            if source == "folder":
                root = stack.enter_context(tempfile.TemporaryDirectory())
                write_jpegs(Path(root), args.jpegs, args.jpeg_size, args.orientation)
                config.update(name="folder", source="folder", dir=root, mock=0)
                config.update(in_memory="no", image_size=args.size, validation=0.0)
                config.augment.random_resized_crop = (0.08, 1.0)
            report.print_line(f"{source}: reading")
            dataset = load_dataset(config)
            datasets = {source: dataset}
            if source == "arrays":
                datasets = {"config": dataset, source: _as_arrays(dataset, config)}
                dataset = datasets[source]
            candidates: dict[str, Any] = {}
            processor: list[float] = []  # seconds of all threads for each call
            for name, candidate in datasets.items():
                batches = stack.enter_context(
                    contextlib.closing(pipelines.train_batches(candidate, config, seed=0))
                )

                def take_batches(batches: Any = batches, processor: Any = processor) -> Any:
                    began = time.process_time()
                    for _ in itertools.islice(batches, args.batches):
                        pass
                    processor.append(time.process_time() - began)

                candidates[name] = take_batches
            times = time_candidates(
                candidates, rounds=args.rounds, warmup=args.warmup, at_least=args.at_least
            )
            images = args.batches * config.batch_size
            speeds = [images / seconds for seconds in times.seconds[source]]
            speed = images / times.median(source)
            storage = "in memory" if dataset.in_memory else "decoded"
            name = f"{dataset.name}, {storage}, {dataset.image_shape[0]}x{dataset.image_shape[1]}"
            row = {
                "source": name,
                "examples": len(dataset.splits["train"]),
                "image_shape": list(dataset.image_shape),
                "in_memory": dataset.in_memory,
                "batch": config.batch_size,
                "threads": config.threads,
                "workers": config.workers,
                "images_per_second": speed,
                **times.as_dict()[source],
            }
            if not config.workers and source != "arrays":
                report.print_line(_describe_cores(source, processor, images, args, row))
            ratio = times.ratio("config", source) if len(datasets) > 1 else None
            if ratio is not None:
                row["speed_over_config"] = list(ratio)
            report.add(
                row,
                (
                    name,
                    f"{row['examples']:,}",
                    str(config.batch_size),
                    f"{speed:,.0f}",
                    f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                    "" if ratio is None else str(ratio),
                ),
            )
    report.bars = Bars(
        [row["source"] for row in report.rows],
        {"": [row["images_per_second"] for row in report.rows]},
        "images per second",
    )


def _describe_cores(
    source: str, seconds: list[float], images: int, args: argparse.Namespace, row: dict[str, Any]
) -> str:
    """Adds the processor time of an image to `row`, and returns the cores that a device needs."""
    each = statistics.median(seconds) / images
    row["processor_seconds_per_image"], row["cores"] = each, each * args.images_per_second
    cores = math.ceil(row["cores"])
    return (
        f"{source}: {each * 1e6:,.0f} µs of processor time for an image;"
        f" {args.images_per_second:,} images/s need {cores} core{'s' * (cores > 1)} like these"
    )


def _as_arrays(dataset: Any, config: Any) -> Any:
    """Returns the arrays of `dataset` as a run would load them from `Dataset.from_arrays`.

    A part of the training images becomes the validation split. Raises `UserError` if `dataset` is
    not in memory.
    """
    from flax_cnns.data.load import load_dataset
    from flax_cnns.data.types import Dataset

    train, test = (dataset.splits[split] for split in ("train", "test"))
    if train.images is None:
        raise UserError("--source=arrays: the config's data is not in memory; try --mock=50000")
    from_arrays = Dataset.from_arrays(
        (train.images, train.labels), (test.images, test.labels), num_classes=dataset.num_classes
    )
    with config.unlocked():
        return load_dataset(type(config)({**config.to_dict(), "mock": 0}), data=from_arrays)


def _data_config(args: argparse.Namespace) -> Any:
    """Returns `config.data` with the command's flags. Raises `UserError` if --config is invalid."""
    file, _, mode = args.config.partition(":")
    if not Path(file).is_file():
        known = [str(path) for path in Path("configs").glob("*_*.py")]
        raise UserError(f"--config: no file {file!r}{did_you_mean(file, known)}")
    try:
        module = recipes.load(file)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--config: {file} needs {error.name}, which is not installed: pip install -e ."
        ) from None
    try:
        data = module.get_config(*([mode] if mode else [])).data
    except ValueError as error:  # an unknown mode of the file
        raise UserError(f"--config: {error}") from None
    if args.batch:
        data.batch_size = args.batch
    if args.decoder:
        data.decoder = args.decoder
    if args.mock:
        data.mock = args.mock
    if args.threads:
        data.threads = args.threads
    if args.workers >= 0:
        data.workers = args.workers
    return data


def write_jpegs(
    root: Path, count: int, size: tuple[int, int] = (500, 375), orientation: int = 1
) -> None:
    """Writes JPEGs of smooth noise with grain, in ten classes: `root/class/n.jpg`.

    `size` is (width, height), and `orientation` the EXIF orientation.
    """
    from PIL import ExifTags, Image

    exif = Image.Exif()
    if orientation != 1:
        exif[ExifTags.Base.Orientation] = orientation

    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (24, 32, 3), np.uint8)
        image = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, image.shape, np.int16)
        folder = root / f"class{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        jpeg = Image.fromarray(np.clip(image + grain, 0, 255).astype(np.uint8))
        jpeg.save(folder / f"{i}.jpg", quality=90, exif=exif)
