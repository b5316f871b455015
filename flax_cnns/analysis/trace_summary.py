"""Sums the times of operations in a trace of JAX's profiler: which operations take the time?

Reads the `.xplane.pb` of a CPU, GPU or TPU. Where XLA's operations are in it:

- TPU: in the line "XLA Ops" of each plane "/device:TPU:0"; the names are those of the HLO program,
  and the line "XLA Modules" says which program runs when.
- GPU: in the lines "Stream #..." of each plane "/device:GPU:0"; an event is one kernel, and its
  stats `hlo_op` and `hlo_module` name the operation and the program. Copies have no such stats.
- CPU: in the lines of the threads in "/host:CPU", as events with the stats `hlo_op` and
  `hlo_module`. The part of an operation that a pool of threads computes is not recorded.

The planes, lines and stats are named in tsl/profiler/utils/xplane_schema.cc.
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from flax_cnns.errors import UserError


class OperationTime(NamedTuple):
    """An operation, or a kind of operations, summed over all devices in the trace."""

    name: str
    program: str  # the jitted function, such as jit_step; "" if unknown
    seconds: float  # without the time of the operations inside it
    calls: int


class TraceSummary(NamedTuple):
    """All operations in a trace, the longest first."""

    platform: str  # "cpu", "gpu" or "tpu"
    devices: int  # that computed something
    operations: list[OperationTime]

    @property
    def seconds(self) -> float:
        """The time of all operations, summed over the devices."""
        return sum(operation.seconds for operation in self.operations)

    def by_kind(self) -> list[OperationTime]:
        """Sums the operations of each kind and program: `fusion.12` is a `fusion`."""
        return _sum(
            (strip_number(each.name), each.program, each.seconds, each.calls)
            for each in self.operations
        )

    def by_program(self) -> list[OperationTime]:
        """Sums the operations of each program."""
        return _sum(
            (each.program, each.program, each.seconds, each.calls) for each in self.operations
        )


def strip_number(name: str) -> str:
    """Removes the numbers that XLA adds to a name: "fusion.12.remat" becomes "fusion"."""
    return re.sub(r"(\.(\d+|remat\d*|clone))+$", "", name)


def read_trace(path: str | os.PathLike) -> TraceSummary:
    """Reads a trace file `*.xplane.pb`. Raises UserError if it is none, or holds no operation."""
    try:
        profile = jax.profiler.ProfileData.from_file(os.fspath(path))
        summary = summarize(profile)
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{os.fspath(path)}: {error}") from None
        raise UserError(
            f"{os.fspath(path)}: expected a trace of JAX's profiler (*.xplane.pb):"
            f" {str(error).partition(chr(10))[0]}"
        ) from None
    return summary


def summarize(profile: Any) -> TraceSummary:
    """Sums the operations of a `jax.profiler.ProfileData`. Raises UserError if it has none."""
    planes = {plane.name: plane for plane in profile.planes}
    for platform in ("tpu", "gpu"):
        prefix = f"/device:{platform.upper()}:"
        found = [plane for name, plane in planes.items() if name.startswith(prefix)]
        timed = [list(_read_device(plane)) for plane in found]
        if any(timed):
            rows = [row for rows in timed for row in rows]
            return TraceSummary(platform, sum(map(bool, timed)), _sum(iter(rows)))
    host = planes.get("/host:CPU")
    rows, devices = [], set()
    for line in host.lines if host is not None else ():
        events = []
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats:
                events.append((event, str(stats["hlo_op"]), str(stats.get("hlo_module", ""))))
                devices.add(stats.get("device_ordinal", 0))
        rows += _find_self_times(events)
    if not rows:
        raise UserError("the trace holds no operation of XLA")
    return TraceSummary("cpu", len(devices), _sum(iter(rows)))


_Row = tuple[str, str, float, int]  # name, program, seconds, calls


def _read_device(plane: Any) -> Iterator[_Row]:
    lines = {line.name: line for line in plane.lines}
    if "XLA Ops" in lines:
        find_program = _make_program_finder(lines.get("XLA Modules"))
        events = [
            # The name is a whole instruction: "%fusion.1 = f32[8]{0} fusion(...)".
            (event, event.name.partition(" = ")[0].lstrip("%"), find_program(event.start_ns))
            for event in lines["XLA Ops"].events
        ]
        yield from _find_self_times(events)
        return
    for name, line in lines.items():
        if name.startswith("Stream"):
            events = []
            for event in line.events:
                stats = dict(event.stats)
                operation = str(stats.get("hlo_op", event.name))
                events.append((event, operation, str(stats.get("hlo_module", ""))))
            yield from _find_self_times(events)


def _make_program_finder(line: Any) -> Any:
    """Returns a function from a time in ns to the name of the program that runs then."""
    modules = sorted(line.events, key=lambda event: event.start_ns) if line is not None else []
    starts = [event.start_ns for event in modules]

    def find(start_ns: float) -> str:
        i = bisect.bisect_right(starts, start_ns) - 1
        if i < 0 or start_ns > modules[i].start_ns + modules[i].duration_ns:
            return ""
        return modules[i].name.partition("(")[0]

    return find


def _find_self_times(events: list[tuple[Any, str, str]]) -> Iterator[_Row]:
    """Yields the times of one line's events, each without the events inside it."""
    # A parent starts no later than its children and is longer.
    events.sort(key=lambda item: (item[0].start_ns, -item[0].duration_ns))
    own = [event.duration_ns for event, _, _ in events]
    open_: list[tuple[float, int]] = []  # (end, index) of the events around the current one
    for i, (event, _, _) in enumerate(events):
        while open_ and open_[-1][0] <= event.start_ns:
            open_.pop()
        end = event.start_ns + event.duration_ns
        if open_:
            own[open_[-1][1]] -= min(end, open_[-1][0]) - event.start_ns
        open_.append((end, i))
    for (_, name, program), ns in zip(events, own):
        yield name, program, max(ns, 0.0) * 1e-9, 1


def _sum(rows: Iterator[_Row]) -> list[OperationTime]:
    sums: dict[tuple[str, str], list[float]] = {}
    for name, program, seconds, calls in rows:
        entry = sums.setdefault((name, program), [0.0, 0])
        entry[0] += seconds
        entry[1] += calls
    operations = [OperationTime(*key, seconds, int(n)) for key, (seconds, n) in sums.items()]
    return sorted(operations, key=lambda each: (-each.seconds, each.name))
