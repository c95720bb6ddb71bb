"""A plan is written as one line per stage and reads back; what can't be read, or has no such name, says why."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules import SCHEDULES, Continuous, GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble, named
from lightning_cpipe.schedules.action import Action, Kind, backward, forward, update
from lightning_cpipe.schedules.plan import Plan

DRAWN = """\
0 | F0 | F1 B0 U0 | B1 U1
1 | F0 B0 U0 | F1 B1 U1"""

ROWS = (
    ((forward(0),), (forward(1), backward(0), update(0)), (backward(1), update(1))),
    ((forward(0), backward(0), update(0)), (forward(1), backward(1), update(1))),
)

actions = st.builds(Action, st.sampled_from(Kind), st.integers(0, 99), st.none() | st.integers(0, 9))
rows = st.lists(actions, max_size=3).map(tuple)
plans = st.builds(Plan, st.lists(st.lists(rows, max_size=4).map(tuple), max_size=11).map(tuple))


def test_a_plan_is_written_as_one_line_per_stage() -> None:
    assert str(Plan(ROWS)) == DRAWN


def test_a_drawn_plan_is_read_as_its_rows() -> None:
    assert Plan.parse(DRAWN) == Plan(ROWS)


def test_indents_and_empty_lines_do_not_matter() -> None:
    assert Plan.parse("\n" + DRAWN.replace("\n", "\n\n   ") + "\n\n") == Plan(ROWS)


def test_an_empty_row_reads_back() -> None:
    plan = Plan((((forward(0),), (), (backward(0),)),))
    assert str(plan) == "0 | F0 |  | B0"
    assert Plan.parse(str(plan)) == plan


@settings(deadline=None, max_examples=50)
@given(plans)
def test_every_plan_reads_back(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    "schedule",
    [
        Continuous(),
        Continuous(2, 3, 5),
        Continuous(stages_per_rank=3),
        GPipe(),
        OneFOneB(),
        Interleaved(),
        ZeroBubble(),
    ],
    ids=str,
)
def test_the_plan_of_a_schedule_reads_back(schedule: Schedule) -> None:
    plan = schedule.plan(12, 6)
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 | F0", "line 1 of the plan starts with '1' where stage 0 is due"),
        ("0 | F0\n2 | F0", "line 2 of the plan starts with '2' where stage 1 is due"),
        ("0 | F0\n0 | F0", "line 2 of the plan starts with '0' where stage 1 is due"),
        ("F0 | B0", "line 1 of the plan starts with 'F0' where stage 0 is due"),
        ("0 | F0\nstage 1 | F0", "line 2 of the plan starts with 'stage 1' where stage 1 is due"),
    ],
)
def test_lines_out_of_order_are_refused_with_what_is_due(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert message in str(caught.value)
    assert "write one line per stage, beginning with its number, in order" in str(caught.value)


def test_a_word_that_is_no_action_is_named() -> None:
    with pytest.raises(PlanError, match="'G1' is not an action"):
        Plan.parse("0 | F0 | G1")


def test_a_plan_lists_the_actions_and_batches_of_a_stage_in_order() -> None:
    plan = Plan.parse(DRAWN)
    assert plan.num_stages == 2
    assert " ".join(map(str, plan.actions(0))) == "F0 F1 B0 U0 B1 U1"
    assert Plan.parse("0 | F2 B1 F0 | F1").batches(0, Kind.FORWARD) == [2, 0, 1]


def test_equal_plans_and_equal_schedules_are_one_key() -> None:
    assert len({Plan.parse(DRAWN), Plan(ROWS)}) == 1
    assert len({Continuous(1, 2, 3), Continuous(1, 2, 3), Continuous()}) == 2


def test_schedules_are_found_by_their_names() -> None:
    assert named("continuous") == Continuous()
    assert isinstance(named("gpipe"), GPipe)
    assert isinstance(named("1f1b"), OneFOneB)
    assert named("interleaved") == Interleaved(stages_per_rank=2)
    assert isinstance(named("zb"), ZeroBubble)
    assert list(SCHEDULES) == ["continuous", "gpipe", "1f1b", "interleaved", "zb"]


def test_an_unknown_schedule_is_refused_with_all_names() -> None:
    with pytest.raises(PlanError) as caught:
        named("pipedream")
    assert str(caught.value) == (
        "there is no schedule 'pipedream'; there are: continuous, gpipe, 1f1b, interleaved, zb,"
        " and plans as .csv files."
    )
