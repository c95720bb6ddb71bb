"""What the last stage says reaches every stage, by topic and in order; what is for a neighbour goes no further."""

from __future__ import annotations

import pytest

from lightning_cpipe.engine.decisions import Decisions
from tests.helpers.wire import Wire


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


def chain(wire: Wire, stages: int) -> list[Decisions]:
    """The places of all stages, the first stage's first."""
    ends = [wire.records(upper) for upper in range(stages - 1)]
    from_next = [receiver for _, receiver in ends]
    to_previous = [sender for sender, _ in ends]
    return [Decisions(*each) for each in zip([*from_next, None], [None, *to_previous])]


def test_only_the_last_stage_leads(wire: Wire) -> None:
    assert [each.leads for each in chain(wire, 3)] == [False, False, True]


def test_what_is_told_is_heard_on_every_stage_in_order(wire: Wire) -> None:
    first, middle, last = chain(wire, 3)
    for number in range(3):
        last.tell("step", number)
    # A stage hands on what it hears at once, before the stage before it asks.
    assert [middle.hear("step") for _ in range(3)] == [0, 1, 2]
    assert [first.hear("step") for _ in range(3)] == [0, 1, 2]


def test_topics_are_heard_each_in_its_own_order(wire: Wire) -> None:
    first, middle, last = chain(wire, 3)
    for topic, content in [("step", 0), ("save", "a"), ("step", 1), ("save", "b")]:
        last.tell(topic, content)
    for stage in (middle, first):
        assert stage.hear("save") == "a"
        assert stage.hear("save") == "b"
        assert stage.hear("step") == 0
        assert stage.hear("step") == 1


def test_looking_for_a_later_topic_hands_on_the_earlier_ones(wire: Wire) -> None:
    first, middle, last = chain(wire, 3)
    last.tell("step", 0)
    last.tell("save", "a")
    assert middle.hear("save") == "a"
    assert first.hear("step") == 0


def test_all_stages_agree_on_what_the_last_one_has(wire: Wire) -> None:
    first, middle, last = chain(wire, 3)
    assert [stage.agree("broadcast", own) for stage, own in ((last, "x"), (middle, "y"), (first, "z"))] == ["x"] * 3


def test_what_a_neighbour_is_told_goes_no_further(wire: Wire) -> None:
    first, middle, last = chain(wire, 3)
    last.tell_previous("for the middle")
    last.tell("step", 0)
    assert middle.hear("step") == 0
    assert middle.hear_next() == "for the middle"
    middle.tell_previous("for the first")
    assert first.hear_next() == "for the first"
    assert first.hear("step") == 0
    assert last.hear_next(otherwise="nobody") == "nobody"


def test_nothing_is_left_when_all_have_heard_to_the_end(wire: Wire) -> None:
    first, middle, last = chain(wire, 3)
    last.tell("step", 0)
    last.tell("step", 1)
    assert middle.hear("step") == 0
    for stage in (last, middle, first):
        stage.tell_last()
    for stage in (last, middle, first):
        stage.discard()
    assert wire.is_empty()


def test_a_stage_alone_talks_to_nobody(wire: Wire) -> None:
    (alone,) = chain(wire, 1)
    alone.tell("step", 0)
    alone.tell_last()
    alone.discard()
    assert alone.agree("broadcast", "x") == "x"
    assert alone.hear_next(otherwise="nobody") == "nobody"
    assert not wire.works
