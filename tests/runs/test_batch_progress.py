"""Lines of progress of a long evaluation."""

from __future__ import annotations

import io

import numpy as np

from flax_cnns.runs import batch_progress


def test_the_time_left_is_that_of_the_remaining_images(monkeypatch):
    # The first batch compiles: 15 s. Then a batch of 10 images takes 10 s.
    times = iter([0.0, 0.0, 15.0, 25.0, 35.0, 60.0])
    monkeypatch.setattr(batch_progress.time, "monotonic", lambda: next(times))
    batches, file = [{"label": np.zeros(10)}] * 5, io.StringIO()
    found = list(batch_progress.report_batches(iter(batches), 47, "test", file=file))
    assert len(found) == 5
    # After 20 s, then after 30 more: 20 images were done at 25 s, of which 10 after compiling.
    assert file.getvalue() == (
        "test: 20 of 47 images, 1 images/s, ETA 0:00:27\n"
        "test: 40 of 47 images, 1 images/s, ETA 0:00:10\n"
    )
