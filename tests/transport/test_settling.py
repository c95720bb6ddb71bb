"""At the end of a run each end takes or sends what the other counts on; then nothing is on its way."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_cpipe.transport.edge import Edge, NcclEdge
from lightning_cpipe.transport.settling import Account, account_of, send_what_was_posted_for, take_what_was_sent
from lightning_cpipe.tree import TensorSpec
from tests.helpers.wire import Wire


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


def spec(number: int) -> TensorSpec:
    """Every message has a shape of its own."""
    return TensorSpec((number + 1,), torch.float32)


@pytest.mark.parametrize("kind", [Edge, NcclEdge])
@pytest.mark.parametrize(
    ("sent", "posted", "received"),
    [
        each
        for each in itertools.product((0, 1, 3, 5), (0, 1, 3, 5), (0, 1, 3))
        if each[2] <= min(each[:2]) and max(each[:2]) - each[2] <= 4
    ],
)
def test_nothing_is_on_its_way_afterwards(wire: Wire, kind: type[Edge], sent: int, posted: int, received: int) -> None:
    sender, receiver = wire.ends("edge", in_flight=9, kind=kind)
    for number in range(posted):
        receiver.post([spec(number)])
    for number in range(sent):
        sender.send([torch.ones(number + 1)])
    for _ in range(received):
        receiver.receive()
    of_sender, of_receiver = account_of(sender), account_of(receiver)
    send_what_was_posted_for(sender, of_receiver)
    assert take_what_was_sent(receiver, of_sender) == max(sent, posted) - received
    sender.flush()
    assert wire.is_empty()
    assert receiver.posted == 0
    assert sender.messages == receiver.messages == max(sent, posted)
    # The edge can be used again.
    receiver.post([spec(0)])
    sender.send([torch.full((1,), 7.0)])
    assert receiver.receive()[0].item() == 7.0


def test_without_a_neighbour_there_is_nothing_to_do(wire: Wire) -> None:
    sender, _ = wire.ends("edge")
    assert account_of(None) is None
    assert take_what_was_sent(None, Account(3, {})) == 0
    send_what_was_posted_for(None, Account(3, {}))
    send_what_was_posted_for(sender, None)
    assert not wire.works


def test_an_account_does_not_change_with_its_edge(wire: Wire) -> None:
    sender, _ = wire.ends("edge")
    sender.send([torch.zeros(1)])
    account = account_of(sender)
    sender.send([torch.zeros(2)])
    assert account == Account(1, {0: [spec(0)]})
