"""A first run tells which blocks are called once, in which order, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_cpipe.probe.survey import Survey, survey

ROWS, WIDTH = 5, 4
PRODUCT = 2 * ROWS * WIDTH * WIDTH
"""Floating-point operations of a Linear layer: a multiplication and an addition each."""
WEIGHTS = WIDTH * WIDTH + WIDTH


class Walks(nn.Module):
    """Calls its blocks in a given order."""

    def __init__(self, order: Sequence[int], depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.activation = nn.Tanh()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in self.order:
            x = self.activation(self.blocks[number](x))
        return x @ torch.ones(WIDTH, WIDTH)


def survey_of(module: nn.Module) -> Survey:
    return survey(module, lambda: module(torch.randn(ROWS, WIDTH)))


def test_blocks_come_in_the_order_of_their_calls() -> None:
    found = survey_of(Walks([2, 0, 1]))
    assert found.blocks == ("blocks.2", "blocks.0", "blocks.1")
    assert found.repeated == ()


def test_a_block_that_is_called_again_is_no_place_to_cut() -> None:
    found = survey_of(Walks([0, 1, 0, 2, 2, 0]))
    assert found.blocks == ("blocks.1",)
    assert found.repeated == ("blocks.0", "blocks.2")
    assert found.calls["blocks.0"] == 3


def test_a_block_that_is_never_called_is_left_out() -> None:
    found = survey_of(Walks([0, 2]))
    assert found.blocks == ("blocks.0", "blocks.2")
    assert found.calls["blocks.1"] == 0


def test_costs_are_operations_up_to_the_next_block_and_weights() -> None:
    """The stem's count to the first block, the last product's to the last."""
    module = Walks([0, 1, 2])
    found = survey_of(module)
    expected = [2 * PRODUCT + WEIGHTS, PRODUCT + WEIGHTS, 2 * PRODUCT + WEIGHTS]
    assert found.operations(module, found.blocks) == expected
    assert found.forward_flops == 5 * PRODUCT


def test_convolutions_count_too() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 1, 1))
    found = survey(module, lambda: module(torch.randn(1, 2, 6, 6)))
    assert found.forward_flops == 2 * (4 * 4) * 3 * (2 * 3 * 3) + 2 * (4 * 4) * 3


def test_a_step_may_differentiate_by_its_input() -> None:
    """torch's own counter fails there."""
    module = Walks([0, 1, 2])

    def step() -> None:
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        torch.autograd.grad(module(x).sum(), x)

    assert survey(module, step).forward_flops > 5 * PRODUCT


def test_a_cut_has_to_know_of_all_that_is_called_outside_of_blocks() -> None:
    module = nn.Module()
    module.inner = Walks([0, 1])
    module.never = nn.Linear(2, 2)
    found = survey(module, lambda: module.inner(torch.randn(ROWS, WIDTH)))
    assert found.watched(module) == ["inner", "inner.stem", "inner.blocks.0", "inner.blocks.1", "inner.activation"]


def test_a_block_in_which_a_stage_begins_is_looked_into() -> None:
    module = nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4), nn.TransformerEncoderLayer(4, 1, 4))
    found = survey(module, lambda: module(torch.randn(2, 3, 4)))
    assert found.watched(module) == ["0", "1"]
    assert "1.linear1" in found.watched(module, ["1.linear1"])
    assert "0.linear1" not in found.watched(module, ["1.linear1"])


def test_no_hook_is_left() -> None:
    module = Walks([0, 1])
    survey_of(module)
    assert not any(each._forward_pre_hooks for each in module.modules())


class LinkByLink(nn.Module):
    """Goes through one of its chains by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks[0]:
            x = layer(x)
        return self.blocks[1](x)


def test_a_chain_of_layers_is_one_block_where_it_is_called() -> None:
    root = LinkByLink()
    assert survey(root, lambda: root(torch.ones(2, 3))).blocks == ("blocks.0.0", "blocks.0.1", "blocks.1")
