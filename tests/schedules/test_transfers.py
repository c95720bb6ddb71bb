"""Transfers are added to a plan in the order in which the engine issues them, and both ends of an edge agree."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator

import pytest

from lightning_cpipe.schedules import Continuous, GPipe, OneFOneB, Schedule, ZeroBubble
from lightning_cpipe.schedules.action import Action, Kind, Row, format_row
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.transfers import POSTED_AHEAD, rows_with_transfers, with_transfers

COMPUTATION = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.UPDATE)

# How a stage hands on: posted and received there, what was sent here, and how far the sender is.
EDGES = [
    (Kind.POST_FORWARD, Kind.RECV_FORWARD, Kind.SEND_FORWARD, -1),
    (Kind.POST_BACKWARD, Kind.RECV_BACKWARD, Kind.SEND_BACKWARD, +1),
]

EVERY_SCHEDULE = pytest.mark.parametrize(
    "schedule",
    [
        *(Continuous(), Continuous(extra_in_flight=1), Continuous(accumulate=3, epoch_length=4)),
        Continuous(early_input_gradient=True),
        *(GPipe(), OneFOneB(), ZeroBubble()),
    ],
    ids=["continuous", "further ahead", "accumulating", "early", "gpipe", "1f1b", "zb"],
)
SIZES = list(itertools.product(range(1, 6), (1, 2, 3, 9)))

THREE_STAGES_FOUR_MINI_BATCHES = """
    0 | F0 POST_B0 SEND_F0
      | F1 POST_B1 SEND_F1
      | F2 POST_B2 SEND_F2 RECV_B0 B0 U0
      | F3 POST_B3 SEND_F3 RECV_B1 B1 U1
      | RECV_B2 B2 U2
      | RECV_B3 B3 U3
    1 | POST_F0 POST_F1 POST_F2 RECV_F0 F0 POST_B0 SEND_F0
      | POST_F3 RECV_F1 F1 POST_B1 SEND_F1 RECV_B0 B0 SEND_B0 U0
      | RECV_F2 F2 POST_B2 SEND_F2 RECV_B1 B1 SEND_B1 U1
      | RECV_F3 F3 POST_B3 SEND_F3 RECV_B2 B2 SEND_B2 U2
      | RECV_B3 B3 SEND_B3 U3
    2 | POST_F0 POST_F1 POST_F2 RECV_F0 F0 B0 SEND_B0 U0
      | POST_F3 RECV_F1 F1 B1 SEND_B1 U1
      | RECV_F2 F2 B2 SEND_B2 U2
      | RECV_F3 F3 B3 SEND_B3 U3
