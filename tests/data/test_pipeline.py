"""The order of examples depends only on seed and step, in memory and through Grain."""

import os
import runpy
import subprocess
import sys
import time

import numpy as np
import pytest

from flax_cnns.data import pipeline
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import ProcessLost, UserError
from tests.tiny_runs import ROOT


@pytest.fixture
def config(config):
    """Random 8x8 images: 40 to train, 8 to test. An epoch is not a whole number of batches."""
    config.mock, config.image_size, config.validation = 40, 8, 0
    config.batch_size, config.eval_batch_size = 12, 4
    return config


@pytest.fixture(params=["yes", "no"])
def both(request, config):
    """The config for data in memory, then for data through Grain."""
    config.in_memory = request.param
    return config


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert set(one) == set(other)
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


def numbers(config, batches):
    """Returns the indices of the training images in the batches."""
    images = load_dataset(config).splits["train"].images
    rows = {image.tobytes(): i for i, image in enumerate(images)}
    return [rows[image.tobytes()] for batch in batches for image in batch["image"]]


def test_nothing_is_dropped_and_every_epoch_has_its_own_order(both):
    dataset = load_dataset(both)
    batches = pipeline.train_batches(dataset, both, seed=0)
    got = take(batches, 10)  # three epochs
    both.in_memory = "yes"
    order = np.reshape(numbers(both, got), (3, 40))
    for epoch in order:
        assert sorted(epoch) == list(range(40))
    assert not np.array_equal(order[0], order[1])
    assert got[0]["image"].shape == (12, 8, 8, 1)
    assert got[0]["image"].dtype == np.uint8
    assert got[0]["label"].dtype == np.int32


def test_the_seed_decides(both):
    dataset = load_dataset(both)
    first, again, other = (
        take(pipeline.train_batches(dataset, both, seed=seed), 2) for seed in (0, 0, 1)
    )
    same(first, again)
    assert not np.array_equal(first[0]["image"], other[0]["image"])


def test_a_resumed_stream_is_the_same_to_the_bit(both):
    both.augment.random_resized_crop = (0.2, 1.0)  # done by the loader when streaming
    dataset = load_dataset(both)
    whole = take(pipeline.train_batches(dataset, both, seed=3), 9)
    same(whole[4:], take(pipeline.train_batches(dataset, both, seed=3, start_step=4), 5))


def test_in_memory_and_streamed_are_the_same(config):
    held = load_dataset(config)
    config.in_memory = "no"
    streamed = load_dataset(config)
    assert held.in_memory
    assert not streamed.in_memory
    same(*(take(pipeline.train_batches(d, config, seed=0), 5) for d in (held, streamed)))
    same(*(list(pipeline.eval_batches(d, "test", config)) for d in (held, streamed)))


def test_worker_processes_change_nothing(config):
    config.in_memory = "no"
    dataset = load_dataset(config)
    without = take(pipeline.train_batches(dataset, config, seed=0), 5)
    config.workers = 2
    # From another step: resuming works with any number of workers.
    batches = pipeline.train_batches(dataset, config, seed=0, start_step=2)
    same(without[2:], take(batches, 3))
    batches.close()


