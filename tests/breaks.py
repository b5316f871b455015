"""Breaks the code on purpose, one plausible wrong line at a time, and checks that a test fails.

    python -m tests.breaks               all of them
    python -m tests.breaks --only=3,17   some of them, by number
    python -m tests.breaks --check       only check that each line is still in its file

A break is applied in a copy of the working tree, never in the tree itself. There, the tests of the
break run in the default tier until one fails. The exit code is 1 if no test notices a break, or if
the line of a break is not found exactly once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Break(NamedTuple):
    file: str
    old: str  # occurs in the file exactly once
    new: str
    tests: str  # files or tests, separated by spaces; at least one test must fail
    what: str


P = "flax_cnns/"
BREAKS = [
    Break(
        f"{P}runs/session.py",
        "call = -(-step // self.config.train.steps_per_call)",
        "call = step",
        "tests/runs/test_step_calls.py",
        "Several processes that take several steps in a call never stop at a signal.",
    ),
    Break(
        f"{P}runs/build.py",
        "        start_step=start,\n        process_index=jax.process_index(),\n"
        "        process_count=jax.process_count(),\n    )\n    sizes",
        "        process_index=jax.process_index(),\n"
        "        process_count=jax.process_count(),\n    )\n    sizes",
        "tests/runs/test_step_calls.py",
        "A resumed run of several steps in a call takes the first examples again.",
    ),
    Break(
        f"{P}studies/ablation/joining.py",
        "    summaries = correct_p_values(\n        [\n            summary",
        "    summaries = (\n        [\n            summary",
        "tests/studies/ablation/test_joining.py",
        "The p-values of joined pieces are corrected for the rows of each piece alone.",
    ),
    Break(
        f"{P}layers/pool.py",
        "is_larger = (tap > largest) | jnp.isnan(tap)",
        "is_larger = (tap >= largest) | jnp.isnan(tap)",
        "tests/layers/test_pool.py",
        "On a GPU, the last of equal pixels gets the gradient of max pooling.",
    ),
    Break(
        f"{P}analysis/audit.py",
        'findings.append(Finding("donated", "an argument is not donated", name))',
        "pass",
        "tests/analysis/test_audit.py",
        "The audit does not see that a step keeps the memory of its old state.",
    ),
    Break(
        f"{P}runs/audit.py",
        "allowed = traces.norms if is_synchronized else 0",
        "allowed = 0",
        "tests/runs/test_audit.py",
        "The audit refuses the all-reduces of synchronized BatchNorm.",
    ),
    Break(
        f"{P}train/steps.py",
        'unroll=n if parallel.find_platform() == "cpu" else 1,',
        'unroll=n if jax.default_backend() == "cpu" else 1,',
        "tests/train/test_steps.py",
        "A step for a TPU is unrolled, because it is traced on a CPU.",
    ),
    Break(
        f"{P}analysis/hlo.py",
        "runs = times * (int(trips[1]) if trips else 1)",
        "runs = times",
        "tests/analysis/test_hlo.py",
        "A collective in a loop counts once.",
    ),
    Break(
        f"{P}runs/fits.py",
        "return max(0, int((memory - self.fixed) / self.per_image) // unit * unit)",
        "return max(0, int(memory / self.per_image) // unit * unit)",
        "tests/runs/test_fits.py",
        "The largest batch forgets what a device needs in any case.",
    ),
    Break(
        f"{P}tree/rules.py",
        "re.fullmatch(rule[0], path)",
        "re.match(rule[0], path)",
        "tests/tree",
        "a rule decides a path although it matches only its beginning",
    ),
    Break(
        f"{P}tree/rules.py",
        "for index, rule in enumerate(rules):\n        if match",
        "for index, rule in reversed([*enumerate(rules)]):\n        if match",
        "tests/tree",
        "the last matching rule decides, not the first",
    ),
    Break(
        f"{P}tree/stacking.py",
        "return leaf[i, ...]",
        "return leaf[0, ...]",
        "tests/tree",
        "unstacking gives every block the values of the first",
    ),
    Break(
        f"{P}config/checks.py",
        "above and value == low",
        "above and value < low",
        "tests/config/test_config.py tests/config/test_effects.py",
        "a learning rate of 0 is accepted",
    ),
    Break(
        f"{P}config/versions.py",
        "if path not in present",
        "if path in present",
        "tests/config tests/test_old_run.py",
        "a run of an older version gets no defaults for new fields",
    ),
    Break(
        f"{P}checkpoint/reading.py",
        'crc32(leaves[name]) != entry["crc32"]',
        "False",
        "tests/checkpoint/test_manager.py",
        "the CRC of a leaf is not compared",
    ),
    Break(
        f"{P}checkpoint/manager.py",
        "if math.isfinite(value) else None",
        "if value is not None else None",
        "tests/checkpoint/test_manager.py",
        "a checkpoint with an accuracy of NaN or infinity may be the best",
    ),
    Break(
        f"{P}checkpoint/manager.py",
        "else known[::-1]:",
        "else known:",
        "tests/checkpoint/test_manager.py",
        "a run resumes from its oldest step",
    ),
    Break(
        f"{P}checkpoint/graft/graft.py",
        "if not params or not stats or params == stats:",
        "if params or stats:",
        "tests/checkpoint/graft/test_graft.py",
        "batch_stats may come from another layer than the params",
    ),
    Break(
        f"{P}checkpoint/graft/graft.py",
        "if shape != came:",
        "if len(shape) != len(came):",
        "tests/checkpoint/graft/test_graft.py",
        "leaves of another shape are grafted",
    ),
    Break(
        f"{P}train/steps.py",
        "decay * o + (1.0 - decay) * n",
        "(1.0 - decay) * o + decay * n",
        "tests/train/test_steps.py",
        "the weights of old and new in the moving average are swapped",
    ),
    Break(
        f"{P}train/metrics.py",
        "jnp.where(mask > 0, losses, 0.0)",
        "losses",
        "tests/train/test_steps.py",
        "the padding of the last batch counts in the mean loss",
    ),
    Break(
        f"{P}train/schedules.py",
        "0.5 * (1.0 + jnp.cos(jnp.pi * share))",
        "0.5 * (1.0 - jnp.cos(jnp.pi * share))",
        "tests/train/test_schedules.py",
        "the cosine schedule goes up",
    ),
    Break(
        f"{P}train/optimizers.py",
        "decay ** exponents[module]",
        "decay ** (exponents[module] - 1)",
        "tests/train/test_optimizers.py",
        "layer decay is one layer off",
    ),
    Break(
        f"{P}train/optimizers.py",
        "chain = [*before, add_decay, *after]",
        "chain = [add_decay, *before, *after]",
        "tests/train/test_optimizers.py",
        "decoupled weight decay is part of Adam's moments",
    ),
    Break(
        f"{P}train/batchnorm_modes.py",
        'changes["use_running_average"] = True',
        'changes["momentum"] = 1.0',
        "tests/train/test_batchnorm_modes.py",
        "a frozen BatchNorm normalizes by the batch",
    ),
    Break(
        f"{P}layers/conv/taps.py",
        "max(0, -(shift // stride))",
        "max(0, -shift // stride)",
        "tests/layers/conv",
        "strided convolutions on a CPU: the first output position of some taps is off by one",
    ),
    Break(
        f"{P}layers/conv/depthwise.py",
        "jnp.repeat(x, times, -1)",
        "jnp.concatenate([x] * times, -1)",
        "tests/layers/conv",
        "depthwise convolutions with a multiplier read the wrong channels",
    ),
    Break(
        f"{P}layers/drop_path.py",
        "rate * np.arange(1, L + 1) / L",
        "rate * np.arange(L) / L",
        "tests/layers/test_drop_path.py",
        "stochastic depth: the first block is never dropped, the last too seldom",
    ),
    Break(
        f"{P}layers/drop_path.py",
        "jnp.where(keep, y / keep_prob, 0)",
        "jnp.where(keep, y, 0)",
        "tests/layers/test_drop_path.py",
        "kept branches are not scaled up",
    ),
    Break(
        f"{P}layers/initializers.py",
        'he = variance_scaling(2.0, "fan_out", "normal")',
        'he = variance_scaling(2.0, "fan_in", "normal")',
        "tests/layers/test_initializers.py",
        "He's initialization uses the wrong fan",
    ),
    Break(
        f"{P}layers/norm.py",
        "momentum: float = 0.9,",
        "momentum: float = 0.1,",
        "tests/layers/test_norm.py",
        "PyTorch's momentum in place of flax's",
    ),
    Break(
        f"{P}models/registry.py",
        "kernel_init=nn.initializers.zeros",
        "num_classes=None, kernel_init=nn.initializers.zeros",
        "tests/models/test_registry.py",
        "a network's parameters are counted without its head",
    ),
    Break(
        f"{P}models/resnet.py",
        "if self.stride_first else (1, self.stride)",
        "if not self.stride_first else (1, self.stride)",
        "tests/analysis/test_cost.py",
        "ResNet v1.5 strides like v1: the same parameters, other multiply-adds",
    ),
    Break(
        f"{P}models/mobilenet_v2.py",
        "activation: Callable = nn.relu6",
        "activation: Callable = nn.relu",
        "tests/models/test_parity.py::test_recorded[mobilenet_v2]",
        "a wrong activation, which no count shows",
    ),
    Break(
        f"{P}weights/name_maps.py",
        "axes = {4: (2, 3, 1, 0), 2: (1, 0)}",
        "axes = {4: (3, 2, 1, 0), 2: (1, 0)}",
        "tests/test_weights.py",
        "foreign kernels have height and width swapped",
    ),
    Break(
        f"{P}weights/preprocessing.py",
        "pixels = pixels[..., ::-1]",
        "pixels = pixels[..., :]",
        "tests/weights/test_preprocessing.py",
        "networks for BGR images see RGB",
    ),
    Break(
        f"{P}data/pipeline.py",
        "range(step * batch_size + first, step * batch_size + first + n)",
        "range(step * n + first, step * n + first + n)",
        "tests/data/test_pipeline.py",
        "with several processes an epoch shows images twice",
    ),
    Break(
        f"{P}data/streams.py",
        "np.random.SeedSequence([seed, epoch])",
        "np.random.SeedSequence([seed, 0])",
        "tests/data/test_pipeline.py",
        "every epoch has the order of the first one",
    ),
    Break(
        f"{P}data/mix.py",
        'if task == "multilabel" else num_classes)',
        'if task == "multilabel" else num_classes - 1)',
        "tests/data/test_mix.py",
        "smoothed labels do not sum to 1",
    ),
    Break(
        f"{P}data/splits.py",
        "return np.sort(shuffled[count:]), np.sort(shuffled[:count])",
        "return np.sort(shuffled), np.sort(shuffled[:count])",
        "tests/data/test_splits.py",
        "images of the validation split stay in the training split",
    ),
    Break(
        f"{P}evaluation/exact.py",
        "        pending = sums\n    add_to_total(pending)",
        "        pending = sums",
        "tests/evaluation",
        "the last batch of an evaluation is not counted",
    ),
    Break(
        f"{P}evaluation/calibration.py",
        'scores.confidence, side="left") - 1',
        'scores.confidence, side="right") - 1',
        "tests/evaluation/test_calibration.py",
        "a bin of the confidence has its lower edge, not its upper one",
    ),
    Break(
        f"{P}evaluation/calibration.py",
        "ends - (draws.mean(0) - values)",
        "ends - 0 * (draws.mean(0) - values)",
        "tests/evaluation/test_calibration.py",
        "the interval of ECE has the bias of its resamples",
    ),
    Break(
        f"{P}evaluation/temperature.py",
        "float(1 / brentq(",
        "float(brentq(",
        "tests/evaluation/test_calibration.py",
        "the inverse of the temperature is returned",
    ),
    Break(
        f"{P}runs/temperature.py",
        "if fitted != step:",
        "if fitted is None:",
        "tests/runs/test_calibration.py",
        "the temperature of another step is used",
    ),
    Break(
        f"{P}analysis/statistics.py",
        "(len(tested) - rank) * p",
        "(len(tested) - rank - 1) * p",
        "tests/analysis/test_statistics.py",
        "Holm's correction is off by one",
    ),
    Break(
        f"{P}analysis/statistics.py",
        "np.std(difference, ddof=1) / math.sqrt(n)",
        "np.std(difference) / math.sqrt(n)",
        "tests/analysis/test_statistics.py",
        "the paired test underestimates the spread",
    ),
    Break(
        f"{P}runtime/preemption.py",
        "self.code = EXIT_INTERRUPTED",
        "self.code = EXIT_PREEMPTED",
        "tests/runtime/test_preemption.py tests/runs/test_train.py",
        "after Ctrl-C the exit code makes a scheduler restart the run",
    ),
    Break(
        f"{P}runs/session.py",
        "self.batches = host_batches(self.components, start)",
        "self.batches = host_batches(self.components, max(start - 1, 0))",
        "tests/runs/test_train.py",
        "a resumed run repeats the last batch",
    ),
    Break(
        f"{P}runs/session.py",
        "differ = [a != b for a, b in zip(was, self._digests(step)) if a and b]",
        "differ = [a != b for a, b in zip(was, was) if a and b]",
        "tests/runs/test_own.py",
        "a data factory may return other batches after a resume",
    ),
    Break(
        f"{P}runs/references.py",
        "if references and not trust:",
        "if references and trust is None:",
        "tests/runs/test_own.py",
        "a run's own code is imported without --trust",
    ),
    Break(
        f"{P}train/hooks.py",
        "data=np.uint32(zlib.crc32(name.encode()))",
        "data=np.uint32(0)",
        "tests/train/test_hooks.py",
        "two of a user's regularizers draw the same numbers",
    ),
    Break(
        f"{P}train/metrics.py",
        "logits = jnp.where(seen, logits, logits[first])",
        "logits = logits + 0.0",
        "tests/train/test_own_loss_and_metrics.py tests/evaluation",
        "a NaN in a padded row reaches a user's metric",
    ),
    Break(
        f"{P}cli/flags.py",
        "before, sys.argv = sys.argv, argv",
        "before, sys.argv = sys.argv, sys.argv",
        "tests/cli tests/runs/test_own.py",
        "a field that the config file lacks cannot be set in the shell",
    ),
    Break(
        f"{P}recipes/__init__.py",
        "    if recipe in list_recipes():\n        return",
        "    if name in list_recipes():\n        return",
        "tests/cli/test_recipes.py",
        "configs/NAME.py is not found outside a checkout",
    ),
    Break(
        f"{P}interop/nnx.py",
        "named = pytree.unstack_blocks(unfreeze(nn.unbox(tree)))",
        "named = unfreeze(nn.unbox(tree))",
        "tests/interop",
        "a network with `scan` keeps its blocks stacked in NNX",
    ),
    Break(
        f"{P}studies/ablation/plan.py",
        "config.seed += self.seed",
        "config.seed += self.seed + len(self.row.name)",
        "tests/studies/ablation/test_ablation.py",
        "the rows of an ablation have different seeds",
    ),
    Break(
        f"{P}studies/finetune/strategies.py",
        "task.parts[(len(task.parts) + 1) // 2 :]",
        "task.parts[len(task.parts) // 2 :]",
        "tests/studies/finetune/test_finetune.py",
        "upper_only loads the middle part too",
    ),
    Break(
        f"{P}files.py",
        "os.replace(temporary, path)",
        "path.write_bytes(temporary.read_bytes())",
        "tests/test_files.py tests/runs/test_workdir_files.py",
        "a file of a run is written in place, so kill -9 leaves half of it",
    ),
    Break(
        f"{P}errors.py",
        "known = sorted(set(known) - {name})",
        "known = sorted(set(known))[:0]",
        "tests/config/test_config.py tests/models/test_registry.py",
        "no message names the nearest match",
    ),
    Break(
        f"{P}interop/convert.py",
        "{} if head else",
        "{} if not head else",
        "tests/weights/test_load.py tests/runs/test_predict.py",
        "a converted network has no head although its head was kept",
    ),
    Break(
        f"{P}evaluation/uncertainty.py",
        "z**2 / (4 * n**2)",
        "z**2 / (4 * n)",
        "tests/evaluation/test_uncertainty.py",
        "Wilson's interval is too wide",
    ),
    Break(
        f"{P}evaluation/uncertainty.py",
        "(self.only_second - self.only_first)",
        "(self.only_first - self.only_second)",
        "tests/evaluation/test_uncertainty.py",
        "the difference of two networks has the wrong sign",
    ),
    Break(
        f"{P}analysis/statistics.py",
        "(difference.mean() - margin) / error",
        "(difference.mean() + margin) / error",
        "tests/analysis/test_statistics.py",
        "equivalence tests only one side",
    ),
    Break(
        f"{P}runs/error_page.py",
        'wrong[np.argsort(-confidence, kind="stable")]',
        'wrong[np.argsort(confidence, kind="stable")]',
        "tests/runs/test_error_page.py",
        "the page shows the least confident mistakes",
    ),
    Break(
        f"{P}analysis/plots/error_page.py",
        "html.escape(escape_unprintable(text), quote=True)",
        "escape_unprintable(text)",
        "tests/analysis/plots/test_error_page.py",
        "a class name is read as HTML",
    ),
]


def copy_tree(to: Path) -> None:
    """Copies the tracked and the new files of the working tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def is_stale(each: Break) -> bool:
    """Whether the line or the tests of a break no longer exist."""
    path = ROOT / each.file
    found = path.is_file() and path.read_text().count(each.old) == 1
    return not found or not all((ROOT / t.partition("::")[0]).exists() for t in each.tests.split())


