"""Four fake CPU devices for every test, one compilation cache for all workers and their
subprocesses; the digits, prepared once a worker; a run that many tests look at."""

import gc
import os
import signal
import tempfile

import pytest

# Before the first import of JAX; the workers of pytest-xdist inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAG = "--xla_force_host_platform_device_count=4"
QUICK = "--xla_backend_optimization_level=0"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="flax_cnns_test_cache_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# A shell ignores SIGINT in what it starts in the background, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """The default tier spends two thirds of the compiler's time, for the same operations in the
    same order; `-m slow` compiles as users do."""
    if config.option.markexpr == "not slow" and QUICK not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {QUICK}"


def pytest_collection_finish():
    """Looks for garbage seldom, and not among what was imported: that took a quarter of the time of
    tracing, which makes many small objects."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


MOST_MEMORY = 3 * 2**30  # bytes of a worker


def pytest_runtest_teardown(item, nextitem):
    """Forgets traces and programs between two files once a worker holds too much: they stay in
    JAX's caches, gigabytes of them after a thousand tests of networks."""
    if nextitem is None or nextitem.path == item.path or not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY:
        import jax

        jax.clear_caches()
        gc.collect()


# Files that take minutes in the slow tier. They come first, so that no worker is left with one.
LONGEST = ("tests/test_processes.py", "tests/test_scripts.py", "tests/test_examples.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


# Files whose tests look at one finished run: the worker that makes it has all of them.
TOGETHER = {
    "tests/config/test_effects.py": "runs",
    "tests/runs/test_predict.py": "runs",
    "tests/runs/test_train.py": "runs",
}
# What all networks promise: each family goes to the worker that has its own tests.
CONTRACT = "tests/models/test_contract.py"


def pytest_xdist_make_scheduler(config, log):
    """A file's tests go to one worker, which compiles and prepares once for all of them.

    Marks with `xdist_group` would say the same, but have no effect since pytest 9.2."""
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
    """A TFDS data_dir in which the first test to load the digits prepares them."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def config(digits_dir):
    """A dozen steps of LeNet-5 on the digits, for a test to change."""
    from tests.tiny_runs import make_config  # JAX is imported after the environment is set

    return make_config(digits_dir)


@pytest.fixture(scope="session")
def finished(digits_dir, tmp_path_factory):
    """(workdir, summary) of the run that the others are held against, never interrupted."""
    from flax_cnns import run
    from tests.tiny_runs import make_config

    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(make_config(digits_dir), workdir)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no curves, which takes a quarter of a short one; `finished` has them."""
    monkeypatch.setattr("flax_cnns.analysis.plots.curves.draw_curves", lambda *_, **__: None)
