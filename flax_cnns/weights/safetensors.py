"""Reads safetensors files: eight bytes with the length of a JSON header, the header, the numbers.

The format: https://github.com/huggingface/safetensors#format. The safetensors library cannot read
float8 into NumPy; this module uses ml_dtypes for it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class UnsupportedError(Exception):
    """A file holds numbers of a type that neither NumPy nor ml_dtypes has."""


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name.

    Raises `ValueError` if header and file disagree, and `UnsupportedError` for a number type that
    neither NumPy nor ml_dtypes has.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header declares {length:,} bytes, the file has {size - 8:,}")
        header = json.loads(file.read(length))
        data = size - 8 - length
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        places = {name: _place(name, entry) for name, entry in header.items()}
        end = 0
        for name, (_, _, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
            if begin != end or stop > data:
                raise ValueError(
                    f"{name} declares bytes {begin} to {stop}; expected to begin at {end}"
                )
            end = stop
        if end != data:
            raise ValueError(f"its header declares {end:,} bytes of arrays, the file has {data:,}")
        arrays = {}
        for name, (dtype, shape, begin, stop) in places.items():
            file.seek(8 + length + begin)
            bytes_ = file.read(stop - begin)
            arrays[name] = np.frombuffer(bytes_, dtype.newbyteorder("<")).reshape(shape)
    return arrays


def _place(name: str, entry: Any) -> tuple[np.dtype, list[int], int, int]:
    """(dtype, shape, first byte, one past the last byte) of an entry of the header."""
    kind, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in _DTYPES:
        raise UnsupportedError(f"{name[:60]} has the type {str(kind)[:20]}")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, stop)):
        raise ValueError(f"{name[:60]} has no valid shape")
    dtype = np.dtype(_DTYPES[kind])
    if math.prod(shape) * dtype.itemsize != stop - begin or len(shape) > 32:
        raise ValueError(f"{name[:60]} is {kind} {shape[:8]} and declares {stop - begin:,} bytes")
    return dtype, shape, begin, stop
