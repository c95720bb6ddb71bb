"""What one stage hands over to another one of its process arrives as a message would."""

from __future__ import annotations

import torch

from lightning_cpipe.transport.within import InnerEdge, InnerRecords
from lightning_cpipe.tree import TensorSpec

CPU = torch.device("cpu")


def test_tensors_come_in_order_as_copies_without_a_graph() -> None:
    lane = InnerEdge(CPU)
    weight = torch.ones(3, requires_grad=True)
    lane.send([weight[1:]])
    lane.send([torch.zeros(2)])
    with torch.no_grad():
        weight.fill_(5)
    for expected in (torch.ones(2), torch.zeros(2)):
        lane.post([TensorSpec.of(expected)])
        assert lane.posted == 1
        (arrived,) = lane.receive()
        assert torch.equal(arrived, expected)
        assert not arrived.requires_grad
    assert lane.posted == 0


def test_they_lie_in_memory_as_the_receiver_was_told() -> None:
    lane = InnerEdge(CPU)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    gaps = torch.randn(4, 6)[:, ::2]
    lane.send([image, gaps])
    lane.post([TensorSpec.of(image), TensorSpec.of(gaps)])
    as_image, without_gaps = lane.receive()
    assert torch.equal(as_image, image)
    assert as_image.stride() == image.stride()
    assert torch.equal(without_gaps, gaps)
    assert without_gaps.is_contiguous()


def test_records_come_in_order() -> None:
    lane = InnerRecords()
    lane.send("first")
    lane.send("second")
    assert [lane.receive(), lane.receive()] == ["first", "second"]