"""


def drawn(text: str) -> Plan:
    """A plan whose lines are broken before a bar."""
    return Plan.parse(text.replace("\n      |", " |"))


def test_the_whole_plan_is_as_drawn() -> None:
    assert with_transfers(Continuous().plan(3, 4)) == drawn(THREE_STAGES_FOUR_MINI_BATCHES)


def test_a_row_of_a_stage_in_the_middle_is_as_the_engine_runs_it() -> None:
    row = with_transfers(Continuous().plan(5, 9)).rows[1][3]
    assert format_row(row) == "POST_F5 RECV_F3 F3 POST_B3 SEND_F3 RECV_B0 B0 SEND_B0 U0"


def test_the_input_gradient_leaves_before_the_gradients_of_the_weights() -> None:
    row = with_transfers(Continuous(early_input_gradient=True).plan(5, 9)).rows[1][3]
    assert format_row(row) == "POST_F5 RECV_F3 F3 POST_B3 SEND_F3 RECV_B0 I0 SEND_B0 W0 U0"


def test_two_receives_are_posted_ahead_unless_asked_otherwise() -> None:
    plan = Continuous().plan(2, 9)
    assert POSTED_AHEAD == 2
    assert with_transfers(plan) == with_transfers(plan, posted_ahead=2)
    firsts = [format_row(with_transfers(plan, posted_ahead=ahead).rows[1][0]) for ahead in (0, 1, 3)]
    assert firsts == [
        "POST_F0 RECV_F0 F0 B0 SEND_B0 U0",
        "POST_F0 POST_F1 RECV_F0 F0 B0 SEND_B0 U0",
        "POST_F0 POST_F1 POST_F2 POST_F3 RECV_F0 F0 B0 SEND_B0 U0",
    ]


@EVERY_SCHEDULE
def test_the_computation_stays_as_it_was_row_by_row(schedule: Schedule) -> None:
    for p, n in SIZES:
        plan = schedule.plan(p, n)
        lowered = with_transfers(plan)
        kept = [[tuple(a for a in row if a.kind in COMPUTATION) for row in rows] for rows in lowered.rows]
        assert kept == [list(rows) for rows in plan.rows]


def test_a_stage_alone_has_no_transfers() -> None:
    plan = Continuous().plan(1, 5)
    assert with_transfers(plan) == plan


@EVERY_SCHEDULE
def test_the_first_and_the_last_stage_have_no_outer_transfers(schedule: Schedule) -> None:
    for p, n in SIZES:
        plan = with_transfers(schedule.plan(p, n))
        for post, receive, _, sender in EDGES:
            for s in range(p):
                expected = list(range(n)) if 0 <= s + sender < p else []
                assert sorted(plan.batches(s, post)) == sorted(plan.batches(s, receive)) == expected
        assert plan.batches(0, Kind.SEND_BACKWARD) == []
        assert plan.batches(p - 1, Kind.SEND_FORWARD) == []


@EVERY_SCHEDULE
def test_both_ends_of_an_edge_name_the_batches_in_the_same_order(schedule: Schedule) -> None:
    for p, n in SIZES:
        plan = with_transfers(schedule.plan(p, n))
        for post, receive, send, sender in EDGES:
            for s in range(p):
                if 0 <= s + sender < p:
                    sent = plan.batches(s + sender, send)
                    assert plan.batches(s, receive) == plan.batches(s, post) == sent


@EVERY_SCHEDULE
def test_every_receive_was_posted_before(schedule: Schedule) -> None:
    for p, n in SIZES:
        plan = with_transfers(schedule.plan(p, n))
        for s in range(p):
            order = list(plan.actions(s))
            at = {(action.kind, action.batch): place for place, action in enumerate(order)}
            for post, receive, _, _ in EDGES:
                assert all(at[post, batch] < at[receive, batch] for batch in plan.batches(s, receive))


@EVERY_SCHEDULE
@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_activations_are_posted_as_far_ahead_as_the_data_goes_and_no_further(schedule: Schedule, ahead: int) -> None:
    n = 6
    plan = with_transfers(schedule.plan(4, n), posted_ahead=ahead)
    for s in (1, 2, 3):
        posted = 0
        for action in plan.actions(s):
            if action.kind is Kind.POST_FORWARD:
                assert action.batch == posted
                posted += 1
            elif action.kind is Kind.RECV_FORWARD:
                assert posted == min(action.batch + ahead + 1, n)


@pytest.mark.parametrize(("first", "last"), [(True, True), (True, False), (False, True), (False, False)])
def test_rows_that_were_read_are_let_go(first: bool, last: bool) -> None:
    """Where nothing is received, an iterator that nobody advanced kept every row of the run."""
    rows = Continuous().rows(0, 1, sys.maxsize // 2)
    made: list[weakref.ref[Action]] = []

    def noted() -> Iterator[Row]:
        for row in rows:
            made.extend(weakref.ref(action) for action in row)
            yield row

    lowered = rows_with_transfers(noted(), first=first, last=last)
    for _ in itertools.islice(lowered, 2000):
        pass
    # `tee` lets go of them by the dozen.
    assert sum(each() is not None for each in made) < 400 < len(made)
