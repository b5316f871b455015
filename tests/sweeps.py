"""Writes the folder of an ablation without training."""

from __future__ import annotations

import json

import numpy as np

from configs.common import get_config
from flax_cnns import config as configs

DATASET = dict(
    name="digits",
    num_classes=10,
    class_names=[str(digit) for digit in range(10)],
    image_shape=[32, 32, 1],
    mean=[0.3],
    std=[0.4],
    normalized_by="the data set's own",
    eval_share=1.0,
)
EVERY, POINTS, BATCH, PER_SECOND = 10, 12, 64, 640.0


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_run(workdir, accuracy, *, fit=None, end=True, points=POINTS, **fields):
    """Writes a run whose validation and test accuracy rise to about `accuracy`.

    `end`: whether the run is complete. `fields`: fields of its config, with `__` for a dot. The
    first step takes 2 s, each window after it 1 s.
    """
    config = get_config()
    config.model.name = "lenet5"
    config.data.update(dict(image_size=32, batch_size=BATCH))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    write_json(workdir / "config.json", configs.to_plain(config))
    write_json(workdir / "dataset.json", DATASET)
    lines = [{"step": 1, "time": 102.0, "time/first_step": 2.0}]
    noise = np.random.default_rng(len(str(workdir))).normal(0, 0.004, points)
    for i in range(1, points + 1):
        at = {"step": i * EVERY, "time": 102.0 + i}
        value = accuracy - 0.5 * np.exp(-i / 2.5) + noise[i - 1]
        rate = {"images_per_second": PER_SECOND, "learning_rate": 0.1 * (1 - (i - 1) / points)}
        lines.append(at | {"train/loss": 1 - value, "train/accuracy": value + 0.01} | rate)
        lines.append(at | {"validation/loss": 1.1 - value, "validation/accuracy": value})
    if end:
        test = {"test/loss": 1 - accuracy, "test/accuracy": accuracy}
        test |= {} if fit is None else {"fit/accuracy": fit}
        lines.append({"step": points * EVERY, "time": 103.0 + points} | test)
        write_json(workdir / "summary.json", {})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sweep(folder, rows, *, seeds=3):
    """Writes an ablation. `rows`: {name: (overrides, [a cell for each seed])}.

    A cell is (test accuracy, fit accuracy), (status, error), or None if it was never started.
    """
    plan = {"config": configs.to_plain(get_config()), "baseline": next(iter(rows)), "seeds": seeds}
    plan["rows"] = [{"name": name, "overrides": row[0]} for name, row in rows.items()]
    write_json(folder / "ablation.json", plan)
    for name, (overrides, cells) in rows.items():
        fields = {field.replace(".", "__"): value for field, value in overrides.items()}
        for seed, cell in enumerate(cells):
            if cell is None:
                continue
            done = not isinstance(cell[0], str)
            status, error = ("complete", "") if done else cell
            known = {"status": status, "attempts": 1, "error": error, "seconds": 14.0}
            write_json(folder / name / f"seed{seed}.json", known)
            if done:
                write_run(folder / name / f"seed{seed}", cell[0], fit=cell[1], **fields)
            elif status != "failed":
                write_run(folder / name / f"seed{seed}", 0.5, end=False, points=3, **fields)
    return folder


def rename_accuracy(folder, name, cells="*/*"):
    """Renames the accuracy in all logs to another metric."""
    for log in folder.glob(f"{cells}/metrics.jsonl"):
        log.write_text(log.read_text().replace('/accuracy"', f'/{name}"'))
