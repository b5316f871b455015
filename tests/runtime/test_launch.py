import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from flax_cnns.errors import UserError
from flax_cnns.runtime import cluster, launch

ROOT = Path(__file__).parents[2]


def start(code: str, *flags: str, count: int = 2) -> subprocess.Popen:
    """Starts the launcher with a Python script instead of a training run."""
    launcher = [sys.executable, "-m", "flax_cnns.launch", f"--local={count}", *flags, "--"]
    return subprocess.Popen(
        [*launcher, sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err


# ---- how a process finds the others


def test_explicit_settings_go_before_the_environment():
    settings = launch.read_settings
    environment = {
        launch.COORDINATOR: "10.0.0.1:1234",
        launch.NUM_PROCESSES: "8",
        launch.PROCESS_ID: "3",
    }
    assert settings(None, None, None, {}) is None
    assert settings(None, None, None, dict.fromkeys(environment, "")) is None
    assert settings(None, None, None, environment) == ("10.0.0.1:1234", 8, 3)
    assert settings("a:1", 2, 0, environment) == ("a:1", 2, 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("a:1", 2, None), "FLAX_CNNS_PROCESS_ID missing; set all three or none"),
        ((None, 2, 0), "FLAX_CNNS_COORDINATOR missing"),
        (("a:1", 2, 2), "FLAX_CNNS_PROCESS_ID from 0 to FLAX_CNNS_NUM_PROCESSES - 1; got"),
        (("a:1", "two", 0), "FLAX_CNNS_NUM_PROCESSES=two"),
        (("here", 2, 0), "expected FLAX_CNNS_COORDINATOR=host:port"),
    ],
)
def test_settings_that_make_no_sense(given, words):
    with pytest.raises(UserError) as raised:
        launch.read_settings(*given, {})
    assert words in str(raised.value)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "2"}, "SLURM"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),  # a single task
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # a shell inside an allocation
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:2"},
            "Open MPI",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (KUBERNETES, None),  # a notebook's pod
        ({**KUBERNETES, "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, "TPU"),
    ],
)
def test_clusters(environment, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no TPU here
    assert launch.find_cluster(environment) == name
    assert cluster.is_one_of_several(environment) == (name is not None)


def test_one_of_several_processes(monkeypatch):
    """A machine with TPUs may be one of a pod or alone; it is alone unless it names others."""
    monkeypatch.setattr(cluster, "find_cluster", lambda environment: "TPU")
    assert not cluster.is_one_of_several({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert cluster.is_one_of_several({"TPU_PROCESS_ADDRESSES": "a:1,b:1"})
    for count, expected in (("2", True), ("1", False)):
        given = {cluster.COORDINATOR: "a:1", cluster.NUM_PROCESSES: count}
        assert cluster.is_one_of_several(given) == expected


def test_an_open_mpi_that_jax_cannot_read():
    with pytest.raises(UserError, match="Open MPI started 4 processes but does not say where"):
        launch.find_cluster({"OMPI_COMM_WORLD_SIZE": "4"})


def test_alone_nothing_happens(monkeypatch):
    import jax

    for name in (launch.COORDINATOR, launch.NUM_PROCESSES, launch.PROCESS_ID, *SLURM, *KUBERNETES):
        monkeypatch.delenv(name, raising=False)
    launch.initialize()
    launch.initialize("127.0.0.1:1", 1, 0)
    launch.check_processes_agree("{}", what="the config", fix="mend it")
    launch.exit_if_distributed(3)
    assert not jax.distributed.is_initialized()
    assert sys.excepthook is not launch._leave_at_once


# ---- several processes on this machine


@pytest.mark.slow
def test_two_processes_add_up_and_compare_their_configs():
    code, _, err = finish(
        start(
            """
            import sys
            from flax_cnns.runtime import cluster, launch
            assert "jax" not in sys.modules
            launch.initialize()
            launch.initialize()  # again: nothing
            import jax
            import jax.numpy as jnp
            from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
            n = jax.device_count()
            mesh = jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,))
            add = jax.shard_map(
                lambda x: jax.lax.psum(x, "batch"), mesh=mesh, in_specs=P("batch"), out_specs=P()
            )
            x = jax.make_array_from_callback(
                (n,), NamedSharding(mesh, P("batch")), lambda i: jnp.arange(1.0, n + 1)[i]
            )
            total = float(jax.jit(add)(x).addressable_data(0)[0])
            say = lambda *words: print(*words, file=sys.stderr)  # gloo writes into stdout's lines
            say("result", jax.process_index(), jax.process_count(), n, total)
            launch.check_processes_agree("same", what="the config", fix="mend it")
            try:
                seed = f"seed {jax.process_index()}"
                launch.check_processes_agree(seed, what="the config", fix="mend it")
            except ValueError as error:
                say(error)
            sys.exit(75)
            """,
            "--devices=2",
        )
    )
    assert code == 75, err  # saved and stopped: not a failure
    for index in (0, 1):
        assert f"[{index}] result {index} 2 4 10.0\n" in err
        assert (
            f"[{index}] the processes disagree about the config: process 1 of 2 differs from"
            " process 0; mend it\n"
        ) in err
    assert "failed" not in err


def in_this_process(code: str, capsys, count: int = 2) -> tuple[int, list[str], str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = launch.main([f"--local={count}", "--", *command])
    out, err = capsys.readouterr()
    return result, out.splitlines(), err


def test_the_first_failure_is_named_and_its_code_returned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    script = f"""
        import os, pathlib, subprocess, sys, time
        index = int(os.environ["{launch.PROCESS_ID}"])
        mark = pathlib.Path({str(tmp_path)!r}, "up")
        if index == 1:
            while not mark.exists():
                time.sleep(0.01)
            print("no newline", end="")
            sys.exit("error: what went wrong\\nand where")
        if index == 0:
            print("still here")
            mark.touch()
            subprocess.run(["sleep", "30"])  # which must not outlive us
        """
    began = time.monotonic()
    code, out, err = in_this_process(script, capsys, count=3)
    assert code == 1
    assert sorted(out) == ["[0] still here", "[1] no newline"]
    assert "[1] error: what went wrong\n[1] and where\n" in err
    assert "[launch] process 1 failed first, with exit code 1\n" in err
    assert err.endswith("\n[launch] process 1: error: what went wrong\n")
    assert 0.5 < time.monotonic() - began < 20


@pytest.mark.slow
def test_a_process_that_raises_does_not_wait_for_the_others(monkeypatch, capsys):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    script = """
        from flax_cnns.runtime import cluster, launch
        launch.initialize()
        import jax, time
        if jax.process_index() == 0:
            time.sleep(60)
        raise RuntimeError("lost")
        """
    code, _, err = in_this_process(script, capsys)
    assert code == 1
    assert "[1] RuntimeError: lost" in err
    assert "[launch] process 1 failed first, with exit code 1" in err


def test_death_by_a_signal():
    code, _, err = finish(start("import os; os.kill(os.getpid(), 9)", count=1))
    assert code == 128 + 9
    assert "[launch] process 0 failed first, by SIGKILL" in err


def test_a_process_that_was_killed_is_named_last(monkeypatch, capsys):
    """The line about it comes after the errors of the others, even if all end at the same time."""
    script = f"""
        import os, sys
        if os.environ["{launch.PROCESS_ID}"] == "1":
            os.kill(os.getpid(), 9)
        print("Fatal: a peer is gone", file=sys.stderr)
        sys.exit(1)
        """
    children: list[subprocess.Popen] = []

    def start_child(*arguments, **options):
        children.append(subprocess.Popen(*arguments, **options))
        return children[-1]

    def wait_for_all(_: float) -> None:
        for child in children:  # their exit codes stay to be read
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    clock = types.SimpleNamespace(sleep=wait_for_all, monotonic=time.monotonic)
    starter = types.SimpleNamespace(Popen=start_child, PIPE=subprocess.PIPE)
    monkeypatch.setattr(launch, "time", clock)
    monkeypatch.setattr(launch, "subprocess", starter)
    code, _, err = in_this_process(script, capsys)
    assert code == 128 + 9
    assert err.endswith(
        "\n[launch] process 1 failed first, by SIGKILL, as the system does when memory runs out;"
        " the same command continues from a checkpoint\n"
    )


def test_what_jax_says_of_a_lost_process(monkeypatch):
    import jax

    text = "UNKNOWN: Gloo AllGather failed: Connection closed by peer\nand more"
    assert launch.describe_lost_peer(ValueError(text)) == ""  # there are no other processes
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert launch.describe_lost_peer(ValueError(text)) == text.partition("\n")[0]
    assert launch.describe_lost_peer(ValueError("a shape")) == ""
    assert launch.describe_lost_peer(None) == ""


@pytest.mark.parametrize(
    ("number", "left"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)]
)
def test_signals_reach_every_process(number, left):
    process = start(
        f"""
        import signal, sys, time
        def leave(*_):
            print("asked", flush=True)
            sys.exit({left})
        signal.signal({int(number)}, leave)
        print("ready", flush=True)
        for _ in range(600):  # a signal just before a sleep does not end it
            time.sleep(0.1)
        """
    )
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, sorted(out)) == (left, ["[0] asked", "[1] asked"])
    assert "failed" not in err


def test_a_command_that_is_not_there(capfd):
    assert launch.main(["--local=2", "--", "no-such-command"]) == 2
    assert capfd.readouterr().err == (
        "error: cannot start 'no-such-command': No such file or directory\n"
    )


def test_logs_in_a_bucket_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["--logs=gs://bucket/logs", "--", "true"]) == 2
    assert "error: --logs: gs://bucket/logs is an address" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--local=2"], "the command is missing"),
        (["--local=2", "--"], "the command is missing"),
        (["--local=0", "--", "true"], "must be at least 1"),
        (["--local=2", "--devices=0", "--", "true"], "must be at least 1"),
        (["--local=x", "--", "true"], "invalid int value"),
        (["--", "true"], "one of these is required: --local, --check, --logs"),
        (["--locale=2", "--", "true"], "unrecognized arguments: --locale=2"),
        (["--workdir=x", "--", "true"], "--workdir belongs to the command"),
        (["--check", "--workdir=x", "--", "true"], "--workdir belongs to the command"),
    ],
)
def test_the_command_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as raised:
        launch.main(arguments)
    assert raised.value.code == 2
    assert words in capsys.readouterr().err


