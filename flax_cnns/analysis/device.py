"""The machine that runs a program: versions, device, peak FLOP/s, and used memory."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_cnns.analysis.timing import time_candidates


class Peak(NamedTuple):
    """The peak speed of a device, and where the number comes from."""

    flops: float  # per second
    source: str


# Dense TFLOP/s of one JAX device: (bfloat16, float32, source). float32 is in XLA's default
# precision: TF32 on NVIDIA's tensor cores from Ampere on, one bfloat16 pass on TPUs. NVIDIA's pages
# give the tensor cores of Hopper and Ada "with sparsity": the dense number is half of that.
_NVIDIA = "nvidia.com/en-us/data-center/"
_CLOUD = "docs.cloud.google.com/tpu/docs/"
PEAKS: dict[str, tuple[float | None, float, str]] = {
    "Tesla V100-SXM2-16GB": (None, 15.7, f"{_NVIDIA}v100"),
    "Tesla V100-SXM2-32GB": (None, 15.7, f"{_NVIDIA}v100"),
    "Tesla T4": (None, 8.1, f"{_NVIDIA}tesla-t4"),
    "NVIDIA A10": (125.0, 62.5, f"{_NVIDIA}products/a10-gpu"),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0, f"{_NVIDIA}a100"),
    "NVIDIA A100-SXM4-80GB": (312.0, 156.0, f"{_NVIDIA}a100"),
    "NVIDIA A100-PCIE-40GB": (312.0, 156.0, f"{_NVIDIA}a100"),
    "NVIDIA A100 80GB PCIe": (312.0, 156.0, f"{_NVIDIA}a100"),
    "NVIDIA L4": (121.0, 60.0, f"{_NVIDIA}l4, dense"),
    "NVIDIA L40S": (362.0, 183.0, f"{_NVIDIA}l40s, dense"),
    "NVIDIA H100 PCIe": (756.0, 378.0, f"{_NVIDIA}h100 (datasheet of 2023), dense"),
    "NVIDIA H100 NVL": (835.0, 417.5, f"{_NVIDIA}h100, dense"),
    "NVIDIA H100 80GB HBM3": (989.0, 494.5, f"{_NVIDIA}h100, dense"),
    "NVIDIA H200": (989.0, 494.5, f"{_NVIDIA}h200, dense"),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6, "NVIDIA's GA102 whitepaper, float32 sums"),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, "NVIDIA's Ada whitepaper, float32 sums"),
    "TPU v2": (22.5, 22.5, f"{_CLOUD}v2: 45 a chip, two devices"),
    "TPU v3": (61.5, 61.5, f"{_CLOUD}v3: 123 a chip, two devices"),
    "TPU v4": (275.0, 275.0, f"{_CLOUD}v4"),
    "TPU v5 lite": (197.0, 197.0, f"{_CLOUD}v5e"),
    "TPU v5": (459.0, 459.0, f"{_CLOUD}v5p"),
    "TPU v6 lite": (918.0, 918.0, f"{_CLOUD}v6e"),
    "TPU7x": (1153.5, 1153.5, f"{_CLOUD}tpu7x: 2307 a chip, two devices"),
}


def find_peak(device: Any, dtype: str = "float32") -> Peak | None:
    """Returns the peak FLOP/s of `device` in `dtype`; None if it is not in `PEAKS`.

    On a CPU, the peak is measured: the fastest of five products of 2048x2048 float32 matrices on
    all cores.
    """
    if device.platform == "cpu":
        size = 2048
        a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
        product = jax.jit(jnp.matmul)
        timing = time_candidates({"matmul": lambda: product(a, a)}, rounds=5)
        return Peak(
            2 * size**3 / min(timing.seconds["matmul"]), "a float32 matmul of 2048, measured"
        )
    if device.device_kind not in PEAKS:
        return None
    bfloat16, float32, source = PEAKS[device.device_kind]
    teraflops = {"bfloat16": bfloat16, "float32": float32}.get(dtype)
    return None if teraflops is None else Peak(1e12 * teraflops, source)


def program_memory(compiled: Any) -> int | None:
    """Returns the bytes per device that the compiler planned for a program; None if unknown.

    Arguments and results are included.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes  # donated arguments become results
        + plan.temp_size_in_bytes
    )


def peak_memory(device: Any) -> int | None:
    """Returns the largest number of bytes used on `device` since the start; None on a CPU."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def describe_environment() -> dict[str, Any]:
    """Returns what a measurement depends on: versions, device, cores, environment variables."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "torchvision", "timm")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    watched = ("XLA_", "JAX_", "OMP_", "MKL_", "TORCH_", "CUDA_VISIBLE_DEVICES")
    return {
        "versions": versions,
        "platform": jax.devices()[0].platform,
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": _cores(),
        "system": platform.platform(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(watched)},
    }


def _cores() -> int | None:
    """Returns the number of cores that this process may use, which may be fewer than all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
