"""A rank that holds several stages runs what each of them would run alone, in an order that has no faults."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules import Continuous, GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble
from lightning_cpipe.schedules.action import Action, Row, backward, forward, update
from lightning_cpipe.schedules.check import check
from lightning_cpipe.schedules.clock import span
from lightning_cpipe.schedules.flushed import Flushed
from lightning_cpipe.schedules.placement import interleaved, neighbouring
from lightning_cpipe.schedules.plan import Held, Plan
from lightning_cpipe.schedules.transfers import with_transfers

SCHEDULES = [
    Continuous(),
    Continuous(extra_in_flight=1),
    Continuous(accumulate=2, epoch_length=5),
    Continuous(early_input_gradient=True),
    GPipe(),
    OneFOneB(),
    Interleaved(),
    ZeroBubble(),
]

EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
BOTH_RULES = pytest.mark.parametrize("sends_wait", [False, True], ids=["sends return", "sends wait"])

SIZES = [(v, ranks, n) for v, ranks in ((1, 8), (2, 1), (2, 4), (3, 2), (4, 2), (8, 1)) for n in (1, 2, 5, 9, 16)]
"""Stages per rank, ranks, batches: up to eight stages."""

CONTINUOUS = """
    0 1 | 0F0 | 1F0 | 0F1 | 1F1 | 0F2 | 1F2 1B0 1U0 | 0B0 0U0 | 1B1 1U1 | 0B1 0U1 | 1B2 1U2 | 0B2 0U2
    2 3 | 2F0 | 3F0 3B0 3U0 | 2F1 2B0 2U0 | 3F1 3B1 3U1 | 2F2 2B1 2U1 | 3F2 3B2 3U2 | 2B2 2U2
"""

GPIPE = """
    0 1 | 0F0 | 1F0 | 0F1 | 1F1 | 1B1 | 0B1 | 1B0 | 0B0 | 1U0 0U0
"""

ONE_RANK_WITH_TRANSFERS = """
    1 2 | 1POST_F0 1POST_F1 1RECV_F0 1F0 | 2F0 2POST_B0 2SEND_F0 | 1RECV_F1 1F1 | 2F1 2SEND_F1 2RECV_B0 2I0
