"""A stage chooses the versions that the schedule promises, from nothing but the updates that it makes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_cpipe.engine.choice import Choice
from lightning_cpipe.engine.mini_batch import MiniBatch
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.policies import POLICIES, VersionPolicy

BATCHES = 24


class Drawn:
    """Stands for the fetcher, of a run that goes on at `first`, after `updates`."""

    def __init__(self, schedule: Continuous, first: int, updates: int) -> None:
        self._schedule, self._first, self._updates = schedule, first, updates

    def mini_batch(self, number: int) -> MiniBatch | None:
        place = number - self._first
        if not 0 <= place < BATCHES:
            return None
        return MiniBatch(number, 0, None, 0, (), self._updates + self._schedule.updates_before(place))


@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize(
    "schedule",
    [Continuous(), Continuous(1), Continuous(accumulate=3), Continuous(accumulate=3, epoch_length=4)],
    ids=repr,
)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_versions_that_are_promised(policy: VersionPolicy, schedule: Continuous, first: int) -> None:
    schedule, p, made = replace(schedule, versions=policy), 4, 30
    drawn = Drawn(schedule, first, updates=100)
    for stage in range(p):
        choice, count, done = Choice(schedule, stage, p, first), made, 0
        used: dict[int, int] = {}
        to_come: int | None = made
        for row in schedule.rows(stage, p, BATCHES):
            for action in row:
                if action.kind is Kind.FORWARD:
                    mini_batch = drawn.mini_batch(first + action.batch)
                    assert mini_batch is not None
                    used[action.batch] = choice.forward(mini_batch, first + done, count)
                    if to_come is not None:
                        assert used[action.batch] >= to_come, "it was said not to be needed"
                elif action.kind is Kind.BACKWARD:
                    done += 1
                else:
                    count += 1
                    oldest = choice.oldest_to_come(drawn)
                    to_come = count if oldest is None else oldest
                    if (coming := len(used)) < BATCHES:
                        assert to_come == made + schedule.version(stage, p, coming)
        assert used == {batch: made + schedule.version(stage, p, batch) for batch in range(BATCHES)}