def try_break(each: Break, copy: Path, environment: dict[str, str]) -> str:
    """Returns the test that notices the break; "" if there is none."""
    path = copy / each.file
    whole = path.read_text()
    path.write_text(whole.replace(each.old, each.new))
    command = [sys.executable, "-m", "pytest", "-x", "-n0", "--tb=no", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "-rf", "--durations=0", *each.tests.split()],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(whole)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"pytest could not run {each.tests}:\n{done.stdout[-2000:]}{done.stderr}"
        )
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return found[1] if done.returncode == 1 and found else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="numbers, separated by commas")
    parser.add_argument("--check", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    chosen = [int(n) for n in given.only.split(",") if n] or range(1, len(BREAKS) + 1)
    problems = 0
    for n in chosen:
        if is_stale(BREAKS[n - 1]):
            problems += 1
            each = BREAKS[n - 1]
            print(f"{n}: expected {each.old!r} once in {each.file}, and {each.tests}")
    if given.check or problems:
        return min(problems, 1)
    with tempfile.TemporaryDirectory(prefix="flax_cnns_breaks_") as folder:
        copy, cache = Path(folder, "copy"), Path(folder, "cache")
        copy_tree(copy)
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        }
        for n in chosen:
            each, began = BREAKS[n - 1], time.monotonic()
            noticed = try_break(each, copy, environment)
            said = f"noticed by {noticed}" if noticed else f"NOT NOTICED by {each.tests}"
            problems += not noticed
            seconds = time.monotonic() - began
            print(f"{n}: {each.file}: {each.what}: {said} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - problems} of {len(chosen)} noticed")
    return min(problems, 1)


if __name__ == "__main__":
    sys.exit(main())
