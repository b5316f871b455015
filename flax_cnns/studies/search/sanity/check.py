"""`check_sanity(config, folder)` makes the lectures' checks that come before any search."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runtime import output
from flax_cnns.studies import own_parts
from flax_cnns.studies.search.sanity import initial, inputs, page, pictures, trainings
from flax_cnns.studies.search.sanity.bench import Meter, SanityBench, Trainer, choose_size
from flax_cnns.studies.search.sanity.findings import WRONG, SanityFinding
from flax_cnns.studies.search.sanity.judge_trainings import find_highest_rate
from flax_cnns.studies.search.sanity.verdict import JUDGES, judge

CHECKS = tuple(JUDGES)
FILE = "sanity.json"
SAY_EVERY = 15.0  # seconds
_OVERFIT_STEPS = 50  # that a healthy network takes at most, for the forecast


class SanityReport(NamedTuple):
    """The numbers of each check that was made, and what they mean."""

    parts: dict[str, dict[str, Any]]
    findings: list[SanityFinding]

    @property
    def is_sane(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.level != WRONG for finding in self.findings)


@output.safe()
def check_sanity(
    config: Any,
    folder: str | os.PathLike | None = None,
    *,
    checks: Collection[str] = CHECKS,
    steps: int = 0,
    say: Callable[[str], None] = print,
) -> SanityReport:
    """Checks the network, the data, the loss and the optimizer of a run's config.

    Writes sanity.md, sanity.json and pictures into `folder`, if it is given. Checks whose numbers
    the folder has from the same config, own parts, data and devices are not repeated, and stay on
    its page.
    The report has those of `checks` only. `steps`: of the range
    test and of each short training; 0: 100, and as many as take about a minute on two CPU cores.
    The test split is not read. Raises UserError for a config that a run refuses, and if a file
    cannot be written.
    """
    for name in checks:
        if name not in CHECKS:
            hint = did_you_mean(name, CHECKS)
            raise UserError(f"--checks: unknown check {name!r}{hint}; expected {', '.join(CHECKS)}")
    if steps < 0:
        raise UserError(f"--steps: expected a number of 0 or more, got {steps}")
    config = configs.complete(config)
    own_parts.refuse_opaque(config, "the checks start from a config")
    bench = SanityBench(config)
    path = None
    if folder is not None:
        workdirs.check_location(folder)
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        path = pathlib.Path(folder)
    record = _make_record(bench, steps)
    parts = {} if path is None else _read_parts(path / FILE, record, say)
    _Checker(bench, path, record, parts, steps, say).make([c for c in CHECKS if c in checks])
    parts = {name: parts[name] for name in CHECKS if name in parts}
    findings = judge(parts)
    if path is not None:
        title = _make_title(bench)
        found = [name for name in page.PICTURES.values() if (path / name).is_file()]
        files.write_text(path / "sanity.md", page.format_page(title, findings, parts, found))
        judged = [finding._asdict() for finding in findings]
        files.write_json(path / FILE, record | {"parts": parts, "findings": judged})
        say(f"written to {path}: sanity.md, {FILE}, {', '.join(found)}")
    asked = {name: numbers for name, numbers in parts.items() if name in checks}
    return SanityReport(asked, [finding for finding in findings if finding.check in checks])


def _make_title(bench: SanityBench) -> str:
    return f"{bench.config.model.name} on {bench.dataset.name}, seed {bench.config.seed}"


def _make_record(bench: SanityBench, steps: int) -> dict[str, Any]:
    """Returns what the numbers depend on, as it is read back from JSON."""
    record = {
        "config": configs.to_plain(bench.config),
        "own": bench.components.own_parts.record,  # with digests of their source
        "fingerprint": bench.dataset.fingerprint,
        "devices": bench.devices,
        "steps": steps,
    }
    return json.loads(json.dumps(files.replace_nonfinite(record)))


def _read_parts(path: pathlib.Path, record: dict[str, Any], say: Callable) -> dict[str, Any]:
    """Returns the numbers that the file has, if they are of the same config and data."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or {name: found.get(name) for name in record} != record:
        say(f"{path} is of another config, own part, data or steps: all checks are made anew")
        return {}
    return restore_nonfinite(found["parts"])


_FLOATS = {"loss", "training_loss", "smoothed", "spread", "mean", "std"}


def restore_nonfinite(parts: Any, name: str = "") -> Any:
    """Returns numbers of `sanity.json` with NaN in place of null, inf in lists of losses."""
    if isinstance(parts, dict):
        return {key: restore_nonfinite(value, key) for key, value in parts.items()}
    if isinstance(parts, list):
        return [restore_nonfinite(value, name) for value in parts]
    if parts is None and name == "losses":
        return float("inf")
    return float("nan") if parts is None and name in _FLOATS else parts


