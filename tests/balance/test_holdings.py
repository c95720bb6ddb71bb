"""What each block keeps is counted to the byte."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.balance.costs import BlockCost, Costs, Held
from lightning_cpipe.balance.holdings import Holdings, find_holdings
from tests.helpers.probing import step_of

ROWS, WIDTH = 3, 4
FLOAT = 4
MATRIX = WIDTH * WIDTH * FLOAT
BIAS = WIDTH * FLOAT
ACTIVATION = ROWS * WIDTH * FLOAT


def holdings_of(root: nn.Module, blocks: list[str], x: Tensor | None = None) -> list[Holdings]:
    return find_holdings(root, step_of(root, (torch.randn(ROWS, WIDTH) if x is None else x,)), blocks)


def total(kept: Any) -> int:
    return sum(kept.values())


class Net(nn.Module):
    """A stem, blocks and a head; the blocks are a linear layer and tanhs, which keep their outputs."""

    def __init__(self, tanhs: int = 1) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), *(nn.Tanh() for _ in range(tanhs))) for _ in range(3))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x).sum()

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def test_weights_count_to_the_block_that_uses_them() -> None:
    found = holdings_of(Net(), BLOCKS)
    assert set(found[0].trained) == {"stem.weight", "stem.bias", "blocks.0.0.weight", "blocks.0.0.bias"}
    assert [total(each.trained) for each in found] == [2 * (MATRIX + BIAS), MATRIX + BIAS, 2 * MATRIX + BIAS]
    assert not any(each.frozen for each in found)


def test_frozen_weights_and_buffers_count_apart() -> None:
    net = Net()
    net.blocks[1].requires_grad_(False)
    net.blocks[2].register_buffer("mean", torch.zeros(5, dtype=torch.float64))
    net.register_buffer("nowhere", torch.zeros(2, dtype=torch.uint8))
    found = holdings_of(net, BLOCKS)
    assert not found[1].trained
    assert total(found[1].frozen) == MATRIX + BIAS
    assert found[2].frozen == {"blocks.2.mean": 40, "nowhere": 2}


def test_weights_that_no_function_of_torch_sees_count_to_the_block_around_them() -> None:
    net = Net()
    net.blocks[1].spare = nn.Parameter(torch.zeros(7))
    net.spare = nn.Parameter(torch.zeros(9))
    found = holdings_of(net, BLOCKS)
    assert found[1].trained["blocks.1.spare"] == 7 * FLOAT
    assert found[2].trained["spare"] == 9 * FLOAT


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.stem.weight


def test_what_several_blocks_hold_counts_once_in_a_stage_that_has_them_all() -> None:
    found = holdings_of(Tied(), BLOCKS)
    assert "stem.weight" in found[0].trained
    assert "stem.weight" in found[2].trained
    costs = Costs(tuple(BlockCost(name, 1.0, trained=own.trained) for name, own in zip(BLOCKS, found)))
    assert costs.held(0, 3) == Held(4 * (MATRIX + BIAS), 0, 0)
    assert costs.held(2, 3) == Held(2 * MATRIX + BIAS, 0, 0)


def test_what_is_saved_counts_once_and_without_weights() -> None:
    """The stem saves the batch, each block its input and its output, the head its input; `sum` saves nothing."""
    found = holdings_of(Net(), BLOCKS)
    # The batch and the stem's output; the tanh's output, which the next block is given.
    assert [total(each.saved) for each in found] == [3 * ACTIVATION, 2 * ACTIVATION, 2 * ACTIVATION]
    costs = Costs(tuple(BlockCost(name, 1.0, saved=own.saved) for name, own in zip(BLOCKS, found)))
    assert costs.held(0, 3).saved == 5 * ACTIVATION
    assert costs.held(1, 3).saved == 3 * ACTIVATION
    assert [each.output for each in found] == [ACTIVATION] * 3


@pytest.mark.parametrize(("reentrant", "kept"), [(None, 2 + 3 * 3), (False, 2 + 3), (True, 2 + 3)])
def test_of_a_checkpointed_block_its_input_is_kept(reentrant: bool | None, kept: int) -> None:
    """Beside the batch: the stem's output, and that of each block."""
    net = Net(tanhs=3)
    if reentrant is not None:
        net.call = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    found = holdings_of(net, BLOCKS)
    costs = Costs(tuple(BlockCost(name, 1.0, saved=own.saved) for name, own in zip(BLOCKS, found)))
    assert costs.held(0, 3).saved == kept * ACTIVATION


def test_a_view_counts_with_all_the_memory_that_it_keeps_alive() -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x[:ROWS]).sum()

    (found,) = holdings_of(Slices(), ["blocks.0"], torch.randn(10 * ROWS, WIDTH))
    assert total(found.saved) == 10 * ACTIVATION


def test_without_a_gradient_nothing_is_saved() -> None:
    net = Net()
    found = find_holdings(net, step_of(net, (torch.randn(ROWS, WIDTH),), name="validation_step"), BLOCKS)
    assert not any(each.saved for each in found)


def test_outputs_of_any_structure_count() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"x": self.linear(x), "more": (x.to(torch.float64), "text")}

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Pair()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)["x"].sum()

    (found,) = holdings_of(Root(), ["blocks.0"])
    assert found.output == ACTIVATION + 2 * ACTIVATION


def test_the_look_works_where_weights_have_no_numbers() -> None:
    with torch.device("meta"):
        net, x = Net(), torch.empty(ROWS, WIDTH)
    found = holdings_of(net, BLOCKS, x)
    assert [total(each.saved) for each in found] == [3 * ACTIVATION, 2 * ACTIVATION, 2 * ACTIVATION]


def test_nothing_is_left() -> None:
    net = Net()
    holdings_of(net, BLOCKS)
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_any_blocks_in_a_row_hold_what_they_hold_together() -> None:
    generator = random.Random(0)

    def some() -> dict[str, int]:
        return {generator.choice("abcdefgh"): generator.randrange(100) for _ in range(generator.randrange(4))}

    blocks = tuple(BlockCost(str(n), 1.0, trained=some(), frozen=some(), saved=some()) for n in range(12))
    costs = Costs(blocks)
    for begin, end in itertools.combinations(range(len(blocks) + 1), 2):
        kinds: Any = ({}, {}, {})
        for block in blocks[begin:end]:
            for held, own in zip(kinds, (block.trained, block.frozen, block.saved)):
                held |= own
        assert costs.held(begin, end) == Held(*map(total, kinds))
