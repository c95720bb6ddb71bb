"""Records of any size arrive as they were, in order, until the sender says its last or is gone."""

from __future__ import annotations

from multiprocessing import Pipe
from typing import Any

import pytest

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport.records import Records
from tests.helpers.wire import Wire


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


@pytest.mark.parametrize("record", [None, 0, "", "nothing at all", {"a": [1, 2.5]}, (1, b"\0" * 7), list(range(9000))])
def test_a_record_arrives_as_it_was(wire: Wire, record: Any) -> None:
    sender, receiver = wire.records("edge")
    sender.send(record)
    assert receiver.receive() == record
    assert wire.is_empty()


def test_small_and_large_records_keep_their_order(wire: Wire) -> None:
    sender, receiver = wire.records("edge")
    records = ["a", "b" * 10_000, "c", "d" * 5_000, "e" * 50_000]
    for record in records:
        sender.send(record)
    assert [receiver.receive() for _ in records] == records


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


def test_a_peer_that_is_gone_is_named() -> None:
    theirs, ours = Pipe()
    records = Records(ours, 3)
    Records(theirs, 0).send("its last")
    theirs.close()
    assert records.receive() == "its last"
    for use in (records.receive, lambda: records.send("too late")):
        with pytest.raises(RankLostError, match="the connection to rank 3 broke") as raised:
            use()
        assert raised.value.lost == 3


def test_a_connection_that_this_rank_closed_is_a_lost_one() -> None:
    _, ours = Pipe()
    records = Records(ours, 1)
    ours.close()
    with pytest.raises(RankLostError):
        records.receive()
