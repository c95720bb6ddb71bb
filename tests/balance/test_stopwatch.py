"""Blocks are timed by a clock of the tests', which the modules themselves move on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.balance.stopwatch import CpuClock, Pass, clock_of, time_blocks
from tests.helpers.probing import step_of


class HandClock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def read(self, moments: Sequence[float]) -> list[float]:
        return list(moments)


class Takes(torch.autograd.Function):
    """Takes its time, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: HandClock, forward: float, backward: float) -> Tensor:
        clock.time += forward
        ctx.clock, ctx.backward_s = clock, backward
        # A checkpoint runs as far as what is saved last.
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _ = ctx.saved_tensors
        ctx.clock.time += ctx.backward_s
        return gradient, None, None, None


class Block(nn.Module):
    def __init__(self, clock: HandClock, forward: float, backward: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.takes = clock, forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return Takes.apply(x * self.scale, *self.takes)


class Net(nn.Module):
    """A stem, three blocks, something between the first two, and a head."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.clock = clock = HandClock()
        self.stem = Block(clock, 1, 2)
        self.blocks = nn.ModuleList([Block(clock, 10, 20), Block(clock, 30, 70), Block(clock, 100, 300)])
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.call(0, x)
        x = Takes.apply(x, self.clock, 4, 5)
        x = self.call(1, x)
        x = self.call(2, x)
        return Takes.apply(x, self.clock, 7, 11).sum()

    def call(self, number: int, x: Tensor) -> Tensor:
        block = self.blocks[number]
        return block(x) if self.way == "plain" else checkpoint(block, x, use_reentrant=self.way == "reentrant")


NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def times_of(net: nn.Module, kinds: Sequence[Any] = (0, 1, 2), name: str = "training_step") -> Any:
    return time_blocks(net, step_of(net, (torch.ones(1, 2),), name=name), NAMES, kinds, net.clock)


def test_what_lies_between_counts_to_the_block_before_and_the_stem_to_the_first() -> None:
    forward, backward = times_of(Net())
    assert forward == [1 + 10 + 4, 30, 100 + 7]
    assert backward == [2 + 20 + 5, 70, 300 + 11]


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_a_checkpoint_runs_a_block_again_in_its_backward(way: str) -> None:
    forward, backward = times_of(Net(way))
    assert forward == [1 + 10 + 4, 30, 100 + 7]
    assert backward == [2 + 20 + 5 + 10, 70 + 30, 300 + 11 + 100]


def test_blocks_of_one_kind_take_the_median() -> None:
    """So does what comes after them, where the next blocks are of one kind, too."""
    forward, backward = times_of(Net(), kinds=["a", "a", "a"])
    assert forward == [1 + 30 + 2, 30 + 2, 30 + 7]
    assert backward == [2 + 70 + 2.5, 70 + 2.5, 70 + 11]


def test_the_fastest_of_all_runs_counts() -> None:
    """Each of its times."""
    passes = [Pass(1, [5, 2], [1, 3]), Pass(2, [4, 3], [2, 1])]
    assert Pass.fastest(passes) == Pass(1, [4, 2], [1, 1])


def test_frozen_blocks_at_the_start_have_no_backward() -> None:
    net = Net()
    for module in (net.stem, net.blocks[0]):
        module.requires_grad_(False)
    forward, backward = times_of(net)
    assert forward == [1 + 10 + 4, 30, 100 + 7]
    assert backward == [0, 70, 300 + 11]


def test_where_no_block_gets_a_gradient_the_backward_is_the_heads() -> None:
    class Head(Net):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)
            self.head = Block(self.clock, 7, 11)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x).sum()

    forward, backward = times_of(Head())
    assert forward == [10, 30, 100 + 7]
    assert backward == [0, 0, 11]


def test_gradients_that_come_in_another_order_are_split_as_the_forward() -> None:
    class Crossed(Net):
        """The block that is called last is the first in the computation."""

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = (block(x) for block in self.blocks)
            late = Takes.apply(a, self.clock, 0, 0) * Takes.apply(c, self.clock, 0, 0)
            return (Takes.apply(self.stem(b), self.clock, 0, 0).detach() * late).sum() + self.again(b).sum()

        def again(self, x: Tensor) -> Tensor:
            return Takes.apply(x, self.clock, 0, 40)

    net = Crossed()
    forward, backward = times_of(net)
    assert sum(backward) == pytest.approx(20 + 70 + 300 + 40)
    assert len(forward) == 3


def test_blocks_may_return_and_take_any_structure() -> None:
    class Wrapped(Block):
        def forward(self, given: dict[str, Any]) -> dict[str, Any]:
            return {"x": super().forward(given["x"]), "more": (1, None)}

    class Root(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Wrapped(*block.takes) for block in self.blocks)

        def forward(self, x: Tensor) -> Tensor:
            given = {"x": self.stem(x)}
            for block in self.blocks:
                given = block(given)
            return Takes.apply(given["x"], self.clock, 7, 11).sum()

    forward, backward = times_of(Root())
    assert forward == [11, 30, 107]
    assert backward == [22, 70, 311]


def test_a_step_that_does_not_train_has_no_backward() -> None:
    forward, backward = times_of(Net(), name="validation_step")
    assert forward == [15, 30, 107]
    assert backward == [0, 0, 0]


def test_nothing_is_left() -> None:
    net = Net()
    times_of(net)
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_clock_of_the_cpu_runs() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, CpuClock)
    moments = clock.read([clock.now(), clock.now()])
    assert moments == sorted(moments)
