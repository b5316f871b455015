"""Times the evaluation on several crops of each image against the evaluation on one (`crops`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.report import Bars, BenchmarkReport, format_milliseconds
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.models.registry import create_model, init_variables

COLUMNS = ("crops", "one crop", "all crops", "all / one")


def add_crop_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="cifar_resnet20", help="name of a network")
    parser.add_argument("--images", type=parse_positive_int, default=1000, help="number of images")
    parser.add_argument("--crops", default="5,10", help="crops of an image: 5, 10, 144")


def measure_crops(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times the evaluation of images in memory: CPU time of this process. The images are noise.

    The first calls, which compile, are not counted.
    """
    # Imported late: they need packages that a GPU machine may lack.
    from flax_cnns.config import default_config
    from flax_cnns.data.types import Dataset
    from flax_cnns.evaluation.crops import make_protocol
    from flax_cnns.runs.classifier import Classifier, predict_split
    from flax_cnns.runs.crops import predict_crops

    model = create_model(args.model)
    size = model.input_size
    images = np.random.default_rng(0).integers(256, size=(args.images, *size), dtype=np.uint8)
    labels = np.arange(args.images) % model.num_classes
    dataset = Dataset.from_arrays((images, labels), (images, labels))
    classifier = Classifier(
        title=args.model,
        name=args.model,
        model=model,
        variables=init_variables(model, jax.random.key(0)),
        normalize=lambda x: x.astype(np.float32) / 255,
        class_names=[str(k) for k in range(model.num_classes)],
        image_shape=size,
        task="classes",
        data_config=default_config().data,
        dataset=dataset,
    )
    one: Callable[[], Any] = lambda: predict_split(classifier)  # noqa: E731
    timing = dict(
        rounds=args.rounds, warmup=args.warmup, at_least=args.at_least, clock=time.process_time
    )
    for crops in args.crops.split(","):
        protocol = make_protocol(crops)
        times = time_candidates(
            {"crops": lambda p=protocol: predict_crops(classifier, p), "one": one}, **timing
        )
        ratio = times.ratio("crops", "one")
        row = {
            "crops": protocol.count,
            "baseline_seconds": times.median("one"),
            "seconds": times.median("crops"),
            "ratio": ratio._asdict(),
            "rounds": times.as_dict(),
        }
        shown = [format_milliseconds(times.median(each)) for each in ("one", "crops")]
        report.add(row, (crops, *shown, str(ratio)))
    report.bars = Bars(
        [str(row["crops"]) for row in report.rows],
        {"CPU time": [row["ratio"]["median"] for row in report.rows]},
        f"{args.model}: crops relative to one crop",
    )
