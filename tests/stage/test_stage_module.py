"""A stage draws from the step's seed, in the forward and again in the backward, and leaves the module as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.stage.randomness import get_state, same_state
from lightning_cpipe.stage.stage_module import StageModule
from tests.helpers.probing import CPU, STEP, Stages, cut_of

BATCH = (torch.randn(4, 3), torch.randn(4, 3))


class Block(nn.Linear):
    def __init__(self, dropout: float) -> None:
        super().__init__(3, 3)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class Blocks(nn.Module):
    def __init__(self, dropout: float = 0.5, checkpointed: bool = True) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(3)))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return (x - y).square().mean()


@pytest.mark.parametrize("p", [1, 2, 3])
def test_each_seed_has_its_numbers_and_no_step_leaves_a_trace(p: int) -> None:
    module = Blocks()
    stages = Stages(module, cut_of(module, BATCH, p))
    before = get_state()
    losses = [float(stages.step(BATCH, seed).loss) for seed in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]
    assert same_state(before, get_state())


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_checkpoint_around_a_block_repeats_its_numbers_in_the_backward(p: int) -> None:
    module = Blocks()
    made = Stages(module, cut_of(module, BATCH, p)).step(BATCH)
    module.checkpointed = False
    plain = Stages(module, cut_of(module, BATCH, 1)).step(BATCH)
    assert made.loss == plain.loss
    assert all(torch.equal(made.gradients[name], plain.gradients[name]) for name in plain.gradients)


class Counting(Blocks):
    """Reads in its activation checkpoints what it counts outside of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.Sequential(*(Block(0.0) for _ in range(3)))
        self.count = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: block(x * self.count), x, use_reentrant=False)
        return (x - y).square().mean()


def test_a_checkpoint_in_the_backward_reads_the_stage_s_own_count() -> None:
    """The first stage is a step ahead, as it is in a pipeline."""
    together, cut = Counting(), cut_of(Counting(), BATCH, 2, ["blocks.1"])
    apart = [Counting(), Counting()]
    of_one_process = StageModule.of_rank(together, cut, [0, 1], CPU)
    a_process_each = [StageModule(module, cut, stage, CPU) for stage, module in enumerate(apart)]

    def gradient(stages: list[StageModule], modules: list[Counting]) -> Tensor:
        first, last = stages
        sent = first.forward(STEP, lambda: modules[0](*BATCH), 1, describe=True)
        first.forward(STEP, lambda: modules[0](*BATCH), 2, describe=True)
        received = [tensor.detach().requires_grad_() for tensor in sent.sent]
        loss = last.forward(STEP, lambda: modules[1](*BATCH), 1, received, sent.templates).returned
        with last.drawing(1):
            loss.backward()
        with first.drawing(1):
            torch.autograd.backward(sent.sent, [leaf.grad for leaf in received])
        gradient = modules[0].blocks[0].weight.grad
        assert gradient is not None
        return gradient

    assert torch.equal(gradient(of_one_process, [together, together]), gradient(a_process_each, apart))
    assert together.count == apart[1].count == 1


def test_a_single_stage_without_randomness_takes_no_part_in_it() -> None:
    """Whatever the step may draw later is drawn as without a pipeline."""
    module = Blocks(dropout=0.0)
    cut = cut_of(module, BATCH, 1)
    assert not cut.steps[STEP].draws
    drawn: list[Tensor] = []
    stage = StageModule(module, cut, 0, CPU)
    for seed in (1, 1):
        stage.forward(STEP, lambda: drawn.append(torch.rand(3)), seed)
    assert not torch.equal(*drawn)


def test_it_knows_its_place() -> None:
    module = Blocks()
    cut = cut_of(module, BATCH, 3)
    stages = [StageModule(module, cut, stage, CPU) for stage in range(3)]
    assert [stage.is_last for stage in stages] == [False, False, True]
    assert {stage.num_stages for stage in stages} == {3}


def test_the_module_is_as_it_was_afterwards() -> None:
    module = Blocks()
    before = {name: dict(each.__dict__) for name, each in module.named_modules()}
    stage = StageModule(module, cut_of(module, BATCH, 3), 1, CPU)
    assert any(each._forward_hooks for each in module.modules())
    stage.remove()
    assert {name: dict(each.__dict__) for name, each in module.named_modules()} == before
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
