"""Actions and rows are written as short words, and every word reads back as the action it came from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import Action, Kind, backward, format_row, forward, parse_row, update

WORDS = [
    ("F3", Action(Kind.FORWARD, 3)),
    ("2F3", Action(Kind.FORWARD, 3, stage=2)),
    ("0F0", Action(Kind.FORWARD, 0, stage=0)),
    ("B0", Action(Kind.BACKWARD, 0)),
    ("11B120", Action(Kind.BACKWARD, 120, stage=11)),
    ("I4", Action(Kind.INPUT_GRADIENT, 4)),
    ("3W4", Action(Kind.WEIGHT_GRADIENT, 4, stage=3)),
    ("U7", Action(Kind.UPDATE, 7)),
    ("POST_F5", Action(Kind.POST_FORWARD, 5)),
    ("1RECV_F3", Action(Kind.RECV_FORWARD, 3, stage=1)),
    ("SEND_F3", Action(Kind.SEND_FORWARD, 3)),
    ("POST_B3", Action(Kind.POST_BACKWARD, 3)),
    ("RECV_B0", Action(Kind.RECV_BACKWARD, 0)),
    ("3SEND_B0", Action(Kind.SEND_BACKWARD, 0, stage=3)),
]

NO_ACTIONS = ["", "F", "3", "X3", "f3", "F-1", "F1.5", "2 F3", "F 3", "F3 B0", "2F3!", "3MF", "0F", "SEND_3", "_F3"]

actions = st.builds(
    Action,
    kind=st.sampled_from(Kind),
    batch=st.integers(min_value=0),
    stage=st.none() | st.integers(min_value=0),
)


@pytest.mark.parametrize(("word", "action"), WORDS)
def test_an_action_is_written_as_its_word(word: str, action: Action) -> None:
    assert str(action) == word


@pytest.mark.parametrize(("word", "action"), WORDS)
def test_a_word_is_read_as_its_action(word: str, action: Action) -> None:
    assert Action.parse(word) == action


def test_the_words_above_show_every_kind() -> None:
    assert {action.kind for _, action in WORDS} == set(Kind)


@settings(deadline=None)
@given(actions)
def test_every_action_reads_back(action: Action) -> None:
    assert Action.parse(str(action)) == action


@settings(deadline=None)
@given(st.lists(actions, max_size=8).map(tuple))
def test_every_row_reads_back(row: tuple[Action, ...]) -> None:
    assert parse_row(format_row(row)) == row


def test_a_row_is_words_with_spaces_between() -> None:
    row = (forward(3), backward(0), update(0))
    assert format_row(row) == "F3 B0 U0"
    assert parse_row("  F3   B0 U0 ") == row
    assert parse_row("") == ()


@pytest.mark.parametrize("text", NO_ACTIONS)
def test_the_error_for_no_action_says_what_to_write(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Action.parse(text)
    message = str(caught.value)
    assert message.startswith(f"{text!r} is not an action: write a stage (or leave it out)")
    assert "F, B, I, W, U, POST_F, RECV_F, SEND_F, POST_B, RECV_B, SEND_B" in message
    assert "for example 2F3 or B0" in message


def test_a_row_with_one_wrong_word_names_that_word() -> None:
    with pytest.raises(PlanError, match="'Q0' is not an action"):
        parse_row("F3 Q0 U0")


def test_a_stage_can_be_written_out_later() -> None:
    assert str(forward(3).at(2)) == "2F3"
    assert Action.parse("1B4").at(0) == Action.parse("0B4")


def test_only_forwards_and_backwards_take_a_slot() -> None:
    assert "".join(kind for kind in Kind if kind.computes) == "FBIW"


def test_a_batch_is_in_flight_until_its_gradients_of_weights_are_made() -> None:
    assert "".join(kind for kind in Kind if kind.frees) == "BW"
