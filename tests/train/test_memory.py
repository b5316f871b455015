"""Memory checks: XLA's count of needed bytes, against the bytes that the system has free."""

import jax
import jax.numpy as jnp
import pytest

from flax_cnns.errors import UserError
from flax_cnns.train import memory


def test_the_need_of_a_step_is_what_xla_counts_and_asking_compiles_it_once():
    traced = []

    @jax.jit
    def step(state, batch, key):
        traced.append(1)
        return state + jnp.sort(batch @ batch.T, axis=0)[::2].sum()

    arguments = jnp.zeros(()), jnp.ones((1024, 4)), None
    assert memory.needed(step, *arguments) >= 1024 * 1024 * 4
    step(*arguments)
    assert len(traced) == 1
    # Not a jitted function: unknown.
    assert memory.needed(lambda state, batch, key: state, *arguments) == 0


def test_what_cannot_be_had_is_refused_with_the_field_and_both_numbers(monkeypatch):
    assert memory.available() > 2**20
    monkeypatch.setattr(memory, "available", lambda: 3 * 2**30)
    memory.check_fits(3 * 2**30, what="data.batch_size=8")
    with pytest.raises(UserError, match=r"data.batch_size=9: .* needs 3.5 GiB .* 3.0 GiB are free"):
        memory.check_fits(int(3.5 * 2**30), what="data.batch_size=9")
    monkeypatch.setattr(memory, "available", lambda: None)  # a system that does not report it
    assert memory.fits(2**60)


def test_the_least_of_the_limits_counts(monkeypatch):
    def table(file):
        if "meminfo" in str(file):
            return {"MemAvailable": 4 * 2**20, "SwapFree": 2**20}
        return {"VmSize": 2**20} if "status" in str(file) else {}

    monkeypatch.setattr(memory, "_table", table)
    limits = {"limit": memory.resource.RLIM_INFINITY}
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (limits["limit"], 0))
    assert memory.available() <= 5 * 2**30
    limits["limit"] = 3 * 2**30
    assert memory.available() <= 2 * 2**30
