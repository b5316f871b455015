"""Compares the current code with an old commit: old runs continue with bit-identical results.

    python -m tests.side_by_side [--old=132764f] [--keep=FOLDER]

The old commit, in its own worktree, starts three runs and is interrupted. Then the old commit
finishes each run, and the current code finishes a copy. Both evaluate their run and predict with
it; the current code does the same with the run of the old commit. Parameters, optimizer states,
statistics, logged values (except times), evaluations and predictions must be equal. Prints the
differences and exits with code 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMES = ("time", "images_per_second", "time/first_step")
SECONDS = ("seconds", "seconds_to_first_step", "images_per_second")
KERNELS = ((r".*/kernel", 1e-4), (r".*", 0.0))

COMMON = {
    "data.batch_size": 16,
    "data.eval_batch_size": 64,
    "log.every": "3 steps",
    "checkpoint.every": "4 steps",
    "train.eval_every": "5 steps",
    "train.duration": "16 steps",
    "log.tensorboard": False,
}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {  # (step of the interruption, fields)
    "regularized_lenet": (
        7,
        {
            "data.augment.pad_crop": 2,
            "data.augment.rotate": 10.0,
            "data.augment.cutout": 5,
            "mix.label_smoothing": 0.1,
            "mix.mixup": 0.2,
            "optimizer.nesterov": True,
            "optimizer.weight_decay": KERNELS,
            "optimizer.l2": (1e-4,),
            "optimizer.max_norm": (3.0,),
            "optimizer.grad_noise": 0.01,
            "train.dropout": (0.1,),
            "train.ema": 0.9,
            "train.evaluate_train": True,
            "schedule.warmup": "3 steps",
            "schedule.learning_rate": 0.02,
            "log.tensorboard": True,
        },
    ),
    "scanned_resnet": (
        9,
        {
            "model.name": "cifar_resnet20",
            "model.depths": (3, 2),
            "model.widths": (4, 8),
            "model.drop_path": 0.5,
            "model.scan": True,
            "data.image_size": 8,
            "optimizer.weight_decay": ((r"params/stage1/block2/.*", 0.1), (r".*", 1e-3)),
            "schedule.name": "plateau",
            "schedule.patience": 1,
            "schedule.learning_rate": 0.05,
            "train.eval_every": "2 steps",
            "train.precise_bn": 2,
            "train.accumulate": 2,
        },
    ),
    "streamed_folder": (
        6,
        {
            "model.name": "cifar_resnet20",
            "model.depths": (1, 1),
            "model.widths": (4, 8),
            "data.name": "folder",
            "data.image_size": 16,
            "data.in_memory": "no",
            "data.batch_size": 8,
            "data.augment.where": "loader",
            "data.augment.random_resized_crop": (0.4, 1.0),
            "data.augment.flip": True,
            "data.augment.erase": 0.3,
            "optimizer.name": "adamw",
            "optimizer.weight_decay": (0.01,),
            "optimizer.layer_decay": 0.8,
            "schedule.learning_rate": 1e-3,
            "train.parallel": "pmap",
            "train.sync_batchnorm": True,
            "train.test_on": "best",
        },
    ),
}


# ---------------------------------------------------------------------------- in a child process


OLDER_NAMES = {"make_predictor_from_run": "from_run"}


def _import_from_any(name: str, *modules: str) -> Any:
    """Imports `name` from the first of `modules` that exists: the commits differ."""
    for module in modules:
        with contextlib.suppress(ImportError):
            found = importlib.import_module(module)
            return getattr(found, OLDER_NAMES.get(name, name), None) or getattr(found, name)
    raise ImportError(name)


def _make_config(name: str, scratch: pathlib.Path) -> Any:
    from configs.common import get_config

    config = get_config()
    fields = COMMON | RUNS[name][1]
    streamed = fields.get("data.name") == "folder"
    fields["data.dir"] = str(scratch / ("images" if streamed else "tfds"))
    with config.unlocked():
        for path, value in fields.items():
            *parents, last = path.split(".")
            functools.reduce(lambda section, part: section[part], parents, config)[last] = value
    return config


def begin_run(name: str, workdir: pathlib.Path, scratch: pathlib.Path) -> None:
    """Starts a run, which is then interrupted."""
    from flax_cnns import run

    places = ("flax_cnns.runtime.preemption", "flax_cnns.preemption")
    signals, preempted = (
        _import_from_any("Signals", *places),
        _import_from_any("Preempted", *places),
    )
    should_stop, last_step = signals.should_stop, RUNS[name][0]
    signals.should_stop = lambda self, step: step == last_step
    try:
        run(_make_config(name, scratch), workdir)
    except preempted:
        return
    finally:
        signals.should_stop = should_stop
    raise SystemExit(f"{name} was not interrupted")


def finish_run(name: str, workdir: pathlib.Path, scratch: pathlib.Path) -> None:
    from flax_cnns import run

    run(_make_config(name, scratch), workdir)


def record_outputs(workdir: pathlib.Path, scratch: pathlib.Path, out: pathlib.Path) -> None:
    """Writes evaluations and predictions of a finished run to `out`."""
    evaluate_run = _import_from_any(
        "evaluate_run", "flax_cnns.runs.evaluate", "flax_cnns.experiment"
    )
    places = ("flax_cnns.runs.predict", "flax_cnns.prediction")
    from_run, predict = (
        _import_from_any("make_predictor_from_run", *places),
        _import_from_any("predict", *places),
    )
    outputs = [evaluate_run(workdir), evaluate_run(workdir, split="validation", checkpoint="best")]
    predictor = from_run(workdir)
    photos = sorted((scratch / "images").glob("*/0*.png"))[::5]
    outputs.append([predictor.title, predict(predictor, photos, 10)])
    out.write_text(json.dumps(outputs))


def run_child(task: str, scratch: pathlib.Path) -> None:
    old, new = scratch / "old", scratch / "new"
    if task == "old":
        for name in RUNS:
            begin_run(name, old / name, scratch)
            shutil.copytree(old / name, new / name)
            finish_run(name, old / name, scratch)
            record_outputs(old / name, scratch, scratch / f"{name}.old_by_old.json")
        return
    for name in RUNS:
        finish_run(name, new / name, scratch)
        record_outputs(new / name, scratch, scratch / f"{name}.new_by_new.json")
        record_outputs(old / name, scratch, scratch / f"{name}.old_by_new.json")


# ---------------------------------------------------------------------------- the comparison


def start_child(task: str, tree: pathlib.Path, scratch: pathlib.Path) -> None:
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--child", task]
    log = scratch / f"{task}.txt"
    with log.open("w") as file:
        code = subprocess.call(
            [*command, "--keep", str(scratch)], cwd=tree, env=env, stdout=file, stderr=file
        )
    if code:
        sys.exit(f"{task} failed:\n{log.read_text()[-3000:]}")


def read_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return [record for record in rows if set(record) != {"step"}]


def compare(name: str, scratch: pathlib.Path) -> list[str]:
    """Lists what differs between the two runs."""
    import numpy as np

    from flax_cnns.checkpoint import finding, reading

    old, new, differs = scratch / "old" / name, scratch / "new" / name, []
    if finding.all_steps(old) != finding.all_steps(new):
        differs.append(f"checkpoints: {finding.all_steps(old)}, {finding.all_steps(new)}")
    leaves = 0
    for step in sorted({*finding.all_steps(old)} & {*finding.all_steps(new)}):
        paths = list(reading.read_metadata(f"{old}@{step}"))
        if sorted(paths) != sorted(reading.read_metadata(f"{new}@{step}")):
            differs.append(f"step {step}: other leaves")
            continue
        a, b = (reading.read_leaves(f"{run}@{step}", paths) for run in (old, new))
        leaves += len(paths)
        for path in paths:
            x, y = np.asarray(a[path]), np.asarray(b[path])
            if x.dtype != y.dtype or x.tobytes() != y.tobytes():
                differs.append(f"step {step}: {path}")
    if read_records(old) != read_records(new):
        differs.append("metrics.jsonl")
    first, second = (
        {
            k: v
            for k, v in json.loads((run / "summary.json").read_text()).items()
            if k not in SECONDS
        }
        for run in (old, new)
    )
    differs += [
        f"summary.json: {key}" for key in first | second if first.get(key) != second.get(key)
    ]
    if list_files(old) != list_files(new):
        differs.append(f"files: {sorted(list_files(old) ^ list_files(new))}")
    for file in ("config.json", "dataset.json"):
        if json.loads((old / file).read_text()) != json.loads((new / file).read_text()):
            differs.append(file)
    outputs = {
        which: json.loads((scratch / f"{name}.{which}.json").read_text())
        for which in ("old_by_old", "new_by_new", "old_by_new")
    }
    for which in ("new_by_new", "old_by_new"):
        for what, a, b in zip(
            ("test", "validation", "prediction"), outputs["old_by_old"], outputs[which]
        ):
            if a != b:
                differs.append(f"{which}: {what}")
    steps, count = finding.all_steps(old), len(read_records(old))
    print(
        f"{name}: steps {steps}, {leaves} leaves, {count} records, "
        f"test accuracy {first['test/accuracy']:.3f}: {'differs' if differs else 'equal'}"
    )
    return [f"{name}: {text}" for text in differs]


def list_files(workdir: pathlib.Path) -> set[str]:
    return {p.name for p in workdir.glob("*")} | {p.name for p in workdir.glob("checkpoints/*/*")}


def make_folder(folder: pathlib.Path) -> None:
    """Writes three classes of images of several sizes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(7)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(14):
            height, width = rng.integers(12, 40, 2)
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", default="132764f", help="the commit that starts the runs")
    parser.add_argument(
        "--keep", type=pathlib.Path, help="a new folder for the runs, which is kept"
    )
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.path.pop(0)  # this folder: its `data` and `train` would hide others
        run_child(args.child, args.keep)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.keep or pathlib.Path(temporary) / "runs"
        scratch.mkdir(parents=True)
        make_folder(scratch / "images")
        tree, git = pathlib.Path(temporary) / "tree", ["git", "-C", str(ROOT), "worktree"]
        subprocess.check_call([*git, "add", "--quiet", "--detach", str(tree), args.old])
        try:
            start_child("old", tree, scratch)
        finally:
            subprocess.check_call([*git, "remove", "--force", str(tree)])
        start_child("new", ROOT, scratch)
        differs = [text for name in RUNS for text in compare(name, scratch)]
    print(*differs, sep="\n", end="\n" if differs else "")
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
