"""Reading compiled programs: recorded texts of a TPU's and a GPU's compiler, and a CPU's."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flax_cnns.analysis.hlo import Collective, list_kernels, read_traffic

FOLDER = Path(__file__).with_name("hlo")


def test_recorded_tpu_program():
    """A convolution of bf16 [8 32 32 64] by [3 3 64 64] per device, recorded from libtpu 0.0.42.

    By hand: the fusion reads images and kernel; a copy reads the kernel again, into on-chip memory;
    the update is written. The all-reduce takes a bf16 scalar and the kernel's gradient. The scalars
    are two f32 and two bf16 results, some of which are read again.
    """
    traffic = read_traffic((FOLDER / "tpu_v5e.txt").read_text())
    kernel, images = 2 * 3 * 3 * 64 * 64, 2 * 8 * 32 * 32 * 64
    assert traffic.collectives == {"all-reduce": Collective(1, kernel + 2)}
    assert traffic.bytes == pytest.approx(images + 3 * kernel, abs=64)


def test_recorded_gpu_program():
    """The same with 64 images on an H100, recorded from jax-cuda12-plugin 0.10.2: cuDNN reads and
    writes the images, a reduction reads them; the kernel is transposed, and scaled in the end."""
    traffic = read_traffic((FOLDER / "gpu_h100.txt").read_text())
    kernel, images = 2 * 3 * 3 * 64 * 64, 2 * 64 * 32 * 32 * 64
    assert traffic.collectives == {}
    assert traffic.bytes == pytest.approx(3 * images + 5 * kernel, abs=5 * 4 * 2048)


def test_the_kernels_of_a_recorded_program():
    """cuDNN reads the images and the kernel, and writes the images: more than any other."""
    text = (FOLDER / "gpu_h100.txt").read_text()
    kernels = list_kernels(text)
    assert sum(kernel.bytes for kernel in kernels) == read_traffic(text).bytes
    kernel, images = 2 * 3 * 3 * 64 * 64, 2 * 64 * 32 * 32 * 64
    assert kernels[0].bytes == pytest.approx(2 * images + kernel, abs=256)
    assert "conv" in kernels[0].name


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    mesh = Mesh(jax.devices()[:4], ("batch",))

    def step(x):
        def turn(carry, _):
            return lax.psum(carry, "batch") * 0.5, None

        x = lax.scan(turn, x, length=7)[0]
        return lax.all_gather(x, "batch")

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("batch"), out_specs=P(), check_vma=False)
    compiled = jax.jit(mapped).lower(jnp.zeros((8, 3))).compile()
    collectives = read_traffic(compiled.as_text()).collectives
    assert collectives == {"all-reduce": Collective(7, 7 * 24), "all-gather": Collective(1, 24)}


def test_bytes_of_a_plain_program():
    """A kernel reads two arrays and writes one; of an array that it slices, it reads the slice."""
    x, table = jnp.zeros(4096), jnp.zeros((512, 4096))
    compiled = jax.jit(lambda a, b: a * b + 1).lower(x, x).compile()
    assert read_traffic(compiled.as_text()).bytes == 3 * 4 * 4096
    (kernel,) = list_kernels(compiled.as_text())
    assert kernel.bytes == 3 * 4 * 4096
    assert kernel.source.startswith("jit(<lambda>)/")
    take = jax.jit(lambda t, i: lax.dynamic_index_in_dim(t, i, keepdims=False) * 2)
    moved = read_traffic(take.lower(table, 3).compile().as_text()).bytes
    assert moved == pytest.approx(2 * 4 * 4096, abs=16)


TEXT = """HloModule m

%half (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %ar = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%none (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (i: pred[], x: f32[8]) -> f32[8] {
  %i = pred[] parameter(0)
  %x = f32[8]{0} parameter(1)
  %start = (f32[8]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %chip = f32[8]{0:T(8)S(1)} copy(%done)
  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%none, %half}
}
"""


def test_asynchronous_collectives_branches_and_on_chip_memory():
    traffic = read_traffic(TEXT)
    assert traffic.collectives == {"all-reduce": Collective(1, 32), "all-gather": Collective(1, 32)}
    # all-gather reads and writes 32, the copy to the chip reads 32, all-reduce reads and writes 32.
    assert traffic.bytes == 64 + 32 + 64
