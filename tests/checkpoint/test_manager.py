import json
import shutil
import subprocess
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_cnns.checkpoint import finding
from flax_cnns.checkpoint.finding import DamagedError, find_arrays
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.checkpoint.reading import read_leaves, read_metadata, read_tree
from flax_cnns.errors import UserError
from flax_cnns.tree import flatten, stack_blocks


class State(struct.PyTreeNode):
    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any


def make_state(seed: int = 0, classes: int = 3, sharding: Any = None) -> State:
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {
        "stem": {"conv": {"kernel": leaf(3, 3, 32, 4)}, "norm": {"scale": leaf(4)}},
        "head": {"kernel": leaf(4, classes), "bias": leaf(classes).astype(jnp.bfloat16)},
    }
    stats = {"stem": {"norm": {"mean": leaf(4), "var": leaf(4)}}}
    # NamedTuples in tuples, with empty states
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1)))
    state = State(
        step=jnp.int32(seed),
        params=params,
        batch_stats=stats,
        opt_state=optimizer.init(params),
        ema={"params": params, "batch_stats": stats},
    )
    return state if sharding is None else jax.device_put(state, sharding)


def mesh_of(devices: int) -> NamedSharding:
    mesh = jax.make_mesh(
        (devices,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, P())


def shape_on(sharding: NamedSharding, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for path, leaf in flatten(one).items():
        twin = flatten(other)[path]
        assert leaf.dtype == twin.dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(twin).tobytes(), path


def accuracy(value: float) -> dict[str, float]:
    return {"validation/accuracy": value, "validation/loss": 1.0}


def test_stacks_are_written_and_read_block_by_block(tmp_path):
    """A run with scan resumes without scan, and the other way round, bit for bit."""
    state = make_state()
    for i in range(1, 5):
        state.params[f"block{i}"] = {"kernel": jnp.arange(6.0).reshape(2, 3) + i}
    state = state.replace(opt_state=optax.sgd(0.1, 0.9).init(state.params))
    stacked = stack_blocks(state)
    assert "block2-4" in stacked.params
    with Checkpoints(tmp_path / "named") as one, Checkpoints(tmp_path / "stacked") as other:
        one.save(1, state, host={})
        other.save(1, stacked, host={})
        one.wait(), other.wait()
        assert read_metadata(one.directory) == read_metadata(other.directory)
        manifests = [c.directory / "1/manifest/metadata" for c in (one, other)]
        assert manifests[0].read_text() == manifests[1].read_text()
        for target in (state, stacked):
            for checkpoints in (one, other):
                assert_same(checkpoints.restore(target)[0], target)
        target = jax.tree.map(partial(shape_on, mesh_of(4)), stacked)
        kernel = other.restore(target)[0].params["block2-4"]["kernel"]
        assert kernel.sharding == mesh_of(4)
        shorter = stacked.params | {"block2-3": stacked.params["block2-4"]}
        del shorter["block2-4"]
        with pytest.raises(UserError, match=r"params/block4/kernel is only in the checkpoint"):
            other.restore(stacked.replace(params=shorter))


def data_file(step_directory):
    """The file that holds the numbers.

    Orbax writes small arrays into two files of the same size, and reads `state/d/*`.
    """
    files = [p for p in step_directory.glob("state/**/d/*") if p.is_file()]
    return max(files, key=lambda p: (p.stat().st_size, p.parent.parent.name == "state"))


def flip_a_bit(step_directory):
    content = bytearray(data_file(step_directory).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(step_directory).write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the steps 1, 2 and 3; step 1 is the best. Tests copy it before a change."""
    run = tmp_path_factory.mktemp("runs") / "saved"
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step, value in ((1, 0.9), (2, 0.5), (3, 0.7)):
            checkpoints.save(step, make_state(step), host={"best": step}, metrics=accuracy(value))
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_bit_exact_between_device_counts(tmp_path):
    state = make_state(7, sharding=mesh_of(1))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.restore(state) is None
        assert checkpoints.all_steps() == []
        assert checkpoints.latest_step() is checkpoints.best_step() is None
        host = {"window": {"loss": 7.0}, "best": 0.25}
        checkpoints.save(7, state, host=host, metrics=None)
        for step, devices in ((7, 4), (8, 1)):
            target = jax.tree.map(partial(shape_on, mesh_of(devices)), state)
            restored = checkpoints.restore(target)
            assert_same(restored[0], state)
            assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(restored[0]))
            assert restored[1:] == (host, step)
            checkpoints.save(step + 1, restored[0], host=host)


def test_typed_keys_and_numpy_leaves_come_back(tmp_path):
    state = {"key": jax.random.key(3), "w": np.arange(4.0), "n": np.int64(5), "none": None}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, host={})
        restored, _, _ = checkpoints.restore(state)
    assert jax.random.key_data(restored["key"]).tolist() == [0, 3]
    assert restored["key"].dtype == state["key"].dtype
    assert type(restored["w"]) is np.ndarray
    assert restored["w"].dtype == np.float64
    assert restored["n"] == 5


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jax.device_put(jnp.zeros(1 << 20), mesh_of(4))
    with Checkpoints(tmp_path, keep_latest=9) as checkpoints:
        for i in range(3):
            checkpoints.save(i, {"w": w}, host={})
            w = step(w)
        checkpoints.wait()
        for i in range(3):
            assert (checkpoints.restore({"w": w}, i)[0]["w"] == i).all()


def test_the_latest_and_the_best_are_kept_and_nan_is_never_the_best(tmp_path):
    values = (0.2, 0.6, float("nan"), 0.6, float("inf"), 0.1, 0.3, None)
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        for step, value in enumerate(values):
            found = None if value is None else accuracy(value)
            checkpoints.save(step, {"w": np.ones(2)}, host={}, metrics=found)
        checkpoints.wait()
        assert checkpoints.all_steps() == [3, 6, 7]  # the newest of equals
        assert checkpoints.best_step() == 3
    # Metrics are read from disk by a new process.
    with Checkpoints(tmp_path, keep_latest=1, keep_best=2) as checkpoints:
        checkpoints.save(8, {"w": np.ones(2)}, host={}, metrics=accuracy(0.7))
        checkpoints.wait()
        assert checkpoints.all_steps() == [3, 8]
        assert checkpoints.best_step() == 8


def test_the_best_may_be_the_lowest_of_another_metric(tmp_path):
    with Checkpoints(tmp_path, best_by="validation/loss", best_mode="min") as checkpoints:
        for step, loss in enumerate((0.7, -0.5, 0.2, float("nan"), 0.1)):
            found = {"validation/loss": loss, "validation/accuracy": 0.1 * step}
            checkpoints.save(step, {"w": np.ones(2)}, host={}, metrics=found)
        checkpoints.wait()
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([1, 3, 4], 1)
    assert finding.best_step(tmp_path) == 1
    assert finding.read_metrics(tmp_path, 1)["score"] == 0.5


def test_without_validation_the_best_is_the_latest(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": np.ones(2)}, host={})
        checkpoints.wait()
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([2, 3], 3)


def test_the_newest_step_saved_again_is_replaced(run):
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(3, make_state(4), host={"again": 1}, metrics={"validation/accuracy": 1.0})
        state, host, step = checkpoints.restore(make_state(0))
        assert (host, step, checkpoints.best_step()) == ({"again": 1}, 3, 3)
        chex.assert_trees_all_equal(state, make_state(4))
        with pytest.raises(RuntimeError, match="has step 3, which is after 2"):
            checkpoints.save(2, make_state(4), host={})
    assert not (run / "checkpoints.replaced").exists()


@pytest.mark.parametrize("new_is_whole", [False, True])
def test_a_process_that_died_while_it_replaced_a_step_leaves_one_of_the_two(run, new_is_whole):
    with Checkpoints(run / "checkpoints") as checkpoints:
        old = checkpoints.restore(make_state(0))[0]
        checkpoints._set_aside(3)
        if new_is_whole:
            checkpoints.save(3, make_state(4), host={})
    with Checkpoints(run / "checkpoints") as checkpoints:
        found = checkpoints.restore(make_state(0))[0]
    chex.assert_trees_all_equal(found, make_state(4) if new_is_whole else old)
    assert not (run / "checkpoints.replaced").exists()


def truncate(step_directory):
    file = data_file(step_directory)
    file.write_bytes(file.read_bytes()[:100])


def change_manifest(step_directory):
    file = step_directory / "manifest/metadata"
    content = json.loads(file.read_text())
    content["leaves"]["params/head/kernel"]["shape"] = [4, 4]
    file.write_text(json.dumps(content))


def change_host(step_directory):
    file = step_directory / "host/metadata"
    file.write_text(file.read_text().replace("3", "4"))


def change_manifest_key(step_directory):
    file = step_directory / "manifest/metadata"
    file.write_text(file.read_text().replace("dtype", "dtypf", 1))


def change_metrics(step_directory):
    file = step_directory / "metrics/metrics"
    file.write_text(file.read_text().replace("0.7", "2.7"))


DAMAGES = {
    "a flipped bit": (flip_a_bit, "CRC32"),
    "truncation": (truncate, "damaged"),
    "no metadata": (lambda d: (d / "state/_METADATA").unlink(), "arrays are missing"),
    "broken metadata": (lambda d: (d / "state/_METADATA").write_text("{"), "JSON"),
    "no arrays": (lambda d: shutil.rmtree(d / "state"), "arrays are missing"),
    "no manifest": (lambda d: shutil.rmtree(d / "manifest"), "FileNotFoundError"),
    "broken manifest": (lambda d: (d / "manifest/metadata").write_text('{"l'), "JSON"),
    "another manifest": (change_manifest, "leaves differ from its manifest"),
    "a flipped bit in the manifest": (change_manifest_key, "KeyError"),
    "a flipped bit in the host data": (change_host, "its CRC32"),
    "no host data": (lambda d: (d / "host/metadata").unlink(), "FileNotFoundError"),
    "broken metrics": (lambda d: (d / "metrics/metrics").write_text("{"), "JSON"),
    "metrics of another kind": (lambda d: (d / "metrics/metrics").write_text("{}"), "CRC32"),
    "a flipped bit in the metrics": (change_metrics, "CRC32"),
    "no metrics": (lambda d: shutil.rmtree(d / "metrics"), "CRC32"),
    "an empty folder": (lambda d: (shutil.rmtree(d), d.mkdir()), "arrays are missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_reported_and_the_one_before_taken(run, damage):
    break_it, words = DAMAGES[damage]
    break_it(run / "checkpoints/3")
    lines = []
    with Checkpoints(run / "checkpoints", report=lines.append) as checkpoints:
        state, host, step = checkpoints.restore(make_state())
        assert step == 2
        assert host == {"best": 2}
        assert_same(state, make_state(2))
        assert len(lines) == 1
        assert "\n" not in lines[0]
        assert "skipping checkpoint 3, moved to " in lines[0]
        assert words in lines[0]
        # The damaged step is not deleted, and its number is free again.
        assert (run / "checkpoints.damaged/3").is_dir()
        checkpoints.save(3, make_state(3), host={})
        checkpoints.wait()
        assert checkpoints.all_steps() == [1, 2, 3]


def test_all_damaged(run):
    lines = []
    for step in (1, 2, 3):
        flip_a_bit(run / f"checkpoints/{step}")
    (run / "checkpoints.damaged/3").mkdir(parents=True)  # from an earlier damage
    with Checkpoints(run / "checkpoints", report=lines.append) as checkpoints:
        assert checkpoints.restore(make_state()) is None
        assert checkpoints.all_steps() == []
    assert sorted(p.name for p in (run / "checkpoints.damaged").iterdir()) == ["1", "2", "3", "3.1"]
    assert len(lines) == 4
    assert "no intact checkpoint is left" in lines[-1]


def test_an_explicit_step(run):
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert_same(checkpoints.restore(make_state(), 1)[0], make_state(1))
        with pytest.raises(UserError, match="has no step 5; it has 1, 2, 3"):
            checkpoints.restore(make_state(), 5)
        flip_a_bit(run / "checkpoints/1")
        with pytest.raises(UserError, match=r"checkpoints/1/state is damaged: .* has the CRC32"):
            checkpoints.restore(make_state(), 1)
        assert checkpoints.all_steps() == [1, 2, 3]


def test_no_bit_flips_unseen(run):
    """Orbax alone reads most of these without an error."""
    rng = np.random.default_rng(0)
    file, target, noticed = data_file(run / "checkpoints/3"), make_state(), 0
    good = file.read_bytes()
    for _ in range(10):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        file.write_bytes(bad)
        try:
            state = read_tree(run / "checkpoints/3/state", target, exact=True)
        except DamagedError:
            noticed += 1
        else:  # a byte that is not used
            assert_same(state, make_state(3))
    assert noticed >= 5


def test_another_network(run):
    with Checkpoints(run / "checkpoints") as checkpoints:
        with pytest.raises(UserError) as raised:
            checkpoints.restore(make_state(classes=5))
        text = str(raised.value)
        assert (
            "params/head/kernel is float32[4, 3] in the checkpoint and float32[4, 5] in this"
            in text
        )
        assert "(8 differ)" in text  # the heads of params, ema and both moments
        assert "\n" not in text
        with pytest.raises(UserError, match="ema/params/head/bias is only in the checkpoint"):
            checkpoints.restore(make_state().replace(ema=None))
        more = make_state()
        more.params["stage1"] = {"kernel": jnp.ones(2)}
        with pytest.raises(UserError, match="params/stage1/kernel is only in this run"):
            checkpoints.restore(more)
        assert checkpoints.all_steps() == [1, 2, 3]  # nothing was moved aside


def test_a_small_file_that_declares_huge_arrays_is_refused_before_it_is_read(tmp_path):
    import tensorstore as ts

    ocp.PyTreeCheckpointer().save(tmp_path / "bomb", {"w": np.zeros(4, np.float32)})
    kv = {"driver": "ocdbt", "base": f"file://{tmp_path}/bomb/"}
    store = ts.KvStore.open(kv).result()
    header = json.loads(store["w/.zarray"])
    header["shape"] = header["chunks"] = [1 << 40]
    store["w/.zarray"] = json.dumps(header).encode()
    assert read_metadata(tmp_path / "bomb") == {"w": ((1 << 40,), np.dtype("float32"))}
    with pytest.raises(UserError, match=r"w is float32\[1099511627776\] in the checkpoint"):
        read_tree(tmp_path / "bomb", {"w": jnp.zeros(4)})


@pytest.mark.parametrize("kind", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_chunks_that_are_larger_than_their_array_are_refused_before_they_are_read(tmp_path, kind):
    import tensorstore as ts

    handler = ocp.PyTreeCheckpointHandler(**kind)
    ocp.Checkpointer(handler).save(
        tmp_path / "bomb", {"w": np.ones(4, np.float32), "v": np.ones(2)}
    )
    kv = f"file://{tmp_path}/bomb/"
    if kind.get("use_ocdbt", True):
        kv = {"driver": "ocdbt", "base": kv}
    store = ts.KvStore.open(kv).result()
    file = "w/zarr.json" if "use_zarr3" in kind else "w/.zarray"
    header = json.loads(store[file])
    if "use_zarr3" in kind:
        for grid in (header["chunk_grid"], header["codecs"][0]):
            grid["configuration"]["chunk_shape"] = [1 << 40]
    else:
        header["chunks"] = [1 << 40]
    store[file] = json.dumps(header).encode()
    with pytest.raises(finding.DamagedError, match="chunks of 4,398,046,511,104 bytes for w"):
        read_leaves(tmp_path / "bomb", ["w"])  # TensorStore would abort the process
    assert read_leaves(tmp_path / "bomb", ["v"])["v"].tolist() == [1, 1]


def test_reading_a_part(run):
    flat = flatten(make_state(3))
    metadata = read_metadata(f"{run}@latest")
    assert {k: (v.shape, v.dtype) for k, v in flat.items()} == metadata
    leaves = read_leaves(f"{run}@3", ["params/head/kernel", "opt_state/1/0/mu/head/bias"])
    assert set(leaves) == {"params/head/kernel", "opt_state/1/0/mu/head/bias"}
    assert (leaves["params/head/kernel"] == flat["params/head/kernel"]).all()
    with pytest.raises(KeyError, match="params/nothing"):
        read_leaves(f"{run}@3", ["params/nothing"])
    state = make_state(1)
    ema = read_tree(f"{run}@best", {"ema": jax.device_put(state.ema, mesh_of(4))})
    assert_same(ema, {"ema": state.ema})
    assert len(ema["ema"]["params"]["head"]["bias"].sharding.device_set) == 4


def test_opening_for_reading_makes_nothing(run):
    everything = lambda: sorted(map(str, run.rglob("*")))  # noqa: E731
    before = everything()
    assert finding.all_steps(run) == finding.all_steps(run / "checkpoints") == [1, 2, 3]
    assert (finding.latest_step(run), finding.best_step(run)) == (3, 1)
    assert finding.read_metrics(run, 2)["validation/accuracy"] == 0.5
    assert find_arrays(f"{run}@best") == run / "checkpoints/1/state"
    assert find_arrays(f"{run}@latest") == find_arrays(f"{run}@3") == run / "checkpoints/3/state"
    assert find_arrays(run / "checkpoints/2") == find_arrays(f"{run}@2")
    assert everything() == before
    empty = run.parent / "empty"
    assert finding.all_steps(empty) == []
    assert finding.latest_step(empty) is finding.best_step(empty) is None
    assert not empty.exists()


def test_sources_that_are_not_there(run):
    with pytest.raises(UserError, match="has no checkpoint '7'; it has best, latest, 1, 2, 3"):
        find_arrays(f"{run}@7")
    with pytest.raises(UserError, match="has no checkpoint 'bset'; it has best, latest, 1, 2, 3"):
        find_arrays(f"{run}@bset")
    with pytest.raises(UserError, match=r"no checkpoint or run .*rum'; did you mean 'run'\?"):
        find_arrays(run.parent / "rum")
    (run.parent / "empty@home").mkdir()
    with pytest.raises(UserError, match=r"empty@home holds no checkpoint \(yet\)"):
        find_arrays(run.parent / "empty@home")
    with pytest.raises(UserError, match="has no checkpoint 'best': it is not a run"):
        find_arrays(f"{run.parent}/empty@home@best")


def test_what_kill_9_left_is_cleared_away(run):
    left = run / "checkpoints/4.orbax-checkpoint-tmp"
    (left / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    assert finding.latest_step(run) == 3
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(4, make_state(4), host={})
        checkpoints.wait()
        assert checkpoints.latest_step() == 4
    assert not left.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, if the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_what_was_saved_stays(small_disk, capfd):
    rng = np.random.default_rng(0)
    small = {"w": rng.normal(size=100)}
    message = "cannot write a checkpoint into .*: no space left on device; .* run the same comm"

    def save_much():
        with Checkpoints(small_disk / "checkpoints") as checkpoints:
            checkpoints.save(1, small, host={})
            checkpoints.save(2, {"w": rng.normal(size=10**6)}, host={})

    with pytest.raises(UserError, match=message) as raised:
        save_much()
    assert "\n" not in str(raised.value)
    with Checkpoints(small_disk / "checkpoints") as checkpoints:
        state, _, step = checkpoints.restore(small)
        assert step == 1
        assert_same(state, small)
        checkpoints.save(2, {"w": rng.normal(size=10**6)}, host={})
        with pytest.raises(UserError, match=message):
            checkpoints.wait()
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_where_none_can_be_mounted(tmp_path, monkeypatch):
    def wait(self):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [28]")

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
        with pytest.raises(UserError, match="no space left on device"):
            checkpoints.wait()
    checkpoints.close()


def test_leaving_waits_and_does_not_hide_what_was_raised(tmp_path):
    def interrupted():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {"w": np.ones(1 << 20)}, host={})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert finding.all_steps(tmp_path) == [1]


def test_settings_are_checked(tmp_path):
    with pytest.raises(UserError, match="expected keep_latest of at least 1"):
        Checkpoints(tmp_path, keep_latest=0)
    with pytest.raises(UserError, match="got 2 and -1"):
        Checkpoints(tmp_path, keep_best=-1)
    with pytest.raises(UserError, match="expected best_mode 'max' or 'min', got 'lowest'"):
        Checkpoints(tmp_path, best_mode="lowest")
