"""The checker is silent about every plan that is shipped, and lists every fault of one that is broken."""

from __future__ import annotations

import itertools

import pytest

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules import Continuous, GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble
from lightning_cpipe.schedules.check import (
    Fault,
    check,
    check_transfers,
    delays,
    live_versions,
    most_in_flight,
    most_on_rank,
    versions,
)
from lightning_cpipe.schedules.clock import clock
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.policies import VERTICAL
from lightning_cpipe.schedules.transfers import with_transfers

BOTH_RULES = pytest.mark.parametrize("sends_wait", [False, True], ids=["sends return", "sends wait"])

SHIPPED = [
    *(Continuous(), Continuous(extra_in_flight=1), Continuous(extra_in_flight=2)),
    Continuous(early_input_gradient=True),
    *(GPipe(), OneFOneB(), Interleaved(stages_per_rank=1), ZeroBubble()),
]

ACCUMULATING = [
    Continuous(accumulate=4),
    Continuous(accumulate=2, epoch_length=3),
    Continuous(accumulate=5, epoch_length=1),
    Continuous(extra_in_flight=1, accumulate=3, epoch_length=7),
]

LEGAL = """
    0 | F0       | F1 B0 U0 | F2 B1 U1 | B2 U2
    1 | F0 B0 U0 | F1 B1 U1 | F2 B2 U2
"""


def faults(text: str, schedule: Schedule | None = None, *, sends_wait: bool = False) -> list[str]:
    """What the checker says of a drawn plan, in any order."""
    return sorted(map(str, check(Plan.parse(text), schedule, sends_wait=sends_wait)))


def deadlocks(plan: Plan, **rule: bool) -> list[str]:
    return list(map(str, check_transfers(plan, **rule)))


def without_posts(plan: Plan) -> Plan:
    """The plan of somebody who forgot to post receives ahead."""
    return Plan(
        tuple(
            tuple(tuple(action for action in row if not action.kind.value.startswith("POST")) for row in rows)
            for rows in plan.rows
        )
    )


@pytest.mark.parametrize("schedule", SHIPPED, ids=str)
@BOTH_RULES
def test_every_shipped_schedule_is_clean(schedule: Schedule, sends_wait: bool) -> None:
    for p, n in itertools.product(range(1, 9), (1, 2, 3, 8, 16)):
        assert check(schedule.plan(p, n), schedule, sends_wait=sends_wait) == [], (p, n)


@pytest.mark.parametrize("schedule", ACCUMULATING, ids=str)
@BOTH_RULES
def test_every_accumulation_is_clean_once_the_data_makes_an_update(schedule: Schedule, sends_wait: bool) -> None:
    for p, n in itertools.product(range(1, 9), (4, 7, 16)):
        assert check(schedule.plan(p, n), schedule, sends_wait=sends_wait) == [], (p, n)


@pytest.mark.parametrize("ahead", range(4))
def test_any_number_of_receives_posted_ahead_is_clean(ahead: int) -> None:
    for schedule, p in itertools.product((Continuous(), Continuous(1), GPipe(), OneFOneB()), range(1, 6)):
        plan = with_transfers(schedule.plan(p, 9), ahead)
        assert deadlocks(plan) == deadlocks(plan, sends_wait=True) == []


def test_the_drawn_plan_that_others_are_broken_from_is_clean() -> None:
    assert faults(LEGAL, Continuous()) == []


def test_stages_may_be_written_out() -> None:
    written_out = "\n".join(
        line[0] + line[1:].replace("F", f"{stage}F").replace("B", f"{stage}B").replace("U", f"{stage}U")
        for stage, line in enumerate(line.strip() for line in LEGAL.strip().splitlines())
    )
    assert "1 | 1F0 1B0 1U0 |" in written_out
    assert faults(written_out, Continuous()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 | F0 B0 U0 | F0", ["stage 0, row 1: F0 a second time"]),
        ("0 | F0 B0 U0 | B0", ["stage 0, row 1: B0 a second time"]),
        ("0 | F0 B0 U0 U0", ["stage 0, row 0: U0 a second time"]),
        ("0 | F0 B0 U0 | 0F0", ["stage 0, row 1: F0 a second time"]),
        ("0 | B0 F0 U0", ["stage 0, row 0: B0 before F0"]),
        ("0 | F0 B0 U0 | B1 | F1", ["stage 0, row 1: B1 before F1"]),
        ("0 | F0 U0 B0", ["stage 0, row 0: U0 before B0"]),
        ("0 | F0 B0 | F1 U1 | B1", ["stage 0, row 1: U1 before B1"]),
        ("0 | F0 B0 U0 | F1", ["stage 0: F1 has no B1"]),
        ("0 | F0 B0", ["stage 0: never updates"]),
        ("0 | 1F0 B0 U0", ["stage 0, row 0: 1F0 stands in the rows of stage 0"]),
        ("0 | F0 I0 W0 U0", []),
        ("0 | F0 W0 I0 U0", ["stage 0, row 0: W0 before I0"]),
        ("0 | F0 I0 U0 W0", ["stage 0, row 0: U0 before B0"]),
        ("0 | F0 I0 W0 U0 | F1 I1", ["stage 0: I1 has no W1"]),
        ("0 | F0 B0 W0 U0", ["stage 0, row 0: W0 before I0", "stage 0, row 0: W0 besides B0"]),
        ("0 | F0 I0 W0 B0 U0", ["stage 0, row 0: B0 besides I0"]),
    ],
)
def test_a_fault_of_order_names_stage_row_and_action(text: str, expected: list[str]) -> None:
    assert faults(text) == expected