def test_the_command_may_have_a_dash_dash_of_its_own(capfd):
    code = "import sys; print(sys.argv[1:])"
    assert launch.main(["--local=1", "--", sys.executable, "-c", code, "--", "--local=3"]) == 0
    assert capfd.readouterr().out == "[0] ['--', '--local=3']\n"


def test_the_environment_of_a_process():
    before = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8 --b", "HOME": "/home/x"}
    after = launch.make_local_environment(before, 99, 4, 2, devices=3)
    assert after["XLA_FLAGS"].split() == [
        "--a=1",
        "--b",
        "--xla_force_host_platform_device_count=3",
    ]
    assert (after["JAX_PLATFORMS"], after["HOME"]) == ("cpu", "/home/x")
    assert (after[launch.COORDINATOR], after[launch.PROCESS_ID]) == ("127.0.0.1:99", "2")
    assert "JAX_PLATFORMS" not in launch.make_local_environment({}, 99, 4, 2, devices=None)


def test_the_launcher_itself_imports_neither_jax_nor_numpy():
    code = (
        "import sys, flax_cnns.runtime.launch; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_pod.sh"])
def test_templates_are_shell_scripts(name):
    subprocess.run(["bash", "-n", ROOT / "experiments/launch" / name], check=True)


def test_the_slurm_template_asks_for_the_next_turn(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\nexit 75\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho scontrol "$@"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "experiments/launch/slurm.sbatch", "--workdir=a b"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75
    assert done.stdout == (
        "--label python -m experiments.train --workdir=a b\nscontrol requeue 12\n"
    )


@pytest.mark.slow
def test_keep_memory():
    """Freed memory is kept. Without `keep_memory`, 200 MB return to the system at once."""
    code = (
        "import resource, numpy as np, sys\n"
        "from flax_cnns.runtime import launch\n"
        "kept = launch.keep_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    np.ones(2 * 10**7)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\n"
        "print(int(kept), faults())\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    found = {}
    for name, environment in (("kept", clean), ("own", {**clean, "MALLOC_ARENA_MAX": "8"})):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        kept, found[name] = map(int, run.stdout.split())
        if name == "kept" and not kept:
            pytest.skip("the C library is not glibc")
        assert kept == (name == "kept")
    assert found["kept"] < 100 < found["own"]
