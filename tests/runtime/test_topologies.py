"""Targets to compile for: their facts, and the errors where their compiler is missing."""

from __future__ import annotations

from importlib import metadata

import jax
import jax.experimental.topologies
import pytest

from flax_cnns.analysis.device import PEAKS
from flax_cnns.errors import UserError
from flax_cnns.runtime import topologies


def test_every_target_has_facts():
    names = topologies.list_targets()
    assert {"v5e-8", "v5p-8", "v6e-8", "h100", "h100-8", "v4-8", "tpu7x-8", "v5e-256"} <= set(names)
    for name in names:
        target = topologies.find_target(name)
        assert target.name == name
        assert target.platform in ("tpu", "gpu")
        assert 10e9 < target.memory < 200e9
        assert 5e11 < target.bandwidth < 1e13
        if target.platform == "tpu":
            sizes = target.layout.partition(":")[2].split("x")
            chips = [int(size) for size in sizes]
            assert target.devices % (chips[0] * chips[1] * (chips[2:] or [1])[0]) == 0


def test_names_count_chips_or_cores_as_the_clouds_do():
    """Google's tables: a v5e-8 has 8 chips; a v5p-8 has 8 cores, which are 4 chips."""
    assert topologies.find_target("v5e-8").devices == 8
    assert topologies.find_target("v5p-8").devices == 4
    assert not topologies.find_target("v5p-8").memory_is_lower_bound
    assert topologies.find_target("h100").memory_is_lower_bound


def test_an_unknown_target_has_its_near_miss():
    with pytest.raises(UserError, match=r"--topology: unknown 'v5-8'; did you mean .*'v5e-8'"):
        topologies.find_target("v5-8")


def test_the_share_of_a_gpu(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert topologies.find_target("h100").memory == int(0.75 * 84929347584)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert topologies.find_target("h100").memory == 84929347584 // 2
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "75")
    with pytest.raises(UserError, match="expected a number above 0 and at most 1"):
        topologies.find_target("h100")


REQUIRES = [
    'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
    'libtpu==0.0.42.*; extra == "tpu"',
    'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
    'jax-cuda12-plugin<=0.10.2,>=0.10.2; extra == "cuda12-local"',
]


@pytest.mark.parametrize(
    ("target", "installed", "message"),
    [
        ("v5e-8", {}, r"which is not installed; pip install \"libtpu==0.0.42.\*\" .*tpu-aot"),
        ("v5e-8", {"libtpu": "0.0.41.2"}, "0.0.41.2 does not fit jax 0.10.2, which needs 0.0.42"),
        ("v5e-8", {"libtpu": "0.0.42.1"}, ""),
        ("v5e-8", {"libtpu": "0.0.421"}, "does not fit"),
        (
            "h100",
            {"jax-cuda12-plugin": "0.10.2"},
            'jax-cuda12-pjrt, which is not installed; pip install "jax-cuda12-plugin==0.10.2"',
        ),
        ("h100", {"jax-cuda12-plugin": "0.9.0"}, "plugin 0.9.0 does not fit jax 0.10.2"),
        ("h100", {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}, ""),
    ],
)  # fmt: skip
def test_a_missing_or_wrong_compiler_is_refused_with_pips_line(
    monkeypatch, target, installed, message
):
    def version(package):
        if package == "jax":
            return "0.10.2"
        if package not in installed:
            raise metadata.PackageNotFoundError
        return installed[package]

    monkeypatch.setattr(topologies.metadata, "version", version)
    monkeypatch.setattr(topologies.metadata, "requires", lambda package: REQUIRES)
    target = topologies.find_target(target)
    if not message:
        package = next(iter(installed))
        assert topologies.check_compiler(target) == f"{package} {installed[package]}"
        return
    with pytest.raises(UserError, match=message):
        topologies.check_compiler(target)


def test_the_installed_jax_pins_both_compilers():
    """jax writes its requirements as this module reads them."""
    assert topologies._find_wanted_version("libtpu", "tpu").startswith("0.0.")
    wanted = topologies._find_wanted_version("jax-cuda12-plugin", "cuda12-local")
    assert wanted == metadata.version("jax")


def test_the_peak_of_every_kind_of_chip_is_known():
    """The names of devices, as the compilers gave them: libtpu 0.0.42, jax-cuda12-plugin 0.10.2."""
    kinds = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H100 80GB HBM3")
    assert set(kinds) <= set(PEAKS)


def test_one_process_at_a_time_uses_libtpu(monkeypatch):
    """The message is that of libtpu 0.0.42 while another process had it."""

    def refuse(**_):
        raise jax.errors.JaxRuntimeError(
            "ABORTED: Internal error when accessing libtpu multi-process lockfile."
        )

    monkeypatch.setattr(jax.experimental.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(topologies, "check_compiler", lambda target: "libtpu 0.0.42.1")
    set_here = ("SKIP_MDS_QUERY", "WORKER_HOSTNAMES", "ACCELERATOR_TYPE")
    for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", *(f"TPU_{name}" for name in set_here)):
        monkeypatch.setenv(name, "1")  # taken back after the test
    with pytest.raises(UserError, match="another process uses libtpu, which allows one at a time"):
        topologies.make_devices(topologies.find_target("v5e-8"))


def test_programs_for_a_target_stay_out_of_the_persistent_cache():
    """JAX writes no program that compiled in less time than its setting says."""

    def read_limit():
        return jax.config.jax_persistent_cache_min_compile_time_secs

    class Lowered:
        def compile(self, compiler_options):
            if not compiler_options:
                raise ValueError("refused")
            return compiler_options, read_limit()

    target = topologies.find_target("v5e-8")._replace(compiler_options=(("a", True),))
    before = read_limit()
    options, limit = topologies.compile_for(target, Lowered(), {"b": "1"})
    assert options == {"a": True, "b": "1"}
    assert limit == float("inf")
    assert read_limit() == before < limit
    with pytest.raises(ValueError, match="refused"):
        topologies.compile_for(target._replace(compiler_options=()), Lowered())
    assert read_limit() == before