def test_a_forward_that_one_stage_lacks_is_found_on_both_sides() -> None:
    text = """
        0 | F0       | F1 B0 U0 | B1 U1
        1 | F0 B0 U0 |    B1 U1
    """
    assert faults(text) == [
        "stage 0: F1 as its F number 1, but stage 1 nothing",
        "stage 1, row 1: B1 before F1",
    ]


def test_a_whole_backward_may_meet_one_in_two_halves() -> None:
    assert faults("0 | F0 B0 U0\n1 | F0 I0 W0 U0\n2 | F0 B0 U0") == []


def test_halves_in_another_order_than_the_neighbours_backwards_are_found() -> None:
    text = """
        0 | F0 F1 | I1 I0 | W0 W1 U1
        1 | F0 B0 | F1 B1 U1
    """
    assert faults(text) == ["stage 0: I1 as its I number 0, but stage 1 B0"]


def test_neighbours_that_run_other_batches_or_another_order_are_found() -> None:
    text = """
        0 | F0       | F1 B0 U0 | B1 U1
        1 | F1 B1 U1 | F0 B0 U0
        2 | F1 B1 U1
    """
    assert faults(text) == [
        "stage 0: B0 as its B number 0, but stage 1 B1",
        "stage 0: F0 as its F number 0, but stage 1 F1",
        "stage 1: B0 as its B number 1, but stage 2 nothing",
        "stage 1: F0 as its F number 1, but stage 2 nothing",
    ]


def test_too_much_in_flight_is_found_and_only_where_it_is() -> None:
    further_ahead = """
        0 | F0       | F1       | F2 B0 U0 | B1 U1 | B2 U2
        1 | F0 B0 U0 | F1 B1 U1 | F2 B2 U2
    """
    assert faults(further_ahead) == []
    assert faults(further_ahead, Continuous()) == [
        "stage 0: 3 in flight where continuous allows 2",
        "stage 0: F2 finds version 0 where version 1 is promised",
    ]
    assert faults(further_ahead, Continuous(extra_in_flight=1)) == []


def test_every_forward_that_finds_a_wrong_version_is_named() -> None:
    one_update_left_out = LEGAL.replace("B0 U0", "B0")
    assert faults(one_update_left_out, Continuous()) == [
        "stage 0: F2 finds version 0 where version 1 is promised",
        "stage 1: F1 finds version 0 where version 1 is promised",
        "stage 1: F2 finds version 1 where version 2 is promised",
    ]


def test_a_version_that_is_not_there_yet_is_named() -> None:
    """Stage 0 runs so little ahead that it chooses a version that stage 1 does not have, and waits for ever."""
    text = """
        0 | F0 B0 U0 | F1 B1 U1
        1 | F0 | F1 B0 U0 | B1 U1
    """
    assert [fault for fault in faults(text, Continuous(versions=VERTICAL)) if "waits" not in fault] == [
        "stage 0: F1 finds version 1 where version 0 is promised",
        "stage 1: 2 in flight where continuous allows 1",
        "stage 1: F1 finds version 1 where version 0 is promised",
        "stage 1: F1 needs version 1 where 0 is the newest",
    ]


def test_a_flush_schedule_promises_one_version() -> None:
    text = "0 | F0 B0 U0 | F1 B1 U1"
    assert faults(text, OneFOneB()) == ["stage 0: F1 finds version 1 where version 0 is promised"]


def test_many_faults_at_once_are_all_listed() -> None:
    text = """
        0 | F0 F0    | U1 F1 B0    | F2 F3
        1 | B0 F0 U0 | 0F1 B1      | B2 U2
    """
    assert faults(text, Continuous()) == [
        "stage 0, row 0: F0 a second time",
        "stage 0, row 1: U1 before B1",
        "stage 0: 4 in flight where continuous allows 2",
        "stage 0: F0 as its F number 1, but stage 1 F1",
        "stage 0: F1 finds version 1 where version 0 is promised",
        "stage 0: F1 has no B1",
        "stage 0: F2 has no B2",
        "stage 0: F3 finds version 1 where version 2 is promised",
        "stage 0: F3 has no B3",
        "stage 0: nothing as its B number 1, but stage 1 B1",
        "stage 1, row 0: B0 before F0",
        "stage 1, row 1: 0F1 stands in the rows of stage 1",
        "stage 1, row 2: B2 before F2",
    ]