class _Checker:
    """Makes the checks in their order, and keeps their numbers."""

    def __init__(
        self,
        bench: SanityBench,
        path: pathlib.Path | None,
        record: Mapping[str, Any],
        parts: dict[str, Any],
        steps: int,
        say: Callable[[str], None],
    ):
        self.bench, self.path, self.record, self.parts = bench, path, record, parts
        self.steps, self.say, self.title = steps, say, _make_title(bench)
        self.shown = time.perf_counter()

    def make(self, names: list[str]) -> None:
        """Makes the checks that the folder lacks."""
        missing = [name for name in names if name not in self.parts]
        if not missing:
            return
        bench = self.bench
        self.train = bench.collect("train")
        has_validation = "validation" in bench.dataset.splits
        self.validation = bench.collect("validation") if has_validation else None
        smallest = self.train if self.validation is None else self.validation
        size = choose_size(min(len(smallest["label"]), len(self.train["label"])), bench.devices)
        self.trainer = Trainer(bench.components, bench.variables)
        self.meter = Meter(bench.components, bench.optimizer.batchnorm_modes, size)
        for number, name in enumerate(missing):
            self.began = self.shown = time.perf_counter()
            numbers = getattr(self, f"_make_{name}")()
            self.parts[name] = numbers
            self.say(f"{name}: {time.perf_counter() - self.began:.0f} s")
            if self.path is not None:
                # The picture comes first: a check whose numbers are in the file is complete.
                self._draw(name)
                files.write_json(self.path / FILE, {**self.record, "parts": self.parts})
            if self.trainer.seconds < float("inf") and name == "layers":
                self._forecast(missing[number + 1 :])

    def _tick(self, what: str) -> Callable[[int, int], None]:
        def tick(done: int, total: int) -> None:
            now = time.perf_counter()
            if now - self.shown > SAY_EVERY:
                self.shown = now
                self.say(f"{what}: step {done} of {total}")

        return tick

    def _forecast(self, names: list[str]) -> None:
        """Says about how long the other checks take, from the time of one step."""
        step, batch = self.trainer.seconds, self.bench.config.data.batch_size
        work = {
            "overfit": _OVERFIT_STEPS * step * trainings.FEW / batch,
            "rate": (self.steps or trainings.STEPS) * step,
        }
        if "capacity" in names:
            widths, macs, steps = trainings.plan_capacity(self.bench, self.steps)
            own = next(m for (width, _), m in zip(widths, macs) if width == 1)
            work["capacity"] = steps * step * sum(macs) / max(own, 1)
        seconds = sum(work[name] for name in names if name in work)
        if names:
            self.say(f"a step takes {step:.2f} s; the rest about {seconds:.0f} s and compilation")

    def _make_inputs(self) -> dict[str, Any]:
        return inputs.measure_inputs(self.bench, self.train, self.validation)

    def _make_loss(self) -> dict[str, Any]:
        return initial.measure_loss(self.bench, self.meter, self.train)

    def _make_layers(self) -> dict[str, Any]:
        return initial.measure_layers(self.bench, self.trainer, self.train)

    def _make_overfit(self) -> dict[str, Any]:
        return trainings.measure_overfit(self.bench, self.train, self._tick("overfit"))

    def _make_rate(self) -> dict[str, Any]:
        steps = self.steps or trainings.STEPS
        return trainings.measure_rates(self.bench, self.trainer, steps, self._tick("rate"))

    def _make_capacity(self) -> dict[str, Any]:
        return trainings.measure_capacity(
            self.bench,
            self.trainer,
            self.meter,
            self.train,
            self.validation,
            self.steps,
            find_highest_rate(self.parts["rate"]) if "rate" in self.parts else float("inf"),
            self._tick("capacity"),
        )

    def _draw(self, name: str) -> None:
        """Draws the picture of a check that was just made."""
        assert self.path is not None
        numbers, png = self.parts[name], self.path / page.PICTURES.get(name, "")
        if name == "inputs":
            pictures.draw_examples(self.bench, self.train, png)
        elif name == "layers" and numbers["layers"]:
            pictures.draw_layers(numbers, png, f"{self.title}, at initialization")
        elif name == "rate":
            pictures.draw_rates(numbers, png, f"{self.title}: range test of the learning rate")
        elif name in ("overfit", "capacity"):
            png = self.path / page.PICTURES["capacity"]
            pictures.draw_trainings(self.parts, png, self.title)
