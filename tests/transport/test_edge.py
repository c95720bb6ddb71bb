"""An edge sends without waiting, receives in the order of the posts, and keeps what it sent until it has left."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport.edge import Edge, NcclEdge
from lightning_cpipe.tree import TensorSpec
from tests.helpers.wire import CPU, Wire

SCALAR = [TensorSpec((1,), torch.float32)]

both_kinds = pytest.mark.parametrize("kind", [Edge, NcclEdge])


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


def number(value: float) -> list[torch.Tensor]:
    return [torch.tensor([float(value)])]


@both_kinds
def test_messages_arrive_in_the_order_of_their_posts_bit_for_bit(wire: Wire, kind: type[Edge]) -> None:
    sender, receiver = wire.ends("edge", kind=kind)
    messages = [
        [torch.randn(2, 3), torch.arange(4)],
        [torch.tensor(True)],
        [],
        [torch.empty(0, 5), torch.full((2,), torch.nan, dtype=torch.bfloat16)],
    ]
    for message in messages:
        receiver.post(list(map(TensorSpec.of, message)))
    for message in messages:
        sender.send(message)
    for message in messages:
        received = receiver.receive()
        assert list(map(TensorSpec.of, received)) == list(map(TensorSpec.of, message))
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(received, message))
    assert wire.is_empty()


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(3, 4).t(), torch.randn(2, 3, 4)],
)
def test_a_tensor_is_laid_out_in_memory_as_it_was(wire: Wire, tensor: torch.Tensor) -> None:
    sender, receiver = wire.ends("edge")
    receiver.post([TensorSpec.of(tensor)])
    sender.send([tensor])
    (received,) = receiver.receive()
    assert torch.equal(received, tensor)
    assert received.stride() == tensor.stride()


def test_what_is_sent_is_detached_and_dense(wire: Wire) -> None:
    sender, receiver = wire.ends("edge")
    gaps = torch.randn(3, 4, requires_grad=True).t()
    receiver.post([TensorSpec.of(gaps)])
    sender.send([gaps])
    (received,) = receiver.receive()
    assert torch.equal(received, gaps)
    assert not received.requires_grad
    assert sender._sent[-1].tensors[0].is_contiguous()
    assert torch.equal(received, gaps)


@both_kinds
def test_posting_and_sending_wait_for_nothing(wire: Wire, kind: type[Edge]) -> None:
    sender, receiver = wire.ends("edge", in_flight=3, kind=kind)
    for value in range(3):
        receiver.post(SCALAR)
        sender.send(number(value))
    assert receiver.posted == 3
    assert not any(work.waits for work in wire.works)


def test_beyond_the_limit_the_oldest_send_is_waited_for(wire: Wire) -> None:
    sender, _ = wire.ends("edge", in_flight=2)
    for value in range(5):
        sender.send(number(value))
    assert [work.waits for work in wire.works] == [1, 1, 1, 0, 0]
    sender.flush()
    assert [work.waits for work in wire.works] == [1] * 5


def test_on_nccl_the_process_waits_beyond_the_limit_and_the_stream_does_not(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation whose last stage is slow would keep every activation of the first one otherwise."""
    sender, _ = wire.ends("edge", in_flight=2, kind=NcclEdge)
    looks: list[int] = []

    def sleep(_: float) -> None:
        looks.append(len(sender._sent))
        if len(looks) % 3 == 0:
            next(work for work in wire.works if not work.completed).completed = True

    monkeypatch.setattr(time, "sleep", sleep)
    for value in range(5):
        sender.send(number(value))
        assert len(sender._sent) <= 2
    assert looks == [3] * 9
    assert not any(work.waits for work in wire.works)


def test_on_nccl_completed_sends_are_let_go_oldest_first(wire: Wire) -> None:
    sender, _ = wire.ends("edge", in_flight=9, kind=NcclEdge)
    tensors = []

    def send(value: float) -> None:
        sender.send(number(value))
        tensors.append(weakref.ref(sender._sent[-1].tensors[0]))
        # Only the edge's own reference counts here.
        wire.forget()

    for value in range(3):
        send(value)
    wire.works[0].completed = wire.works[2].completed = True
    send(3)
    gc.collect()
    # Number 1 is still on its way, so number 2 stays, too.
    assert [each() is None for each in tensors] == [True, False, False, False]
    wire.works[1].completed = True
    send(4)
    gc.collect()
    assert [each() is None for each in tensors] == [True, True, True, False, False]
    assert not any(work.waits for work in wire.works)


def test_on_nccl_a_message_is_let_go_when_all_its_tensors_have_left(wire: Wire) -> None:
    sender, _ = wire.ends("edge", kind=NcclEdge)
    sender.send(number(0) + number(1))
    wire.works[0].completed = True
    sender.send(number(2))
    assert len(sender._sent) == 2
    wire.works[1].completed = True
    sender.send(number(3))
    assert len(sender._sent) == 2


def test_on_nccl_only_a_flush_waits_and_only_for_what_is_not_completed(wire: Wire) -> None:
    sender, _ = wire.ends("edge", kind=NcclEdge)
    for value in range(3):
        sender.send(number(value))
    wire.works[0].completed = True
    sender.flush()
    assert [work.waits for work in wire.works] == [0, 1, 1]
    assert not sender._sent


@both_kinds
def test_both_ends_count_messages_and_remember_the_latest(wire: Wire, kind: type[Edge]) -> None:
    sender, receiver = wire.ends("edge", in_flight=2, kind=kind)
    for size in (1, 2, 3):
        receiver.post([TensorSpec((size,), torch.float32)])
        sender.send([torch.zeros(size)])
        receiver.receive()
        wire.works[-1].completed = True
    expected = [(number, [TensorSpec((number + 1,), torch.float32)]) for number in (1, 2)]
    for end in (sender, receiver):
        assert end.messages == 3
        assert list(end.latest) == expected


def test_a_filler_has_the_shapes_that_were_asked_for(wire: Wire) -> None:
    sender, receiver = wire.ends("edge")
    specs = [TensorSpec((2, 2), torch.int64), TensorSpec((), torch.bfloat16)]
    receiver.post(specs)
    sender.send_filler(specs)
    assert list(map(TensorSpec.of, receiver.receive())) == specs


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("Connection closed by peer")


@both_kinds
@pytest.mark.parametrize(
    "act",
    [
        lambda edge, wire: (setattr(wire, "isend", broken), edge.send(number(0))),
        lambda edge, wire: (setattr(wire, "irecv", broken), edge.post(SCALAR)),
        lambda edge, wire: (edge.send(number(0)), setattr(wire.works[0], "fails", True), edge.flush()),
        lambda edge, wire: (edge.post(SCALAR), setattr(wire.works[0], "fails", True), edge.receive()),
    ],
    ids=["send", "post", "flush", "receive"],
)
def test_a_broken_connection_names_the_rank_at_its_other_end(
    wire: Wire, kind: type[Edge], act: Callable[[Edge, Wire], object]
) -> None:
    with pytest.raises(RankLostError, match="rank 3") as caught:
        act(kind("edge", 3, CPU), wire)
    assert caught.value.lost == 3


def test_an_abandoned_edge_holds_nothing(wire: Wire) -> None:
    sender, receiver = wire.ends("edge")
    sender.send(number(0))
    receiver.post(SCALAR)
    for end in (sender, receiver):
        end.abandon()
        assert end._group is None
        end.flush()
    assert receiver.posted == 0
    assert not any(work.waits for work in wire.works)
