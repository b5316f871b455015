"""Sets up all tests: four simulated CPU devices, and one compilation cache for all processes.

Fixtures: the digits, prepared once per worker, and a finished run that many tests share."""

import gc
import os
import signal
import tempfile

import pytest

# Set before the first import of JAX. The workers of pytest-xdist inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAG = "--xla_force_host_platform_device_count=4"
QUICK = "--xla_backend_optimization_level=0"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="flax_cnns_test_cache_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# A shell ignores SIGINT in background processes, and their children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Turns off optimizations of the compiler in the default tier. Compiling then takes two thirds
    of the time, and programs have the same operations in the same order. `-m slow` compiles as
    users do."""
    if config.option.markexpr == "not slow" and QUICK not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {QUICK}"


def pytest_collection_finish():
    """Collects garbage rarely, and not among imported objects. Tracing makes many small objects,
    and a quarter of its time was spent on garbage collection."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


MAX_MEMORY = 3 * 2**30  # bytes per worker


def pytest_runtest_teardown(item, nextitem):
    """Clears JAX's caches between two files if a worker uses too much memory. After a thousand
    tests of networks, the caches hold gigabytes of traces and programs."""
    if nextitem is None or nextitem.path == item.path or not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > MAX_MEMORY:
        import jax

        jax.clear_caches()
        gc.collect()


# Files that take minutes in the slow tier. They start first, so that no worker ends with one.
LONGEST = ("tests/test_processes.py", "tests/test_scripts.py", "tests/test_examples.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


# Files whose tests share one finished run. One worker makes the run and has all of these files.
TOGETHER = {
    "tests/config/test_effects.py": "runs",
    "tests/evaluation/test_crops.py": "runs",
    "tests/runs/test_calibration.py": "runs",
    "tests/runs/test_classifier.py": "runs",
    "tests/runs/test_evaluate_set.py": "runs",
    "tests/runs/test_compare_images.py": "runs",
    "tests/runs/test_error_page.py": "runs",
    "tests/runs/test_layer_table.py": "runs",
    "tests/runs/test_patches.py": "runs",
    "tests/runs/test_evaluate_models.py": "runs",
    "tests/runs/test_predict.py": "runs",
    "tests/runs/test_profile.py": "runs",
    "tests/runs/test_train.py": "runs",
    "tests/runs/test_visualize_activations.py": "runs",
    "tests/runs/test_visualize_landscape.py": "runs",
    "tests/runs/test_visualize.py": "runs",
}
# The contract of all networks. Each family goes to the worker that has the tests of that family.
CONTRACT = "tests/models/test_contract.py"


def pytest_xdist_make_scheduler(config, log):
    """Sends all tests of a file to one worker, which compiles and prepares once for all of them.

    `xdist_group` marks would do the same, but have no effect since pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            if file == CONTRACT and "[" in test:  # test_name[family/network]
                file = f"tests/models/test_{test.partition('[')[2].partition('/')[0]}.py"
            return TOGETHER.get(file, file)

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """Returns a TFDS data_dir. The first test that loads the digits prepares them there."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def config(digits_dir):
    """Returns a config of a dozen steps of LeNet-5 on the digits, which a test may change."""
    from tests.tiny_runs import make_config  # imports JAX, so after the environment is set

    return make_config(digits_dir)


@pytest.fixture(scope="session")
def finished(digits_dir, tmp_path_factory):
    """Returns (workdir, summary) of an uninterrupted run, the reference for other runs."""
    from flax_cnns import run
    from tests.tiny_runs import make_config

    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(make_config(digits_dir), workdir)


@pytest.fixture
def no_pictures(monkeypatch):
    """Makes runs draw no curves, which take a quarter of the time of a short run."""
    monkeypatch.setattr("flax_cnns.analysis.plots.curves.draw_curves", lambda *_, **__: None)