DYING = """
import multiprocessing, os, signal
from configs.common import get_config
from flax_cnns.data import pipeline
from flax_cnns.data.load import load_dataset
config = get_config().data
config.update(dict(mock=40, image_size=8, validation=0, batch_size=12, in_memory="no", workers=1))
config.augment.pad_crop = 0
batches = pipeline.train_batches(load_dataset(config), config, seed=0)
next(batches)
(worker,) = multiprocessing.active_children()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    os.kill(worker.pid, number)
for _ in range(6):
    next(batches)
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def shared_memory():
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


@pytest.mark.slow  # it kills processes
def test_workers_leave_signals_to_their_parent_and_die_with_it():
    before = shared_memory()
    command = [sys.executable, "-c", DYING]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline() or 0)
    try:
        rest, message = process.communicate(
            timeout=20
        )  # until all processes with these pipes have ended
    except subprocess.TimeoutExpired:
        os.kill(worker, 9)
        raise
    assert (process.returncode, rest, message) == (-9, "", "")
    left = shared_memory() - before
    deadline = time.monotonic() + 5  # other tests use shared memory too, for a while
    while left & shared_memory() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left & shared_memory()


@pytest.mark.parametrize(
    ("code", "message"),
    [(-9, "killed by SIGKILL, as the system does when memory runs out$"), (1, "ended with 1$")],
)
def test_a_worker_that_died_is_named(code, message):
    def batches():
        yield {}
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}.")

    alive = pipeline._from_workers(batches())
    assert next(alive) == {}
    with pytest.raises(ProcessLost, match=rf"\(data.workers\) (was )?{message}"):
        next(alive)


def test_a_script_that_workers_would_start_again_is_refused(tmp_path):
    call = "from flax_cnns.data import pipeline\n{}pipeline.check_main_guard(2)\n"
    script = tmp_path / "mine.py"
    script.write_text(call.format("if __name__ == '__main__':\n    "))
    runpy.run_path(str(script), run_name="__main__")
    script.write_text(call.format(""))
    with pytest.raises(UserError, match=r"mine.py, which would run again from line 2; .*__main__"):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_each_batch(both, processes):
    dataset = load_dataset(both)
    alone = take(pipeline.train_batches(dataset, both, seed=0), 4)
    together = [
        take(
            pipeline.train_batches(dataset, both, seed=0, process_index=i, process_count=processes),
            4,
        )
        for i in range(processes)
    ]
    joined = [{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*together)]
    same(alone, joined)


def test_a_batch_may_be_larger_than_the_training_set(config):
    config.batch_size = 100
    dataset = load_dataset(config)
    order = numbers(config, take(pipeline.train_batches(dataset, config, seed=0), 2))
    assert np.bincount(order).tolist() == [5] * 40


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("size", [4, 12])
def test_evaluation_sees_every_example_once(both, processes, size):
    both.eval_batch_size, both.mock = size, 45  # 9 to test
    dataset = load_dataset(both)
    batches = [
        list(pipeline.eval_batches(dataset, "test", both, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert {len(b) for b in batches} == {-(-9 // size)}
    joined = [{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*batches)]
    kept = np.concatenate([b["label"][b["mask"] == 1] for b in joined])
    both.in_memory = "yes"
    np.testing.assert_array_equal(kept, load_dataset(both).splits["test"].labels)
    for batch in joined:
        assert batch["mask"].dtype == np.float32
        assert not batch["image"][batch["mask"] == 0].any()


def test_streamed_crops_are_random_and_belong_to_their_place(config):
    config.in_memory, config.batch_size = "no", 40
    dataset = load_dataset(config)
    plain = take(pipeline.train_batches(dataset, config, seed=0), 1)[0]
    config.augment.random_resized_crop = (0.1, 0.5)
    dataset = load_dataset(config)
    epochs = take(pipeline.train_batches(dataset, config, seed=0), 2)
    assert not np.array_equal(plain["image"], epochs[0]["image"])
    np.testing.assert_array_equal(plain["label"], epochs[0]["label"])
    config.threads = 7
    same(epochs, take(pipeline.train_batches(dataset, config, seed=0), 2))


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size"])
def test_batches_that_do_not_divide(config, name):
    config[name] = 7
    dataset = load_dataset(config)
    make = {
        "batch_size": lambda: pipeline.train_batches(dataset, config, seed=0, process_count=2),
        "eval_batch_size": lambda: pipeline.eval_batches(dataset, "test", config, process_count=2),
    }
    with pytest.raises(UserError, match=rf"data\.{name} must be a positive multiple .* 2; got 7"):
        make[name]()


def test_a_missing_split_is_named(config):
    with pytest.raises(UserError, match="no 'validation' split; it has: test, train"):
        pipeline.eval_batches(load_dataset(config), "validation", config)
