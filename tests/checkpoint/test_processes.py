"""Two real processes share one directory of checkpoints."""

import subprocess
import sys

import numpy as np
import pytest

from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.checkpoint.reading import read_leaves

pytestmark = pytest.mark.slow

SCRIPT = r"""
import sys
from flax_cnns.runtime import launch
launch.initialize(shutdown_timeout=20)
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from flax_cnns import graft
from flax_cnns.checkpoint.manager import Checkpoints

mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
def everywhere(array):
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P()), lambda i: array[i])
def state(step):
    return {"params": {"w": everywhere(np.arange(1000, dtype=np.float32) + step)}}
def value(state):
    return np.asarray(state["params"]["w"].addressable_data(0))[0]

with Checkpoints(sys.argv[1]) as checkpoints:
    assert checkpoints.restore(state(0)) is None
    for step in (1, 2, 3):
        found = {"validation/accuracy": 1 / step}
        checkpoints.save(step, state(step), host={"step": step}, metrics=found)
    checkpoints.save(3, state(3), host={"step": "again"}, metrics={})
    checkpoints.wait()
    assert checkpoints.all_steps() == [1, 2, 3], checkpoints.all_steps()
    # Both skip a step that only one of them can read.
    from flax_cnns.checkpoint import reading
    from flax_cnns.errors import UserError
    read = reading.read_leaves
    def read_with_one_bad_eye(path, paths):
        if jax.process_index() == 1 and "/3/" in str(path):
            raise reading.DamagedError("bad eye")
        return read(path, paths)
    reading.read_leaves = read_with_one_bad_eye
    try:
        checkpoints.restore(state(0), 3)
    except UserError as error:
        print("raised", error, file=sys.stderr)
    restored, host, step = checkpoints.restore(state(0))
    assert (step, host, value(restored)) == (2, {"step": 2}, 2)
    assert restored["params"]["w"].sharding == NamedSharding(mesh, P())
    variables, report = graft(f"{sys.argv[1]}@best", state(9), [("(.*)", r"\1")])
    assert value(variables) == 1
    print("done", jax.process_count(), file=sys.stderr)
"""


def test_save_restore_and_damage_between_two_processes(tmp_path):
    tmp_path /= "in[two]"  # a name that Orbax misreads
    launcher = [sys.executable, "-m", "flax_cnns.launch", "--local=2", "--devices=2", "--"]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", SCRIPT, tmp_path / "checkpoints"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "[0] done 2\n" in done.stderr
    assert "[1] done 2\n" in done.stderr
    assert "[1] raised bad eye\n" in done.stderr
    assert f"[0] raised another process cannot read {tmp_path}/checkpoints/3\n" in done.stderr
    moved = f"[0] skipping checkpoint 3, moved to {tmp_path}/checkpoints.damaged/3: another process"
    assert moved in done.stderr
    # This process alone resumes from there.
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state, host, step = checkpoints.restore({"params": {"w": np.zeros(1000, np.float32)}})
    assert (step, host, state["params"]["w"][0]) == (2, {"step": 2}, 2)
    assert read_leaves(tmp_path / "checkpoints.damaged/3", ["params/w"])["params/w"][0] == 3
