"""Each stage of a process counts for itself, and a hook speaks to all of them."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage import own_state
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.own_state import OwnState

CUT = Cut(starts=("net.1", "net.2"), steps={})


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
        self.meter = nn.Module()
        self.meter.count = 0
        self.count = 0
        self.met: list[int] = []
        self.register_buffer("total", torch.zeros(2))

    def step(self, amount: int) -> None:
        """Writes in every way there is."""
        self.count += amount
        self.meter.count += amount
        self.met.append(amount)
        self.total += amount

    @property
    def state(self) -> tuple[int, int, list[int], float]:
        return self.count, self.meter.count, list(self.met), float(self.total.sum() / 2)


def run(root: Root, state: OwnState, stage: int, amount: int) -> tuple[int, int, list[int], float]:
    with state.of(stage):
        root.step(amount)
        return root.state


def test_every_stage_has_its_own_and_the_last_one_s_is_seen() -> None:
    root = Root()
    state = OwnState(root, CUT, (0, 1, 2))
    assert run(root, state, 0, 1) == (1, 1, [1], 1)
    assert run(root, state, 0, 2) == (3, 3, [1, 2], 3)
    assert root.state == (0, 0, [], 0)
    assert run(root, state, 1, 10) == (10, 10, [10], 10)
    assert run(root, state, 2, 100) == root.state == (100, 100, [100], 100)
    assert run(root, state, 0, 3) == (6, 6, [1, 2, 3], 6)
    assert run(root, state, 1, 20) == (30, 30, [10, 20], 30)
    assert root.state == (100, 100, [100], 100)


def test_what_a_hook_writes_all_stages_go_on_from() -> None:
    root = Root()
    state = OwnState(root, CUT, (0, 2))
    run(root, state, 0, 1)
    run(root, state, 2, 100)
    root.count = root.meter.count = 1000
    root.met.clear()
    root.total.fill_(1000)
    assert run(root, state, 2, 2) == (1002, 1002, [2], 1002)
    assert run(root, state, 0, 1) == (1001, 1001, [1], 1001)
    assert run(root, state, 0, 1) == (1002, 1002, [1, 1], 1002)


HOOKS: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "a key that was there": ({"epoch": 0}, lambda stats: stats.update(epoch=1)),
    "another key": ({"a": 0}, lambda stats: stats.update(b=stats.pop("a"))),
    "an item": ([0, 1], lambda items: items.__setitem__(0, 2)),
    "a full deque": (deque([0, 1], maxlen=2), lambda latest: latest.append(2)),
    "another member": ({1, 2}, lambda members: members.symmetric_difference_update({2, 3})),
}


@pytest.mark.parametrize("way", HOOKS)
def test_all_stages_see_what_a_hook_writes_though_nothing_grows(way: str) -> None:
    root = Root()
    kept, hook = HOOKS[way]
    root.kept = copy.copy(kept)
    before, state = str(root.kept), OwnState(root, CUT, (0, 1, 2))
    for _ in range(2):
        for stage in (2, 0, 1):
            with state.of(stage):
                assert str(root.kept) == before
    hook(root.kept)
    after = str(root.kept)
    assert after != before
    for stage in (2, 0, 1):
        with state.of(stage):
            assert str(root.kept) == after


def test_what_a_hook_takes_away_no_stage_has() -> None:
    root = Root()
    state = OwnState(root, CUT, (0, 1))
    run(root, state, 0, 1)
    del root.count
    with state.of(0):
        assert not hasattr(root, "count")


@pytest.mark.parametrize(
    "counts", [Counter("ab"), defaultdict(int, a=1, b=1), OrderedDict(a=1, b=1)], ids=lambda each: type(each).__name__
)
def test_containers_of_every_class_are_each_stage_s_own(counts: dict[str, int]) -> None:
    root = Root()
    root.counts = counts = copy.copy(counts)
    state = OwnState(root, CUT, (0, 1))
    for stage in (1, 0):
        with state.of(stage):
            assert type(root.counts) is type(counts)
            root.counts["a"] += 1
            assert root.counts == {"a": 2, "b": 1}
    assert root.counts is counts


def test_what_one_stage_makes_or_takes_away_is_so_for_it_alone() -> None:
    root = Root()
    state = OwnState(root, CUT, (0, 1))
    with state.of(0):
        root.made = 1
        del root.count
    assert not hasattr(root, "made")
    assert root.count == 0
    with state.of(0):
        assert root.made == 1
        assert not hasattr(root, "count")


def test_a_large_tensor_is_shared_and_may_not_be_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_state, "LARGEST", 1)
    root = Root()
    state = OwnState(root, CUT, (0, 1))
    with state.of(0):
        assert root.total is root._buffers["total"]
    with pytest.raises(CutError, match=r"the step writes into 'total', which has more than 1 elements"):
        run(root, state, 0, 1)


def test_one_stage_alone_writes_on_the_module_itself() -> None:
    root = Root()
    assert run(root, OwnState(root, CUT, (1,)), 1, 5) == root.state == (5, 5, [5], 5)
