from __future__ import annotations

import threading
import time

import pytest

from flax_cnns.train.loop import prefetch


def test_prefetch_gives_the_same_items_and_works_ahead():
    made = []

    def items():
        for i in range(5):
            made.append(i)
            yield i

    ahead = prefetch(items(), size=2)
    assert next(ahead) == 0
    deadline = time.time() + 5
    while len(made) < 3 and time.time() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3
    assert list(ahead) == [1, 2, 3, 4]


def test_prefetch_raises_what_the_iterator_raised_in_its_place():
    def items():
        yield 1
        raise OSError("cat.jpg is truncated")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match=r"cat\.jpg is truncated"):
        next(ahead)


def test_prefetch_leaves_no_thread_behind():
    def endless():
        while True:
            yield 0

    before = threading.active_count()
    ahead = prefetch(endless())
    next(ahead)
    ahead.close()
    assert threading.active_count() == before