def test_stages_that_wait_for_each_other_are_named_with_what_they_wait_in() -> None:
    flushes_too_early = """
        0 | F0 B0 U0 | F1 B1 U1
        1 | F0 F1    | B0 U0 B1 U1
    """
    expected = ["stage 0, row 0: RECV_B0 waits for ever", "stage 1, row 0: RECV_F1 waits for ever"]
    assert faults(flushes_too_early) == expected
    assert faults(flushes_too_early, sends_wait=True) == expected


def test_the_clock_refuses_such_a_plan() -> None:
    with pytest.raises(PlanError) as caught:
        clock(Plan.parse("0 | F0 B0 | F1 B1\n1 | F0 F1 | B0 B1"))
    assert str(caught.value) == "the plan can't run to its end: 0B0, 1F1 wait for each other."


def test_the_continuous_schedule_locks_where_sends_wait_and_no_receive_was_posted_ahead() -> None:
    plan = without_posts(with_transfers(Continuous().plan(4, 6)))
    assert deadlocks(plan) == []
    assert deadlocks(plan, sends_wait=True) == [
        "stage 0, row 3: SEND_F3 waits for ever",
        "stage 1, row 2: SEND_F2 waits for ever",
        "stage 2, row 1: SEND_F1 waits for ever",
        "stage 3, row 0: SEND_B0 waits for ever",
    ]


def test_gpipe_needs_no_receive_posted_ahead_since_a_stage_that_stands_waiting_is_met() -> None:
    for p in range(1, 6):
        assert deadlocks(without_posts(with_transfers(GPipe().plan(p, 6))), sends_wait=True) == []


def test_a_send_meets_a_receive_that_its_receiver_begins_with() -> None:
    plan = Plan.parse("0 | SEND_F0 SEND_F1\n1 | RECV_F0 RECV_F1")
    assert deadlocks(plan, sends_wait=True) == []


def test_a_send_that_waits_needs_its_own_receive_posted() -> None:
    plan = Plan.parse("0 | SEND_F0 RECV_B0\n1 | POST_F1 SEND_B0 RECV_F0")
    assert deadlocks(plan) == []
    assert deadlocks(plan, sends_wait=True) == [
        "stage 0, row 0: SEND_F0 waits for ever",
        "stage 1, row 0: SEND_B0 waits for ever",
    ]


@BOTH_RULES
def test_receives_in_another_order_than_the_sends_never_end(sends_wait: bool) -> None:
    plan = Plan.parse("""
        0 | F0 SEND_F0 | F1 SEND_F1
        1 | POST_F0 POST_F1 | RECV_F1 | F1 | RECV_F0 F0
    """)
    assert deadlocks(plan, sends_wait=sends_wait) == ["stage 1, row 1: RECV_F1 waits for ever"]


@BOTH_RULES
def test_a_receive_of_what_is_never_sent_never_ends(sends_wait: bool) -> None:
    plan = Plan.parse("0 | F0\n1 | POST_F0 RECV_F0 F0")
    assert deadlocks(plan, sends_wait=sends_wait) == ["stage 1, row 0: RECV_F0 waits for ever"]


def test_a_fault_says_where_it_is() -> None:
    assert str(Fault(2, 5, "B1 before F1")) == "stage 2, row 5: B1 before F1"
    assert str(Fault(2, None, "never updates")) == "stage 2: never updates"


def test_the_walks_count_what_can_be_counted_by_hand() -> None:
    plan = Plan.parse("0 | F0 | F1 | F2 B0 U0 | F3 B1 | B2 U2 | B3 U3")
    assert versions(plan, 0) == {0: 0, 1: 0, 2: 0, 3: 1}
    assert delays(plan, 0) == {0: 0, 1: 1, 2: 1, 3: 1}
    assert most_in_flight(plan, 0) == 3
    assert live_versions(plan, 0) == 2
    assert most_on_rank(plan, 0) == 3
    in_halves = Plan.parse("0 | F0 | F1 I0 | F2 I1 W0 U0 | I2 W1 U1 | W2 U2")
    assert delays(in_halves, 0) == {0: 0, 1: 1, 2: 2}
    assert most_in_flight(in_halves, 0) == 3
    two_stages = Plan.parse("0 1 | 0F0 1F0 0F1 1B0 1U0 0B0 0U0 | 1F1 1B1 1U1 0B1 0U1")
    assert (most_in_flight(two_stages, 0), most_in_flight(two_stages, 1), most_on_rank(two_stages, 0)) == (2, 1, 3)
    assert versions(two_stages, 0) == {0: 0, 1: 0}
    assert versions(two_stages, 1) == {0: 0, 1: 1}
    every_one = Plan.parse("0 | F0 | F1 | F2 B0 U0 | F3 B1 U1 | B2 U2 | B3 U3")
    assert delays(every_one, 0) == {0: 0, 1: 1, 2: 2, 3: 2}
    assert live_versions(every_one, 0) == 3
