from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from flax_cnns.analysis import device


def test_peaks_by_kind():
    def peak(kind, dtype):
        return device.find_peak(SimpleNamespace(platform="gpu", device_kind=kind), dtype)

    assert peak("NVIDIA A100-SXM4-40GB", "bfloat16").flops == 312e12
    assert peak("NVIDIA A100-SXM4-40GB", "float32").flops == 156e12
    assert peak("NVIDIA H200", "bfloat16").source == "nvidia.com/en-us/data-center/h200, dense"
    assert peak("Tesla T4", "bfloat16") is None  # no bfloat16
    assert peak("NVIDIA Abacus", "float32") is None


def test_a_programs_memory_is_its_arguments_results_and_scratch():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    assert device.program_memory(compiled) == 4000 + 4000
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert device.program_memory(donated) == 4000


def test_the_environment_is_told():
    told = device.describe_environment()
    assert told["versions"]["jax"] == jax.__version__
    assert told["platform"] == "cpu"
    assert told["devices"] == 4
    assert told["cores"] >= 1
    assert "XLA_FLAGS" in told["variables"]
