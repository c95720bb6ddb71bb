"""Records of any size arrive as they were, in one message where they fit its frame, until the sender says its last."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from lightning_cpipe.transport.records import FRAME, Records
from tests.helpers.wire import Wire


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


def of_size(size: int) -> bytes:
    """A record whose pickle has `size` bytes."""
    around = len(pickle.dumps(bytes(size), protocol=pickle.HIGHEST_PROTOCOL)) - size
    record = bytes(size - around)
    assert len(pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)) == size
    return record


@pytest.mark.parametrize("record", [None, 0, "", "nothing at all", {"a": [1, 2.5]}, (1, b"\0" * 7), list(range(9000))])
def test_a_record_arrives_as_it_was(wire: Wire, record: Any) -> None:
    sender, receiver = wire.records("edge")
    sender.send(record)
    assert receiver.receive() == record
    assert wire.is_empty()


@pytest.mark.parametrize(("size", "messages"), [(FRAME - 5, 1), (FRAME - 4, 1), (FRAME - 3, 2), (5 * FRAME, 2)])
def test_a_record_that_fits_costs_one_message(wire: Wire, size: int, messages: int) -> None:
    sender, receiver = wire.records("edge")
    before = len(wire.works)
    sender.send(of_size(size))
    assert len(wire.works) - before == messages
    assert receiver.receive() == of_size(size)


def test_small_and_large_records_keep_their_order(wire: Wire) -> None:
    sender, receiver = wire.records("edge")
    records = ["a", "b" * 10_000, "c", "d" * 5_000, "e" * 5_000]
    for record in records:
        sender.send(record)
    assert [receiver.receive() for _ in records] == records


def test_the_next_receive_is_always_posted(wire: Wire) -> None:
    """So that a sender never depends on what the receiver is at."""
    sender, receiver = wire.records("edge")
    for record in ("small", "large" * 1_000):
        assert receiver._edge.posted == 1
        sender.send(record)
        receiver.receive()
    assert receiver._edge.posted == 1


@pytest.mark.parametrize("forgotten", [[], ["a"], ["a", "b" * 9_000, 3]])
def test_what_nobody_looks_at_any_more_is_taken_to_its_end(wire: Wire, forgotten: list[Any]) -> None:
    sender, receiver = wire.records("edge")
    sender.send("seen")
    assert receiver.receive() == "seen"
    for record in forgotten:
        sender.send(record)
    sender.send_last()
    assert receiver.discard() == len(forgotten)
    assert wire.is_empty()
    assert receiver._edge.posted == 0


def test_the_sending_end_posts_nothing(wire: Wire) -> None:
    sender, _ = wire.ends("edge")
    Records(sender, receives=False)
    assert sender.posted == 0