"""


def of_stage(plan: Plan, stage: int) -> list[Action]:
    return [action.at(stage) for action in plan.actions(stage)]


def updates(schedule: Schedule, num_batches: int) -> bool:
    """Whether so many batches make an update; a plan without one has a fault."""
    return not isinstance(schedule, Continuous) or schedule.updates_before(num_batches) > 0


def test_neighbouring_stages_lie_together_and_interleaved_ones_apart() -> None:
    assert neighbouring(6, 2) == ((0, 1), (2, 3), (4, 5))
    assert interleaved(6, 2) == ((0, 3), (1, 4), (2, 5))
    assert neighbouring(3, 1) == interleaved(3, 1) == ((0,), (1,), (2,))


@pytest.mark.parametrize("placement", [neighbouring, interleaved])
def test_rank_0_which_is_the_last_line_holds_the_last_stage(placement: type) -> None:
    for per_rank, ranks in itertools.product(range(1, 4), range(1, 5)):
        held = placement(per_rank * ranks, per_rank)
        assert len(held) == ranks
        assert held[0][0] == 0
        assert held[-1][-1] == per_rank * ranks - 1
        for stage in range(per_rank * ranks):
            rank = next(ranks - 1 - line for line, stages in enumerate(held) if stage in stages)
            expected = {neighbouring: ranks - 1 - stage // per_rank, interleaved: ranks - 1 - stage % ranks}
            assert rank == expected[placement]


@pytest.mark.parametrize("schedule", [Continuous(stages_per_rank=3), GPipe(stages_per_rank=3)], ids=str)
def test_stages_that_do_not_go_into_ranks_are_refused(schedule: Schedule) -> None:
    with pytest.raises(PlanError, match=r"8 stages do not go into ranks of 3: .* for example 6 or 9"):
        schedule.plan(8, 4)


def test_the_rows_are_as_drawn() -> None:
    assert Continuous(stages_per_rank=2).plan(4, 3) == Plan.parse(CONTINUOUS)
    assert GPipe(stages_per_rank=2).plan(2, 2) == Plan.parse(GPIPE)


@pytest.mark.parametrize("schedule", [each for each in SCHEDULES if not isinstance(each, Interleaved)], ids=str)
def test_each_stage_does_what_it_would_do_alone(schedule: Schedule) -> None:
    for v, ranks, n in SIZES:
        alone, together = schedule.plan(v * ranks, n), replace(schedule, stages_per_rank=v).plan(v * ranks, n)
        assert together.held == neighbouring(v * ranks, v)
        for stage in range(v * ranks):
            assert of_stage(together, stage) == of_stage(alone, stage)


@EVERY_SCHEDULE
@BOTH_RULES
def test_the_checker_finds_nothing(schedule: Schedule, sends_wait: bool) -> None:
    for v, ranks, n in SIZES:
        several = replace(schedule, stages_per_rank=v)
        if updates(several, n):
            assert check(several.plan(v * ranks, n), several, sends_wait=sends_wait) == [], (v, ranks, n)


@EVERY_SCHEDULE
@BOTH_RULES
@pytest.mark.full
def test_the_checker_finds_nothing_up_to_eight_ranks_and_sixteen_batches(schedule: Schedule, sends_wait: bool) -> None:
    for v, ranks, n in itertools.product((1, 2, 3), range(1, 9), range(1, 17)):
        several = replace(schedule, stages_per_rank=v)
        plan = several.plan(v * ranks, n)
        if updates(schedule, n):
            assert check(plan, several, sends_wait=sends_wait) == [], (v, ranks, n)
        assert span(plan) == several.slots(v * ranks, n), (v, ranks, n)


@EVERY_SCHEDULE
def test_a_plan_takes_the_slots_that_are_promised(schedule: Schedule) -> None:
    for v, ranks, n in SIZES:
        several = replace(schedule, stages_per_rank=v)
        assert span(several.plan(v * ranks, n)) == several.slots(v * ranks, n), (v, ranks, n)


@EVERY_SCHEDULE
def test_one_rank_never_idles(schedule: Schedule) -> None:
    for v, n in itertools.product((1, 2, 8), (1, 2, 9)):
        assert replace(schedule, stages_per_rank=v).idle_slots(v, n) == 0


@pytest.mark.parametrize("v", [1, 2, 3, 4])
def test_the_continuous_schedule_idles_in_the_fill_and_drain_only(v: int) -> None:
    schedule = Continuous(stages_per_rank=v)
    in_run = [schedule.idle_slots(4 * v, n) for n in (50, 51, 500)]
    assert in_run == [3 * (v * v - v + 2)] * 3


@dataclass(frozen=True)
class InOrder(Flushed):
    """Backwards come in the order of forwards: no lag, and no turns that would suit. Stages lie apart."""

    name: ClassVar[str] = "in-order"
    at_once: frozenset[int] = frozenset()
    """Stages that backward each micro-batch before they forward the next one."""

    def held(self, num_stages: int) -> Held:
        return interleaved(num_stages, self.stages_per_rank)

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        rows = [(forward(batch),) for batch in range(num_batches)]
        backwards = [(backward(batch),) for batch in range(num_batches)]
        both = zip(rows, backwards) if stage in self.at_once else (rows, backwards)
        yield from itertools.chain(*both, [(update(num_batches - 1),)])

    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        return num_batches


@BOTH_RULES
def test_a_flush_schedule_without_turns_of_its_own_has_no_faults(sends_wait: bool) -> None:
    assert str(InOrder(stages_per_rank=2).plan(2, 2)) == (
        "0 1 | 0F0 | 1F0 | 0F1 | 1F1 | 1B0 | 0B0 | 1B1 | 0B1 | 1U1 | 0U1"
    )
    for v, ranks, n in SIZES:
        several = InOrder(stages_per_rank=v)
        plan = several.plan(v * ranks, n)
        assert check(plan, several, sends_wait=sends_wait) == [], (v, ranks, n)
        assert span(plan) == several.slots(v * ranks, n), (v, ranks, n)


def test_the_faults_of_stages_that_wait_for_each_other_are_told() -> None:
    with pytest.raises(PlanError, match="stage 0, row 1: RECV_B0 waits for ever; stage 1, row 1: RECV_F1 waits"):
        InOrder(stages_per_rank=2, at_once=frozenset({0})).plan(2, 2)


def test_stages_of_one_rank_send_each_other_nothing() -> None:
    plan = Plan.parse("""
        0 | F0 | F1
        1 2 | 1F0 | 2F0 | 1F1 | 2F1 2I0
        3 | F0 I0 | F1
    """)
    drawn = ONE_RANK_WITH_TRANSFERS.strip().partition(" | ")[2]
    assert " | ".join(" ".join(map(str, row)) for row in with_transfers(plan).rows[1]) == drawn


def test_a_rank_that_runs_a_stage_before_the_one_that_it_needs_waits_for_ever() -> None:
    plan = Plan.parse("0 1 | 1F0 0F0 1B0 0B0 0U0 1U0")
    assert [str(fault) for fault in check(plan)] == ["stage 1, row 0: F0 waits for ever"]
    plan = Plan.parse("0 1 | 0F0 1F0 0B0 1B0 0U0 1U0")
    assert [str(fault) for fault in check(plan)] == ["stage 0, row 0: B0 waits for ever"]


def test_an_action_must_say_which_of_several_stages_runs_it() -> None:
    plan = Plan.parse("0 1 | 0F0 F0 2F0 | 1F0 1B0 0B0 0U0 1U0")
    assert [str(fault) for fault in check(plan)] == [
        "stage 0, row 0: F0 stands in the rows of stages 0, 1",
        "stage 0, row 0: 2F0 stands in the rows of stages 0, 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 2 | 0F0\n2 | F0", "line 2 of the plan starts with '2' where stage 1 is due"),
        ("1 0 | 0F0", "line 1 of the plan starts with '1 0' where stage 0 is due"),
        ("0 x | 0F0", "line 1 of the plan starts with '0 x' where stage 0 is due"),
        ("0 2 | 0F0", "every stage from 0 on must be held by exactly one line"),
        ("0 1 | 0F0\n2 1 | 1F0", "every stage from 0 on must be held by exactly one line"),
    ],
)
def test_lines_that_hold_no_stage_or_one_twice_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert message in str(caught.value)
