"""What a stage's buffers were before each mini-batch in flight, of runs that were resumed, and resumed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.snapshots import Snapshots


def counter() -> tuple[nn.Module, Snapshots]:
    root = nn.Module()
    root.register_buffer("count", torch.zeros(()))
    cut = Cut(starts=("block",), steps={}, buffer_homes={"count": 0})
    return root, Snapshots(root, cut, 0)


def forward(root: Any, snapshots: Snapshots, number: int) -> None:
    snapshots.before(number)
    root.count += 1


def counts(snapshots: Snapshots) -> list[float]:
    return [float(moment["count"]) for moment in snapshots.in_flight()]


def test_a_resumed_run_that_gets_no_new_mini_batch_is_saved_with_what_is_in_flight() -> None:
    """Of two in flight it saved one moment, so that the next resume counted a mini-batch twice."""
    root, snapshots = counter()
    for number in range(3):
        forward(root, snapshots, number)
    snapshots.forget(0)
    assert counts(snapshots) == [1, 2, 3]

    again, resumed = counter()
    resumed.put_back(snapshots.in_flight())
    assert counts(resumed) == [1, 2, 3]
    forward(again, resumed, 0)
    forward(again, resumed, 1)
    assert float(again.count) == 3
    assert counts(resumed) == [1, 2, 3]
    # The first is backwarded, and the data has no more.
    resumed.forget(0)
    assert counts(resumed) == [2, 3]


def test_what_was_put_back_and_not_written_since_is_saved_again() -> None:
    """A file may have another number for it: that of the pipeline beside this one."""
    again, resumed = counter()
    resumed.put_back([{"count": torch.ones(())}])
    resumed.before(0)
    assert float(again.count) == 1
    assert counts(resumed) == [1, 1]
