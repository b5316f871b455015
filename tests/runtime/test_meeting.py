"""Threads stand for processes; tests/runtime/test_preflight.py has real ones."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from flax_cnns.errors import UserError
from flax_cnns.runtime.meeting import Meeting


def find_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meet(bodies, *, counts=None, indices=None, seconds=5.0, addresses=None):
    """Runs `bodies[i](meeting)` in a thread for each process. Returns their results or errors."""
    address = f"127.0.0.1:{find_port()}"
    results = [None] * len(bodies)

    def run(i):
        count = (counts or {}).get(i, len(bodies))
        index = (indices or {}).get(i, i)
        try:
            where = (addresses or {}).get(i, address)
            with Meeting(where, count, index, seconds=seconds) as meeting:
                results[i] = bodies[i](meeting)
        except UserError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(bodies))]
    for thread in reversed(threads):  # process 0 comes last
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    return results, address


def test_everyone_gets_all_messages_in_order():
    def twice(meeting):
        first = meeting.exchange({"index": meeting.index})
        return first + meeting.exchange({"text": "é\n" * 40_000, "of": meeting.index})

    results, _ = meet([twice] * 3)
    assert results[0] == results[1] == results[2]
    assert [each["index"] for each in results[0][:3]] == [0, 1, 2]
    assert [each["of"] for each in results[0][3:]] == [0, 1, 2]
    assert results[0][5]["text"] == "é\n" * 40_000


def test_alone_nothing_is_opened():
    with Meeting("", 1, 0) as meeting:
        assert meeting.exchange({"a": 1}) == [{"a": 1}]


def test_an_address_that_nobody_answers():
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^process 1 \(on .*\): nobody answers at 127\.0\.0\.1:1"):
        Meeting("127.0.0.1:1", 2, 1, seconds=0.3)
    assert time.monotonic() - began < 3


def test_a_process_that_does_not_come_is_named_to_all():
    results, address = meet(
        [lambda m: None] * 3, addresses={2: f"127.0.0.1:{find_port()}"}, seconds=0.6
    )
    said = f"process 2 of 3 did not come to {address} within 0.6 s"
    assert said in str(results[0])
    assert str(results[1]) == said
    assert "process 2 (on" in str(results[2])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts": {1: 3}}, "process 1 says that there are 3 processes, process 0 2"),
        ({"indices": {1: 5}, "counts": {1: 2}}, "two processes say that they are process 5 of 2"),
    ],
)
def test_processes_that_are_counted_differently(changes, said):
    results, _ = meet([lambda m: None] * 2, seconds=1.0, **changes)
    assert str(results[0]) == said
    assert "process 0 at" in str(results[1])


def test_a_process_that_leaves_or_hangs_is_named():
    results, _ = meet([lambda m: m.exchange({}), lambda m: None], seconds=2.0)
    assert str(results[0]) == "process 1 ended or did not answer in time"

    def hang(meeting):
        time.sleep(0.6)
        return meeting.exchange({})

    results, _ = meet([lambda m: m.exchange({}, seconds=0.2), hang, lambda m: m.exchange({})])
    assert str(results[0]) == "process 1 ended or did not answer in time"
    assert str(results[2]) == "process 1 ended or did not answer in time"


def test_a_port_in_use_and_a_scanner():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"process 0 cannot open port {port}: Address already in use;"
        ):
            Meeting(f"127.0.0.1:{port}", 2, 0, seconds=0.3)

    port = find_port()

    def scan():
        time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        Meeting(f"127.0.0.1:{port}", 2, 1, seconds=2.0).close()

    scanner = threading.Thread(target=scan)
    scanner.start()
    Meeting(f"127.0.0.1:{port}", 2, 0, seconds=3.0).close()
    scanner.join()
