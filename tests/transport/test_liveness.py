"""The first cause names the rank that is gone, with its last words and without any."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from lightning_cpipe.transport.last_words import LastWords
from lightning_cpipe.transport.liveness import Watch

STAGES = [2, 1, 0]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    held = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with monkeypatch.context() as change:
        change.setenv("MASTER_ADDR", "127.0.0.1")
        change.setenv("MASTER_PORT", str(held.port))
        yield held


def watch_with_a_dead_rank(dead: int, tmp_path: Path, words: str | None) -> Watch:
    """The watch of another rank, of three, one of which is gone."""
    own = LastWords("never said, at {batch}", tmp_path / "own")
    watches = [Watch(rank, STAGES, "a run", 5.0, own) for rank in range(3)]
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    here = watches[(dead + 1) % 3]
    here._pids = dict.fromkeys(range(3), os.getpid()) | {dead: child}
    if words is not None:
        LastWords(words, tmp_path / "theirs")
        here._words_of[dead] = tmp_path / "theirs"
    return here


@pytest.mark.parametrize("dead", range(3))
@pytest.mark.usefixtures("store")
def test_a_rank_that_left_no_words_is_named(dead: int, tmp_path: Path) -> None:
    watch = watch_with_a_dead_rank(dead, tmp_path, None)
    # A connection of all ranks broke; who is missing can be seen on this machine.
    cause = watch.explain(None)
    assert cause.rank == dead
    assert cause.text.startswith(
        f"the pipeline ended because stage {2 - dead} (rank {dead}) failed: its process is gone"
    )
    assert cause.is_mute


@pytest.mark.usefixtures("store")
def test_the_words_of_a_dead_rank_are_said_for_it(tmp_path: Path) -> None:
    watch = watch_with_a_dead_rank(2, tmp_path, "stage 0 said at {batch}")
    assert watch.explain(2).text == "stage 0 said at 0"


def test_an_agent_that_is_gone_with_the_store_is_not_taken_for_rank_0(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was, if it went between the look at it and the question to its store."""
    watch = Watch(1, STAGES, "a run", 5.0, LastWords("never said, at {batch}", tmp_path / "own"))
    # Not an orphan yet; then one.
    monkeypatch.setattr(Watch, "is_orphan", mock.PropertyMock(side_effect=[False, True]))
    monkeypatch.setattr(watch, "_store", mock.Mock(set=mock.Mock(side_effect=dist.DistNetworkError("gone"))))
    assert watch.explain(None).text.endswith("stage 1 (rank 1) failed: the process that launched it is gone")
