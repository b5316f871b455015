"""Runs without JAX: a process that logs the validations of a closed form, and saves and resumes.

They stand for `runs.child.start`, so that a search of dozens of trials takes a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

from configs.common import get_config
from flax_cnns import config as configs
from flax_cnns.config import spaces
from flax_cnns.config.spaces import choice, log_uniform, uniform
from flax_cnns.studies.search.tuning.pruners import Pruner
from flax_cnns.studies.search.tuning.samplers import Sampler
from flax_cnns.studies.search.tuning.study import Study

SPACE = {
    "schedule.learning_rate": log_uniform(1e-4, 1.0),
    "optimizer.name": choice("adam", "sgd"),
    "optimizer.momentum": uniform(0.5, 0.99, when={"optimizer.name": "sgd"}),
}
IMAGES, STEPS, EVERY = 320, 30, 2  # training images, steps of a run, steps between validations

# Validates every 2 steps and saves every 6. Diverges at step 9 if the rate is above `diverges`.
# Logs {step, validation/accuracy}; as a run does, a resumed run drops lines after its checkpoint.
CODE = textwrap.dedent(
    """
    import json, math, os, pathlib, signal, sys, threading, time
    job = json.loads(sys.stdin.readline())
    def leave():
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    threading.Thread(target=leave, daemon=True).start()
    workdir, rate = pathlib.Path(job["workdir"]), job["rate"]
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text("{}")
    saved, log = workdir / "saved", workdir / "metrics.jsonl"
    start = int(saved.read_text()) if saved.exists() else 0
    lines = log.read_text().splitlines() if log.exists() else []
    lines = [line for line in lines if json.loads(line)["step"] <= start]
    def write(path, text):
        path.with_suffix(".tmp").write_text(text)
        os.replace(path.with_suffix(".tmp"), path)
    def save(step):
        write(saved, str(step))
    write(log, "".join(line + chr(10) for line in lines))
    best = max([json.loads(line)["validation/accuracy"] for line in lines], default=0)
    step = start
    with log.open("a", buffering=1) as out:
        for step in range(start + 1, job["steps"] + 1):
            time.sleep(job["sleep"])
            if rate > job["diverges"] and step == 9:
                print("error: step 9: not finite", flush=True)
                sys.exit(3)
            if step % 2 == 0:
                level = 1 - abs(math.log10(rate) + 2) / 4 - job["momentum"] / 10
                value = level * (1 - math.exp(-step / (5 + 10 * rate)))
                best = max(best, value)
                line = {"step": step, "time": time.time(), "validation/accuracy": value}
                out.write(json.dumps(line) + chr(10))
            if step % 6 == 0:
                save(step)
            if asked:
                save(step)
                sys.exit(75)
    write(workdir / "summary.json", json.dumps({"step": step, "validation/best_accuracy": best}))
    """
)


def start(config, workdir, out, slot, *, accept_changed_data=False, sleep=0.002, diverges=1e9):
    """Starts a fake run. Takes the arguments of `child.start`."""
    process = subprocess.Popen(
        [sys.executable, "-SEs", "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    job = {
        "workdir": str(workdir),
        "rate": config.schedule.learning_rate,
        "momentum": config.optimizer.momentum if config.optimizer.name == "sgd" else 0,
        "steps": STEPS,
        "sleep": sleep,
        "diverges": diverges,
    }
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    return process


def make_study(folder, *, sampler="tpe", pruner="none", seed=0, space=None):
    """Returns a study whose checks, which would build a network, are left out."""
    space = SPACE if space is None else space
    config = get_config()
    config.data.batch_size = 32
    config.train.update(dict(test_on="never", duration=f"{STEPS} steps", eval_every="2 steps"))
    facts = {
        "config": configs.to_plain(config),
        "space": spaces.describe_space(space),
        "sampler": sampler,
        "pruner": pruner,
        "metric": "validation/accuracy",
        "mode": "max",
        "seed": seed,
        "steps": STEPS,
        "data": {},
    }
    return Study(
        folder=folder,
        config=config,
        space=space,
        sampler=Sampler(sampler, config, space, seed),
        pruner=Pruner(pruner, "max", STEPS, EVERY),
        metric="accuracy",
        mode="max",
        training_images=IMAGES,
        facts=facts,
    )
