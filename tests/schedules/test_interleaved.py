"""Interleaved 1F1B draws the rows that are known of it, and its closed forms say what walking the plan counts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules import Interleaved, OneFOneB
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.check import check, delays, live_versions, most_in_flight, most_on_rank, versions
from lightning_cpipe.schedules.clock import span
from lightning_cpipe.schedules.plan import Plan

# Two ranks of two stages, four micro-batches: as Megatron-LM orders them, warm-up 4 and 2.
TWO_RANKS = """
    0 2 | 0F0 | 0F1 | 2F0 | 2F1 | 0F2 2B0 | 0F3 2B1 | 2F2 0B0 | 2F3 0B1 | 2B2 | 2B3 | 0B2 | 0B3 | 2U3 0U3
    1 3 | 1F0 | 1F1 | 3F0 3B0 | 3F1 3B1 | 1F2 1B0 | 1F3 1B1 | 3F2 3B2 | 3F3 3B3 | 1B2 | 1B3 | 3U3 1U3
"""

# Five micro-batches on two ranks: a round of two, and one of three.
ONE_LEFT_OVER = """
    0F0 0F1 2F0 2F1 0F2 0F3 2B0 0F4 2B1 2F2 0B0 2F3 0B1 2F4 2B2 2B3 2B4 0B2 0B3 0B4
"""


def plans(per_rank: int) -> Iterator[tuple[Interleaved, int, int, Plan]]:
    """Schedule, ranks, micro-batches and plan of every size that the closed forms are counted for."""
    schedule = Interleaved(stages_per_rank=per_rank)
    for ranks, m in itertools.product(range(1, 9 // per_rank + 1), range(1, 17)):
        yield schedule, ranks, m, schedule.plan(ranks * per_rank, m)


EVERY_NUMBER_PER_RANK = pytest.mark.parametrize("per_rank", [1, 2, 3, 4])


def test_the_rows_are_as_drawn() -> None:
    assert Interleaved().plan(4, 4) == Plan.parse(TWO_RANKS)


def test_micro_batches_that_are_left_over_make_a_round_longer() -> None:
    words = [str(action) for _, action in Interleaved().plan(4, 5).numbered(0) if action.kind is not Kind.UPDATE]
    assert words == ONE_LEFT_OVER.split()


@EVERY_NUMBER_PER_RANK
def test_a_step_takes_the_slots_that_are_promised(per_rank: int) -> None:
    for schedule, ranks, m, plan in plans(per_rank):
        assert plan.num_ranks == ranks
        assert span(plan) == schedule.slots(ranks * per_rank, m), (ranks, m)
        assert plan.busy_slots == 2 * m * ranks * per_rank


@EVERY_NUMBER_PER_RANK
def test_the_bubble_is_v_times_smaller_than_that_of_1f1b(per_rank: int) -> None:
    for schedule, ranks, m, _ in plans(per_rank):
        if m >= ranks:
            exact = (ranks - 1) / (per_rank * m + ranks - 1)
            assert schedule.slot_exact_ratio(ranks * per_rank, m) == pytest.approx(exact)
            assert schedule.idle_slots(ranks * per_rank, m) == OneFOneB().idle_slots(ranks, m)


@EVERY_NUMBER_PER_RANK
def test_no_more_is_in_flight_than_promised(per_rank: int) -> None:
    for schedule, ranks, m, plan in plans(per_rank):
        for stage in range(plan.num_stages):
            promised = schedule.in_flight(stage, plan.num_stages, m)
            counted = most_in_flight(plan, stage)
            assert counted <= promised, (ranks, m, stage)
            if m % ranks == 0 or m < 2 * ranks:
                assert counted == promised, (ranks, m, stage)


def test_a_rank_has_its_warm_up_and_one_more_in_flight() -> None:
    plan = Interleaved().plan(8, 16)
    assert [most_on_rank(plan, line) for line in range(4)] == [4 + 2 * ahead + 1 for ahead in (3, 2, 1, 0)]


@EVERY_NUMBER_PER_RANK
def test_all_micro_batches_use_one_version_and_each_stage_updates_once_at_the_end(per_rank: int) -> None:
    for _, _, m, plan in plans(per_rank):
        for stage in range(plan.num_stages):
            zeros = dict.fromkeys(range(m), 0)
            assert versions(plan, stage) == delays(plan, stage) == zeros
            assert live_versions(plan, stage) == 1
            assert [action.kind for action in plan.actions(stage)].index(Kind.UPDATE) == 2 * m


def test_the_rows_of_one_stage_are_its_part_of_those_of_its_rank() -> None:
    plan = Interleaved().plan(4, 4)
    for stage in range(4):
        of_stage = [action for row in Interleaved().rows(stage, 4, 4) for action in row]
        assert of_stage == list(plan.actions(stage))


def test_stages_that_do_not_go_into_ranks_are_refused() -> None:
    with pytest.raises(PlanError, match=r"5 stages do not go into ranks of 2: .* for example 4 or 6"):
        Interleaved().plan(5, 4)


@pytest.mark.parametrize("sends_wait", [False, True], ids=["sends return", "sends wait"])
def test_the_checker_finds_nothing(sends_wait: bool) -> None:
    for schedule, ranks, m, plan in plans(2):
        assert check(plan, schedule, sends_wait=sends_wait) == [], (ranks, m)
