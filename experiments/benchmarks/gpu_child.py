"""A process of `gpu` that runs cases of one part; its parent starts it by name.

It reads its job from standard input, one line of JSON. It ends when its standard input closes, so
that it does not outlive its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import jax

from experiments.benchmarks import gpu_parts
from experiments.benchmarks.gpu_steps import GpuSettings
from experiments.benchmarks.gpu_table import Origin, ResultTable
from flax_cnns.runtime import compilation_cache, launch


def main() -> None:
    """Runs the job."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if job["keep_memory"]:
        launch.keep_memory()
    if job["cpu"]:
        jax.config.update("jax_platforms", "cpu")
    compilation_cache.enable(job["cache"])
    table = ResultTable(Path(job["out"]), Origin(**job["origin"]))
    running = Path(job["running"])
    gpu_parts.run_cases(
        job["part"],
        job["cases"],
        GpuSettings(**job["settings"]),
        table,
        deadline=job["deadline"],
        begin=running.write_text,
    )


def _exit_with_parent() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)  # a compiler ignores other signals for minutes


if __name__ == "__main__":
    main()
