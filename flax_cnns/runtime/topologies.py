"""Accelerators to compile for without having them: their facts, and compile-only devices.

`find_target("v5e-8")` gives the facts, `make_devices(target)` the devices. A program lowered with
shapes that are sharded over these devices is compiled by the accelerator's real compiler. It cannot
run. TPUs need the package libtpu; GPUs need jax-cuda12-plugin and jax-cuda12-pjrt, but no driver
and no CUDA library.

The numbers of a target have their sources beside them:

- `memory` of a TPU is what its compiler lets a program use: libtpu 0.0.42's message about a program
  that is too large says "exceeds available HBM (15.75G)". The chip has a little more.
- `memory` of a GPU is what the driver reports. JAX allocates three quarters of it by default
  (XLA_PYTHON_CLIENT_MEM_FRACTION in JAX's documentation of GPU memory allocation).
- `bandwidth` of a TPU's memory is from Google Cloud's page on each version; of a GPU, from the
  driver's description of the device.

`analysis/device.py` has the peak FLOP/s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runtime import output

GIB = 2**30
JAX_GPU_FRACTION = 0.75  # of a GPU's memory, which JAX allocates by default


class CompileTarget(NamedTuple):
    """An accelerator to compile for: some devices of one kind."""

    name: str  # as the clouds name it
    platform: str  # as `device.platform`: tpu or gpu
    layout: str  # of the chips, as the compiler names it
    devices: int
    memory: int  # bytes of one device that a program may use
    bandwidth: float  # bytes per second between one device and its memory
    compiler_options: tuple[tuple[str, str | bool], ...] = ()
    chips_per_host: tuple[int, int, int] = (2, 2, 1)
    chip_config: str = "default"

    @property
    def memory_is_lower_bound(self) -> bool:
        """Whether the compiler's plan leaves out memory that a step uses.

        On a GPU, cuDNN allocates workspaces when the program starts.
        """
        return self.platform == "gpu"


class _Chip(NamedTuple):
    memory: float  # GiB of one device that a program may use
    bandwidth: float  # bytes per second of one device
    chip_config: str = "default"


# "HBM bandwidth per chip" of docs.cloud.google.com/tpu/docs/VERSION. megacore: both cores of a chip
# are one device.
_CHIPS = {
    "v4": _Chip(30.75, 1200e9, "megacore"),  # .../v4: 32 GiB, 1200 GBps
    "v5e": _Chip(15.75, 819e9),  # .../v5e: 16 GB, 819 GBps
    "v5p": _Chip(95.74, 2765e9, "megacore"),  # .../v5p: 95 GB, 2765 GBps
    "v6e": _Chip(31.25, 1638e9),  # .../tpu7x, its table of three versions: 32 GiB, 1638 GBps
    "tpu7x": _Chip(94.75, 7380e9 / 2),  # .../tpu7x: 192 GiB, 7380 GBps, two devices a chip
}

# Name -> (layout, devices). Clouds count chips of v5e and v6e, and cores of the others: a v5p-8 has
# four chips.
_TPUS = {
    "v4-8": ("v4:2x2x1", 4),
    "v4-16": ("v4:2x2x2", 8),
    "v4-32": ("v4:2x2x4", 16),
    "v5e-1": ("v5e:1x1", 1),
    "v5e-4": ("v5e:2x2", 4),
    "v5e-8": ("v5e:2x4", 8),
    "v5e-16": ("v5e:4x4", 16),
    "v5e-32": ("v5e:4x8", 32),
    "v5e-64": ("v5e:8x8", 64),
    "v5e-128": ("v5e:8x16", 128),
    "v5e-256": ("v5e:16x16", 256),
    "v5p-8": ("v5p:2x2x1", 4),
    "v5p-16": ("v5p:2x2x2", 8),
    "v5p-32": ("v5p:2x2x4", 16),
    "v6e-1": ("v6e:1x1", 1),
    "v6e-4": ("v6e:2x2", 4),
    "v6e-8": ("v6e:2x4", 8),
    "v6e-16": ("v6e:4x4", 16),
    "v6e-256": ("v6e:16x16", 256),
    "tpu7x-8": ("tpu7x:2x2x1", 8),
    "tpu7x-16": ("tpu7x:2x2x2", 16),
}

# XLA would time kernels on the device, and tile matrix products for it.
_GPU_OPTIONS = (("xla_gpu_autotune_level", "0"), ("xla_gpu_enable_triton_gemm", False))

# A GpuTargetConfigProto (XLA's stream_executor/device_description.proto) in text form, as
# `jax.lib.xla_client.get_topology_for_devices(jax.devices()).target_config` prints it on the
# device. This one is from github.com/openxla/xla/issues/25919. NVIDIA's page on the H100 SXM has
# the same bandwidth, rounded to 3.35 TB/s.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Name -> (description of a device, devices of one host). The names of several are ours.
_GPUS = {"h100": (_H100, 1), "h100-8": (_H100, 8)}


def list_targets() -> list[str]:
    """Returns the names of all targets."""
    return [*_TPUS, *_GPUS]


def find_target(name: str) -> CompileTarget:
    """Returns the target of this name. Raises `UserError` for an unknown one."""
    if name in _TPUS:
        layout, devices = _TPUS[name]
        chip = _CHIPS[layout.partition(":")[0]]
        return CompileTarget(
            name=name,
            platform="tpu",
            layout=layout,
            devices=devices,
            memory=int(chip.memory * GIB),
            bandwidth=chip.bandwidth,
            chips_per_host=(1, 1, 1) if devices == 1 else (2, 2, 1),
            chip_config=chip.chip_config,
        )
    if name in _GPUS:
        description, devices = _GPUS[name]
        numbers = dict(re.findall(r"(\w+): (\d+)\n", description))
        return CompileTarget(
            name=name,
            platform="gpu",
            layout=f"1x1x{devices}",  # slices, hosts of a slice, devices of a host
            devices=devices,
            memory=int(int(numbers["device_memory_size"]) * read_gpu_fraction()),
            bandwidth=float(numbers["memory_bandwidth"]),
            compiler_options=_GPU_OPTIONS,
        )
    raise UserError(f"--topology: unknown {name!r}{did_you_mean(name, list_targets())}")


def read_gpu_fraction() -> float:
    """Returns the share of a GPU's memory that JAX would allocate.

    Raises `UserError` if XLA_PYTHON_CLIENT_MEM_FRACTION is not a number above 0 and at most 1.
    """
    text = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    try:
        fraction = float(text or JAX_GPU_FRACTION)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise UserError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={text}: expected a number above 0 and at most 1"
        )
    return fraction


# ---- the compilers

# Platform -> (pip's name of our extra, the packages that hold the compiler, jax's extra that pins
# the first of them).
_COMPILERS = {
    "tpu": ("tpu-aot", ("libtpu",), "tpu"),
    "gpu": ("gpu-aot", ("jax-cuda12-plugin", "jax-cuda12-pjrt"), "cuda12-local"),
}


def check_compiler(target: CompileTarget) -> str:
    """Returns the compiler's package with its version, such as "libtpu 0.0.42.1".

    Raises `UserError` with pip's line if a package is missing, or has another version than the
    installed jax wants.
    """
    extra, packages, jax_extra = _COMPILERS[target.platform]
    wanted = _find_wanted_version(packages[0], jax_extra)
    exact = wanted.removesuffix(".*")
    pins = " ".join(f'"{package}=={wanted}"' for package in packages)
    line = f'pip install {pins} (or, in a fresh environment: pip install "flax_cnns[{extra}]")'
    found = ""
    for package in packages:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UserError(
                f"--topology={target.name} compiles with the package {package}, which is not"
                f" installed; {line}"
            ) from None
        if found != exact and not found.startswith(f"{exact}."):
            jax = metadata.version("jax")
            raise UserError(
                f"--topology={target.name}: {package} {found} does not fit jax {jax}, which needs"
                f" {wanted}; {line}"
            )
    return f"{packages[0]} {metadata.version(packages[0])}"


def _find_wanted_version(package: str, jax_extra: str) -> str:
    """Returns the version of `package` that the installed jax pins, such as "0.0.42.*"."""
    pattern = rf'{package}(?:\[[\w-]+\])?[^;]*?(?:==|<=)([\d.]+(?:\*)?).*extra == "{jax_extra}"'
    for requirement in metadata.requires("jax") or ():
        if match := re.fullmatch(pattern, requirement):
            return match[1]
    return metadata.version("jax")


def make_devices(target: CompileTarget) -> list[Any]:
    """Returns the target's compile-only devices.

    Call it before JAX's first operation: it keeps JAX on the CPU, so that an accelerator of this
    machine stays free. Raises `UserError` as `check_compiler`, and if another process uses libtpu
    alone (ALLOW_MULTIPLE_LIBTPU_LOAD=0).
    """
    check_compiler(target)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # would ask Google Cloud about this machine
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compilers share no device
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # silences a warning only
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any]
    if target.platform == "tpu":
        options = {
            "topology_name": target.layout,
            "chips_per_host_bounds": target.chips_per_host,
            "chip_config_name": target.chip_config,
        }
    else:
        options = {"topology": target.layout, "target_config": _GPUS[target.name][0]}
    platform = {"gpu": "cuda"}.get(target.platform, target.platform)
    try:
        with output.without_driver_noise():
            jax.devices()  # loads JAX's plugins
            devices = list(topologies.get_topology_desc(platform=platform, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error) or "already in use" in str(error):
            raise UserError(
                f"--topology={target.name}: another process uses libtpu, which allows one at a"
                " time; unset ALLOW_MULTIPLE_LIBTPU_LOAD, or wait for that process to end (if there"
                " is none, remove /tmp/libtpu_lockfile)"
            ) from None
        raise
    assert len(devices) == target.devices, (target, devices)
    return devices


def compile_for(target: CompileTarget, lowered: Any, options: Mapping[str, Any] = {}) -> Any:
    """Compiles a lowered program with the target's compiler options and `options`.

    JAX's persistent cache does not keep the program: JAX could not load it again, because it needs
    a device for that. The cache would then be called damaged.
    """
    import jax

    name = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        return lowered.compile(compiler_options={**dict(target.compiler_options), **options})
    finally:
        jax.config.update(name, seconds)


def make_stand_ins(count: int) -> list[Any]:
    """Returns CPU devices in the place of a target's, to lower programs that are not compiled.

    Needs no compiler's package. Call it before JAX's first operation.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()[:count]
