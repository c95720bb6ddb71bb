"""After a failed fit, the process that launched it is as it was, and can fit again."""

from __future__ import annotations

import os
import threading

import pytest
import torch.distributed as dist

from lightning_cpipe.errors import RankLostError
from tests.helpers.scripts import AT, MESSAGE, fit


@pytest.mark.parametrize("kind", ["raise", pytest.param("kill", marks=pytest.mark.full)])
def test_a_failed_fit_can_be_caught_and_followed_by_another(kind: str) -> None:
    environment = dict(os.environ)
    threads = threading.enumerate()
    with pytest.raises(RankLostError, match=rf"stage 1 \(rank 0\) failed: .*at mini-batch {AT}") as caught:
        fit("fork", 2, {"kind": kind, "rank": 0}, epochs=-1)
    assert caught.value.lost == 0
    assert (MESSAGE in str(caught.value)) == (kind == "raise")
    assert dict(os.environ) == environment
    assert threading.enumerate() == threads
    assert not dist.is_initialized()
    again = fit("fork", 2)
    assert again.state.finished
    assert "val_loss" in again.callback_metrics
    assert dict(os.environ) == environment
