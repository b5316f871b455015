"""Reads the text of a compiled program: its collectives, and the bytes that its kernels move.

XLA's `cost_analysis` does not exist for a GPU, and on a TPU it counts on-chip memory as the rest.
The text exists everywhere (`compiled.as_text()`), and has the shape of every buffer and, on a TPU,
its memory space.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter"),
    *("all-to-all", "collective-permute", "collective-broadcast"),
)


class Collective(NamedTuple):
    """All collectives of one kind in one run of a program."""

    calls: int
    bytes: int  # that a device contributes, in sum


class ProgramTraffic(NamedTuple):
    """What one run of a program moves, per device."""

    collectives: dict[str, Collective]  # by kind, such as "all-reduce"
    bytes: int  # that its kernels read from and write to the device's memory


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes

    def find_called(self, *attributes: str) -> list[str]:
        """Returns the computations that these attributes name."""
        pattern = rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%?[\w.-]+)"
        groups = re.findall(pattern, self.rest)
        return [name for group in groups for name in re.findall(r"[\w.-]+", group)]


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r" ?([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ONLY_NAMES = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


def read_traffic(text: str) -> ProgramTraffic:
    """Returns the collectives and the memory traffic of a compiled program's text.

    A loop's body counts as often as the compiler knows that it runs, and once if it does not know.
    Of the branches of a conditional, the one with the most traffic counts. A kernel reads each
    operand and writes its result once; of an operand that it only slices, the slice. Buffers that a
    TPU's compiler placed in on-chip memory do not count.
    """
    computations, entry = _parse(text)
    totals: dict[str, list[int]] = {}
    moved = _add_up(computations, entry, 1, totals)
    kinds = {kind: Collective(*totals[kind]) for kind in COLLECTIVES if kind in totals}
    return ProgramTraffic(kinds, moved)


class Kernel(NamedTuple):
    """An operation of a compiled program that runs once."""

    name: str  # the compiler's
    bytes: int  # that it reads and writes
    source: str  # JAX's name of the operation, such as "jit(step)/jvp(Net)/stem/conv/..."; or ""


def list_kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a program's main computation, those that move the most bytes first.

    The kernels inside of loops and branches are left out.
    """
    computations, entry = _parse(text)
    body = computations[entry]
    found = re.findall(r'^\s+(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', text, re.M)
    sources = {name: source for name, source in found if name in body}
    control = {*_ONLY_NAMES, "while", "conditional", "call"}
    kernels = [
        Kernel(one.name, _measure_kernel(computations, body, one), sources.get(one.name, ""))
        for one in body.values()
        if one.opcode not in control and not one.opcode.endswith(("-done", "-update"))
    ]
    return sorted(kernels, key=lambda one: -one.bytes)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Returns ({computation: {name: instruction}}, the entry's name)."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(found[1], found[2])
            current[instruction.name] = instruction
    return computations, entry


def _parse_instruction(name: str, text: str) -> _Instruction:
    end = _close(text, 0) if text.startswith("(") else text.index(" ")
    shape, opcode = text[:end], _OPCODE.match(text, end)
    assert opcode, text
    stop = _close(text, opcode.end() - 1)
    operands = re.findall(r"%([\w.-]+)", text[opcode.end() : stop])
    # Backend configurations are long, and may hold names that look like attributes.
    rest = text[stop:].partition(", metadata=")[0]
    if trips := _TRIPS.search(text, stop):
        rest += trips[0]
    if opcode[1] == "parameter":
        rest = text[opcode.end() : stop - 1]  # its number
    return _Instruction(name, shape, opcode[1], tuple(operands), rest)


def _close(text: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses: {text[start:]}")


def _add_up(
    computations: Mapping[str, dict[str, _Instruction]],
    name: str,
    times: int,
    totals: dict[str, list[int]],
) -> int:
    """Returns the bytes that a computation moves in `times` runs; adds its collectives to
    `totals`."""
    moved, body = 0, computations[name]
    for instruction in body.values():
        opcode = instruction.opcode
        if opcode == "while":
            trips = _TRIPS.search(instruction.rest)
            runs = times * (int(trips[1]) if trips else 1)
            for called in instruction.find_called("body", "condition"):
                moved += _add_up(computations, called, runs, totals)
        elif opcode == "conditional":
            branches = instruction.find_called(
                "branch_computations", "true_computation", "false_computation"
            )
            each: list[tuple[int, dict[str, list[int]]]] = []
            for branch in branches:
                own: dict[str, list[int]] = {}
                each.append((_add_up(computations, branch, times, own), own))
            largest, collectives = max(each, key=lambda pair: pair[0], default=(0, {}))
            moved += largest
            for kind, (count, size) in collectives.items():
                _add_collective(totals, kind, count, size)
        elif opcode == "call" or (opcode == "async-start" and "calls=" in instruction.rest):
            for called in instruction.find_called("to_apply", "calls", "called_computations"):
                moved += _add_up(computations, called, times, totals)
        elif opcode not in _ONLY_NAMES and not opcode.endswith(("-done", "-update")):
            moved += times * _measure_kernel(computations, body, instruction)
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                size = sum(_measure(body[o].shape) for o in instruction.operands if o in body)
                _add_collective(totals, kind, times, times * size)
    return moved


def _add_collective(totals: dict[str, list[int]], kind: str, count: int, size: int) -> None:
    total = totals.setdefault(kind, [0, 0])
    total[0] += count
    total[1] += size


def _measure_kernel(
    computations: Mapping[str, dict[str, _Instruction]],
    body: Mapping[str, _Instruction],
    instruction: _Instruction,
) -> int:
    """Returns the bytes that one instruction reads from memory and writes to it."""
    operands = [body[name].shape for name in instruction.operands if name in body]
    if instruction.opcode.endswith("-start"):  # the result is a tuple with the operands in it
        first = next(_ARRAY.finditer(instruction.shape), None)
        written = first[0] if instruction.opcode == "copy-start" and first else operands
        return _in_memory(operands) + _in_memory(written)
    if instruction.opcode in _SLICES:
        return 2 * _in_memory(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_memory(operands[1])
    called = instruction.find_called("calls") if instruction.opcode == "fusion" else []
    if not called or called[0] not in computations:
        return _in_memory(operands) + _in_memory(instruction.shape)
    inner = computations[called[0]]
    users: dict[str, list[_Instruction]] = {}
    for user in inner.values():
        for name in user.operands:
            users.setdefault(name, []).append(user)
    parameters = {int(one.rest): one.name for one in inner.values() if one.opcode == "parameter"}
    read, updated = 0, 0
    for number, shape in enumerate(operands):
        target = parameters[number]
        uses = users.get(target, [])
        if uses and all(use.opcode in _SLICES for use in uses):
            # A slice inside of a kernel has no memory space: its operand's counts.
            part = sum(_measure(use.shape) for use in uses)
            read += min(part, _in_memory(shape))
        elif uses and all(
            use.opcode == "dynamic-update-slice" and use.operands[0] == target for use in uses
        ):  # in place: the rest of the buffer stays as it is
            parts = sum(_measure(inner[use.operands[1]].shape) for use in uses)
            whole = _in_memory(shape)
            updated += max(0, whole - parts)
        else:
            read += _in_memory(shape)
    return read + max(0, _in_memory(instruction.shape) - updated)


def _in_memory(shapes: str | list[str]) -> int:
    """Returns the bytes of the arrays that are in the device's main memory."""
    text = shapes if isinstance(shapes, str) else " ".join(shapes)
    return sum(size for size, layout in _arrays(text) if not re.search(r"S\([1-9]", layout))


def _measure(shape: str) -> int:
    """Returns the bytes of a shape's arrays, without padding."""
    return sum(size for size, _ in _arrays(shape))


def _arrays(text: str) -> Iterator[tuple[int, str]]:
    """Yields (bytes, layout) of each array in a shape such as `(f32[8,4]{1,0:T(8)S(1)}, u8[2])`."""
    for kind, dimensions, layout in _ARRAY.findall(text):
        if (bits := _find_bits(kind)) is not None:
            sizes = [int(d.removeprefix("<=")) for d in dimensions.split(",") if d]
            yield -(-math.prod(sizes) * bits // 8), layout


def _find_bits(kind: str) -> int | None:
    """Returns the bits of an element type such as bf16, pred or f8e4m3; None for token, opaque."""
    if kind == "pred":
        return 8
    match = re.match(r"(?:bf|f|s|u|c)(\d+)", kind)
    return int(match[1]) if match else None
