"""ZB-H1 draws the rows that are known of it, and its closed forms say what walking the plan counts."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from lightning_cpipe.schedules import OneFOneB, ZeroBubble
from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.check import delays, live_versions, most_in_flight, versions
from lightning_cpipe.schedules.clock import WHOLE_BACKWARD_TWICE, clock, span
from lightning_cpipe.schedules.plan import Plan

SIZES = list(itertools.product(range(1, 9), range(1, 17)))

THREE_STAGES = """
    0 | F0    | F1    | F2 I0 W0 | F3 I1 W1 | I2 W2 | I3 W3 | U3
    1 | F0    | F1 I0 | F2 I1 W0 | F3 I2 W1 | I3 W2 | W3    | U3
    2 | F0 I0 | F1 I1 | F2 I2 W0 | F3 I3 W1 | W2    | W3    | U3
"""


def test_the_rows_are_as_drawn() -> None:
    assert ZeroBubble().plan(3, 4) == Plan.parse(THREE_STAGES)


def test_it_is_1f1b_but_for_the_weights() -> None:
    for p, m in SIZES:
        plan, plain = ZeroBubble().plan(p, m), OneFOneB().plan(p, m)
        for stage in range(p):
            without = [action for action in plan.actions(stage) if action.kind is not Kind.WEIGHT_GRADIENT]
            as_1f1b = [
                Action(Kind.BACKWARD, action.batch) if action.kind is Kind.INPUT_GRADIENT else action
                for action in without
            ]
            assert as_1f1b == list(plain.actions(stage))
            counts = Counter(action.kind for action in plan.actions(stage))
            assert counts == {
                Kind.FORWARD: m,
                Kind.INPUT_GRADIENT: m,
                Kind.WEIGHT_GRADIENT: m,
                Kind.UPDATE: 1,
            }


def test_a_step_takes_3m_slots_and_p_minus_1_idle_ones() -> None:
    schedule = ZeroBubble()
    for p, m in SIZES:
        slots = clock(schedule.plan(p, m))
        assert 1 + max(slots.values()) == schedule.slots(p, m), (p, m)
        idle = schedule.idle_slots(p, m)
        assert [schedule.slots(p, m) - len({slots[a] for a in slots if a.stage == s}) for s in range(p)] == [idle] * p
        if m >= p:
            assert idle == p - 1
            assert schedule.slot_exact_ratio(p, m) == pytest.approx((p - 1) / (3 * m + p - 1))


def test_the_bubble_is_a_third_of_that_of_1f1b() -> None:
    for p, m in SIZES:
        if m >= p:
            idle = span(OneFOneB().plan(p, m), WHOLE_BACKWARD_TWICE) - 3 * m
            assert idle == 3 * (p - 1) == 3 * ZeroBubble().idle_slots(p, m)


def test_the_slots_of_a_rank_with_several_stages_are_as_promised() -> None:
    for per_rank, ranks, m in itertools.product((2, 3), (1, 2, 3), (1, 2, 3, 4, 7, 16)):
        schedule = ZeroBubble(stages_per_rank=per_rank)
        assert span(schedule.plan(per_rank * ranks, m)) == schedule.slots(per_rank * ranks, m)


def test_every_stage_has_as_many_in_flight_as_the_first_one_of_1f1b() -> None:
    for p, m in SIZES:
        plan = ZeroBubble().plan(p, m)
        for stage in range(p):
            promised = ZeroBubble().in_flight(stage, p, m)
            assert most_in_flight(plan, stage) == promised == OneFOneB().in_flight(0, p, m)


def test_all_micro_batches_use_one_version_and_nothing_is_late() -> None:
    for p, m in SIZES:
        plan = ZeroBubble().plan(p, m)
        for stage in range(p):
            assert versions(plan, stage) == delays(plan, stage) == dict.fromkeys(range(m), 0)
            assert live_versions(plan, stage) == 1
            assert list(plan.actions(stage))[-1] == Action(Kind.UPDATE, m - 1)
