"""Several ranks of a plan on one do what they did, each stage in its own order, and nothing locks."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_cpipe.schedules import Continuous, Given, GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.as_one_step import not_one_step
from lightning_cpipe.schedules.check import check
from lightning_cpipe.schedules.exchange import read_csv, write_csv
from lightning_cpipe.schedules.plan import Plan
from tests.schedules.test_exchange import from_torch


def require_folded(whole: Plan, given: Given) -> None:
    assert check(given.given, given) == not_one_step(given.given) == []
    for stage in range(whole.num_stages):
        in_whole, alone = (
            [action.at(stage) for action in plan.actions(stage) if action.kind.computes]
            for plan in (whole, given.given)
        )
        assert alone == in_whole
    # A shorter mini-batch runs what is left of it.
    for size in range(1, given.num_batches):
        rows = [tuple(given.rank_rows(held, whole.num_stages, size)) for held in given.given.held]
        assert check(Plan(tuple(rows), given.given.held)) == []


@pytest.mark.parametrize("schedule", [GPipe(), OneFOneB(), ZeroBubble(), Interleaved(), OneFOneB(stages_per_rank=2)])
def test_neighbouring_lines_go_on_one_rank(schedule: Schedule) -> None:
    """Whatever is written of it."""
    for num_batches in (1, 4, 7):
        whole = read_csv(write_csv(schedule.plan(8, num_batches)))
        for num_ranks in (1, 2, 4):
            given = Given(whole).on(8, num_ranks)
            assert given.given.num_ranks == num_ranks
            require_folded(whole, given)
            size = whole.num_ranks // num_ranks
            assert given.given.held == tuple(
                tuple(sorted(sum(whole.held[line * size : (line + 1) * size], ()))) for line in range(num_ranks)
            )


def test_what_several_ranks_do_at_the_same_time_is_done_in_turn() -> None:
    given = Given(OneFOneB().plan(4, 2)).on(4, 2)
    assert write_csv(given.given) == "0F0,1F0,0F1,1F1,1B0,0B0,1B1,0B1\n2F0,3F0,2F1,3B0,3F1,2B0,3B1,2B1\n"
    assert Given(OneFOneB().plan(4, 2)).on(4, 4).given == OneFOneB().plan(4, 2)


@pytest.mark.parametrize("name", ["ScheduleZBVZeroBubble", "ScheduleDualPipeV"])
def test_one_rank_holds_stages_that_lie_in_a_v(name: str, tmp_path: Path) -> None:
    from_torch(name, 2, 2, 4, tmp_path / "plan.csv")
    given = Given.read(tmp_path / "plan.csv")
    assert given.given.held == ((0, 3), (1, 2))
    assert not_one_step(given.given)
    require_folded(given.given, given.on(4, 1))


def test_what_can_not_be_folded_stays_as_it_is() -> None:
    several_updates = Given(Continuous().plan(2, 3))
    locks = Given(read_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"))
    for given in (several_updates, locks):
        assert given.on(2, 1) is given
    three = Given(OneFOneB().plan(3, 2))
    assert three.on(3, 2) is three
    assert any(action.kind is Kind.UPDATE for action in three.on(3, 1).given.actions(0))
