from __future__ import annotations

from pathlib import Path

import jax
import pytest

from flax_cnns.analysis import trace_summary
from flax_cnns.analysis.trace_summary import read_trace, strip_number
from flax_cnns.errors import UserError

TRACES = Path(__file__).parent / "traces"


def read_text(name):
    text = (TRACES / name).read_text()
    return trace_summary.summarize(jax.profiler.ProfileData.from_text_proto(text))


def in_us(operations):
    return [
        (each.name, each.program, round(each.seconds * 1e6, 6), each.calls) for each in operations
    ]


def test_kernels_of_a_gpu_are_named_by_their_operation():
    summary = read_text("gpu.pbtxt")
    assert (summary.platform, summary.devices) == ("gpu", 1)
    assert in_us(summary.operations) == [
        ("cudnn-conv.7", "jit_train_step", 9.0, 2),
        ("MemcpyH2D", "", 3.5, 1),
        ("loop_fusion.3", "jit_train_step", 3.0, 2),
    ]
    assert in_us(summary.by_kind())[0] == ("cudnn-conv", "jit_train_step", 9.0, 2)


def test_a_loop_on_a_tpu_does_not_count_its_body():
    summary = read_text("tpu.pbtxt")
    assert (summary.platform, summary.devices) == ("tpu", 2)
    # The loop takes 12 us, of which 9 are in its body. The second core's line has no modules.
    assert in_us(summary.operations) == [
        ("fusion.1", "jit_train_step", 9.0, 2),
        ("convolution.4", "jit_train_step", 8.0, 1),
        ("convolution.4", "", 7.0, 1),
        ("fusion.1", "jit_evaluate", 5.0, 1),
        ("while.2", "jit_train_step", 3.0, 1),
    ]
    assert in_us(summary.by_program())[0] == ("jit_train_step", "jit_train_step", 20.0, 4)
    assert summary.seconds == pytest.approx(32e-6)


def test_a_trace_that_this_cpu_records(tmp_path):
    """Checks the operations against those of the compiled program, and JAX's own event names."""

    @jax.jit
    def multiply(a):
        return jax.numpy.sin(a @ a)

    a = jax.numpy.ones((64, 64))
    jax.block_until_ready(multiply(a))
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            jax.block_until_ready(multiply(a))
    (path,) = tmp_path.rglob("*.xplane.pb")
    summary = read_trace(path)
    program = multiply.lower(a).compile().as_text()
    assert (summary.platform, summary.devices) == ("cpu", 1)
    assert {each.program for each in summary.operations} == {"jit_multiply"}
    assert all(f"%{each.name} = " in program for each in summary.operations)
    assert all(each.calls == 3 and each.seconds >= 0 for each in summary.operations)
    assert summary.operations


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fusion.12", "fusion"),
        ("fusion.12.remat2", "fusion"),
        ("all-reduce.1.clone", "all-reduce"),
        ("conv2d", "conv2d"),
        ("MemcpyH2D", "MemcpyH2D"),
    ],
)
def test_the_kind_of_an_operation(name, kind):
    assert strip_number(name) == kind


def test_files_that_are_no_traces(tmp_path):
    (tmp_path / "text").write_text("not a trace")
    for path in (tmp_path / "text", tmp_path / "none"):
        with pytest.raises(UserError, match=r"expected a trace of JAX's profiler"):
            read_trace(path)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match="empty: the trace holds no operation of XLA"):
        read_trace(tmp_path / "empty")
