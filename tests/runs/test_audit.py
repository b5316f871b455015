"""`audit`: the real step of a config, lowered for a TPU; and the table of families."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from flax_cnns.analysis import audit as checks
from flax_cnns.analysis.audit import Finding
from flax_cnns.errors import UserError
from flax_cnns.models import registry
from flax_cnns.runs import audit, audit_table, target_table
from flax_cnns.runs.audit import StepAudit
from flax_cnns.runtime import topologies
from flax_cnns.runtime.topologies import CompileTarget

TARGET = CompileTarget("tpu-2", "tpu", "2", 2, 2**30, 1e12)
TINY = audit_table.AuditedNetwork("cifar_resnet20", 8, {"depths": (1, 1, 1)})


def test_the_real_step_for_a_tpu():
    """Synchronized and not: a stem, three blocks of two; a shortcut without norms."""
    config = audit_table.make_config(TINY, 2)
    result = audit.audit_traces(audit.trace_config(config, jax.devices()[:2]), TARGET)
    assert result == StepAudit((), 7, False, None, None)
    assert [result.judge(check) for check in checks.CHECKS] == ["yes"] * 6 + [""] * 4
    assert "yes          products: no conv" in audit.format_audit(result)


def test_a_step_that_calls_the_host_is_not_lowered():
    step = SimpleNamespace(state={"a": 0})
    traced = jax.jit(lambda x: (jax.debug.print("{}", x), x)[1]).trace(0)
    traces = audit.ConfigTraces(SimpleNamespace(), 3, {False: (step, traced)})
    result = audit.audit_traces(traces, TARGET, compile=True)
    assert [one.check for one in result.findings] == ["callbacks"]
    judged = {check: result.judge(check) for check in checks.CHECKS}
    assert {check for check, verdict in judged.items() if verdict} == {"callbacks", "one_trace"}
    assert (judged["callbacks"], judged["one_trace"]) == ("no", "yes")


def test_every_family_has_a_network():
    families = {family.__name__.rpartition(".")[2] for family in registry.FAMILIES}
    assert set(audit_table.NETWORKS) == families
    for family, network in audit_table.NETWORKS.items():
        variant, module = registry._MODELS[network.name]
        assert module.__name__.endswith(f".{family}")
        registry.create_model(network.name, **network.fields)
        assert variant.func


def test_norms_of_stacked_blocks_count_one_by_one():
    leaf = jax.ShapeDtypeStruct((4,), float)
    stacked = jax.ShapeDtypeStruct((3, 4), float)
    stats = {"a": {"mean": leaf, "var": leaf}, "b": {"mean": stacked, "var": stacked}}
    assert audit.count_norms(stats) == 4
    assert audit.count_norms({}) == 0


class AuditedNames(list):
    """The networks that were audited; `traced` are those that were traced."""


@pytest.fixture
def audited(monkeypatch):
    """The networks that were audited, by a made-up audit in which lenet5 fails."""
    names, traced = AuditedNames(), []
    names.traced = traced

    def trace(config, devices):
        traced.append(config.model.name)
        return audit.ConfigTraces(config, 3, {})

    def pretend(traces, target, *, compile):
        name = traces.config.model.name
        names.append(name)
        bad = (Finding("callbacks", "python_callback", "conv1"),) * 5
        findings = bad if name == "lenet5" else ()
        return StepAudit(findings, 3, compile, 7 if compile else None, 2**20 if compile else None)

    monkeypatch.setattr(audit_table, "trace_config", trace)
    monkeypatch.setattr(audit_table, "audit_traces", pretend)
    monkeypatch.setattr(audit_table, "check_compiler", lambda target: "compiler 1")
    return names


def write(path, *families, targets=(TARGET,), **options):
    return audit_table.write_table(
        str(path), targets, families, devices=[0, 1], say=lambda text: None, **options
    )


def test_the_table_goes_on_where_it_ended(tmp_path, audited, monkeypatch):
    path = tmp_path / "audit.csv"
    write(path, "vit")
    write(path, "vit", "dsn")
    assert audited == ["vit_tiny_patch16_224", "dsn"]
    write(path, "dsn", targets=[TARGET._replace(name="other")])
    (row,) = write(path, "dsn", compile=True)  # was not compiled
    assert (row["aliased"], row["compiled_all_reduces_count"]) == ("yes", "7")
    assert row["temporaries_mib"] == "1.00"
    write(path, "dsn")  # a compiled row has more than is asked for
    assert audited == ["vit_tiny_patch16_224", "dsn", "dsn", "dsn"]
    assert set(target_table.read_rows(str(path), audit_table.COLUMNS, "model")) == {
        *(("vit_tiny_patch16_224", "tpu-2"), ("dsn", "tpu-2"), ("dsn", "other"))
    }
    monkeypatch.setattr(audit_table, "find_versions", lambda: {"flax_cnns (code)": "changed"})
    write(path, "dsn")
    assert len(audited) == 5


def test_several_targets_share_a_trace(tmp_path, audited):
    targets = [TARGET, TARGET._replace(name="other"), TARGET._replace(name="one", devices=1)]
    rows = write(tmp_path / "audit.csv", "dsn", targets=targets)
    assert [(row["topology"], row["batch"]) for row in rows] == [
        *(("tpu-2", "4"), ("other", "4"), ("one", "2"))
    ]
    assert audited.traced == ["dsn", "dsn"]
    with pytest.raises(UserError, match="--compile: expected one --topology"):
        audit.make_audit_devices(targets, compile=True)


def test_a_failed_check_names_network_operation_and_module(tmp_path, audited):
    rows = write(tmp_path / "audit.csv", "dsn", "lenet")
    with pytest.raises(UserError, match=r"1 of 2 networks .*; the first is lenet5: callbacks"):
        audit_table.raise_if_failed(rows)
    audit_table.raise_if_failed(rows[:1])
    lines = audit_table.format_table(rows).splitlines()
    assert lines[0].split()[:4] == ["family", "model", "topology", "norms"]
    assert lines[1].split()[4:] == ["yes"] * 6 + ["-"] * 5
    assert lines[2].endswith("python_callback in conv1; 2 more")


def test_what_the_table_refuses(tmp_path, audited):
    with pytest.raises(UserError, match="unknown 'resnt'; did you mean 'resnet'"):
        write(tmp_path / "audit.csv", "resnt")
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="is not a table of this command"):
        write(tmp_path / "other.csv", "dsn")
    assert audited == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_cifar_resnet20_compiled_for_a_tpu():
    target = topologies.find_target("v5e-4")
    config = audit_table.make_config(audit_table.NETWORKS["cifar_resnet"], target.devices)
    traces = audit.trace_config(config, topologies.make_devices(target))
    result = audit.audit_traces(traces, target, compile=True)
    assert result.findings == ()
    # 19 norms forward and backward, except that the stem's last is with the gradients.
    assert 2 * 19 - 1 <= result.all_reduces <= 2 * 19 + checks.STEP_ALL_REDUCES
