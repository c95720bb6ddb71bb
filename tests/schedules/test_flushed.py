"""GPipe and 1F1B draw the rows that are known of them, and their closed forms say what walking the plan counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_cpipe.schedules import GPipe, OneFOneB
from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.check import delays, live_versions, most_in_flight, versions
from lightning_cpipe.schedules.clock import clock
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.flushed import Flushed
from lightning_cpipe.schedules.plan import Plan

STAGES = range(1, 9)
BATCHES = range(1, 17)

BOTH = pytest.mark.parametrize("schedule", [GPipe(), OneFOneB()], ids=["gpipe", "1f1b"])

GPIPE = """
    0 | F0 | F1 | F2 | B2 | B1 | B0 | U0
    1 | F0 | F1 | F2 | B2 | B1 | B0 | U0
"""

ONE_F_ONE_B = """
    0 | F0    | F1    | F2 B0 | F3 B1 | B2 | B3 | U3
    1 | F0    | F1 B0 | F2 B1 | F3 B2 | B3 | U3
    2 | F0 B0 | F1 B1 | F2 B2 | F3 B3 | U3
"""


def plans(schedule: Flushed) -> Iterator[tuple[int, int, Plan]]:
    """Stages, micro-batches and plan of every size that the closed forms are counted for."""
    for p in STAGES:
        for m in BATCHES:
            yield p, m, schedule.plan(p, m)


@pytest.mark.parametrize(("schedule", "drawn", "p", "m"), [(GPipe(), GPIPE, 2, 3), (OneFOneB(), ONE_F_ONE_B, 3, 4)])
def test_the_rows_are_as_drawn(schedule: Flushed, drawn: str, p: int, m: int) -> None:
    assert schedule.plan(p, m) == Plan.parse(drawn)


@BOTH
def test_each_stage_updates_once_after_everything_else(schedule: Flushed) -> None:
    for p, m, plan in plans(schedule):
        for s in range(p):
            kinds = [action.kind for action in plan.actions(s)]
            assert kinds.count(Kind.UPDATE) == 1, (p, m, s)
            assert kinds[-1] is Kind.UPDATE, (p, m, s)


@BOTH
def test_no_more_is_in_flight_than_promised(schedule: Flushed) -> None:
    for p, m, plan in plans(schedule):
        for s in range(p):
            assert most_in_flight(plan, s) == schedule.in_flight(s, p, m), (p, m, s)


@BOTH
def test_all_micro_batches_use_one_version_and_nothing_is_late(schedule: Flushed) -> None:
    for p, m, plan in plans(schedule):
        for s in range(p):
            zeros = dict.fromkeys(range(m), 0)
            assert versions(plan, s) == delays(plan, s) == zeros, (p, m, s)
            assert {j: schedule.version(s, p, j) for j in range(m)} == zeros
            assert {j: schedule.delay(s, p, j) for j in range(m)} == zeros
            assert live_versions(plan, s) == 1


@BOTH
def test_a_step_takes_2m_slots_and_2_p_minus_1_idle_ones_on_each_stage(schedule: Flushed) -> None:
    for p, m, plan in plans(schedule):
        slots = clock(plan)
        assert min(slots.values()) == 0
        assert 1 + max(slots.values()) == schedule.slots(p, m) == 2 * m + 2 * (p - 1)
        assert schedule.idle_slots(p, m) == 2 * (p - 1)
        for s in range(p):
            assert len({slot for action, slot in slots.items() if action.stage == s}) == 2 * m


@BOTH
def test_the_bubble_ratio_of_the_paper_is_the_one_of_the_table(schedule: Flushed) -> None:
    for p, m, _ in plans(schedule):
        exact = (p - 1) / (m + p - 1)
        assert schedule.slot_exact_ratio(p, m) == pytest.approx(exact)
        assert schedule.paper_ratio(p, m) == pytest.approx(exact)


def test_gpipe_holds_all_micro_batches_and_1f1b_no_more_than_stages_to_come() -> None:
    assert [GPipe().in_flight(s, 4, 8) for s in range(4)] == [8, 8, 8, 8]
    assert [OneFOneB().in_flight(s, 4, 8) for s in range(4)] == [4, 3, 2, 1]
    assert [OneFOneB().in_flight(s, 4, 2) for s in range(4)] == [2, 2, 2, 1]


@pytest.mark.parametrize("p", STAGES)
def test_gpipe_runs_all_forwards_without_a_pause_then_all_backwards_in_reverse(p: int) -> None:
    m = 5
    slots = clock(GPipe().plan(p, m))
    for s in range(p):
        assert [slots[Action(Kind.FORWARD, j, s)] for j in range(m)] == [s + j for j in range(m)]
        first = p + m - 1 + (p - 1 - s)
        assert [slots[Action(Kind.BACKWARD, j, s)] for j in reversed(range(m))] == [first + i for i in range(m)]


@pytest.mark.parametrize("p", STAGES)
def test_1f1b_computes_in_the_slots_of_the_continuous_schedule_and_only_updates_otherwise(p: int) -> None:
    for m in BATCHES:
        assert clock(OneFOneB().plan(p, m)) == clock(Continuous().plan(p, m))
