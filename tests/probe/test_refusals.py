"""What can't run in stages is refused at set-up, with an error that names the place and says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.errors import CutError
from tests.helpers.chains import WIDTH, Block, Blocks, batches
from tests.helpers.probing import check_cut, cut_of


class LeavesLoss(Block):
    """Leaves a loss on an attribute, as layers with experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.balance: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        self.balance = hidden.square().mean()
        return hidden


class LossOnAttribute(Blocks):
    def __init__(self) -> None:
        super().__init__(LeavesLoss)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().forward(x, y)
        return loss + sum(block.balance for block in self.blocks)


class LossOnNewAttribute(LossOnAttribute):
    """The attribute is not there before the first step."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            del block.balance


class Penalty(Blocks):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) + sum(parameter.square().sum() for parameter in self.parameters())


class PenaltyWithoutGradient(Blocks):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) * sum(parameter.detach().square().sum() for parameter in self.parameters())


class TiedMemory(Blocks):
    """Two parameters, one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[3].linear.weight = nn.Parameter(self.blocks[0].linear.weight.data)


class TiedStatistics(Blocks):
    """A norm without weights, whose statistics both stages would gather."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.norm(block(x))
        return x


class TwoPasses(Blocks):
    """Two views of a batch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), self.body(y))


class WritesParameter(Blocks):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            self.blocks[2].linear.weight.clamp_(-0.1, 0.1)
        return super().forward(x, y)


class BindsParameter(Blocks):
    """Gives a parameter other memory, of which autograd knows nothing."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = self.blocks[2].linear.weight
        weight.data = F.normalize(weight.data)
        return super().forward(x, y)


class OtherStagesNumbers(Blocks):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(F.linear(self.body(x), self.blocks[0].linear.weight.detach()), y)


class CheckpointAcross(Blocks):
    """An activation checkpoint around all blocks."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(checkpoint(self.body, x, use_reentrant=False), y)


class ReentrantCheckpoints(Blocks):
    """Hands over from inside a checkpoint, where nothing has a gradient."""

    def body(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return x


class Output:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class OpaqueBlock(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Output]:
        hidden = super().forward(x)
        return hidden, Output(hidden.detach())


class Opaque(Blocks):
    """Uses a tensor inside an object that nobody can take apart."""

    def __init__(self) -> None:
        super().__init__(OpaqueBlock)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        extra = 0.0
        for block in self.blocks:
            x, output = block(x)
            extra = extra + output.hidden.square().mean()
        return F.mse_loss(x, y) + extra


class CatchesAll(Blocks):
    """Catches the exception that ends a stage."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        try:
            return super().forward(x, y)
        except BaseException:
            return x.sum()


REFUSED: dict[type[Blocks], list[str]] = {
    LossOnAttribute: ["cut at ", "blocks.0.balance", "Return the value", "split_points"],
    LossOnNewAttribute: ["cut at ", "AttributeError", "blocks.0.balance", "Return the value", "split_points"],
    Penalty: ["get a gradient on stage 0 gets one on another", "blocks.0.", "penalty", "weight_decay"],
    PenaltyWithoutGradient: ["blocks.0.linear.weight", "trained on another", "Use it inside the module"],
    TiedMemory: ["'blocks.0.linear.weight'", "'blocks.3.linear.weight'", "share memory", "one `nn.Parameter`"],
    TiedStatistics: ["'norm' is called on both sides of a cut and writes buffers", "split_points"],
    TwoPasses: ["TwoPasses has 0", "Called more often: blocks.0, blocks.1, blocks.2, blocks.3", "split_points"],
    WritesParameter: ["'blocks.2.linear.weight' in place", "optimizer", "buffer"],
    BindsParameter: ["'blocks.2.linear.weight' in place", "optimizer", "buffer"],
    OtherStagesNumbers: ["uses the numbers of blocks.0.linear.weight", "trained on another stage", "split_points"],
    CheckpointAcross: ["cut at ", "CheckpointError"],
    ReentrantCheckpoints: [".linear.weight", "activation checkpoint", "use_reentrant=False"],
    Opaque: ["`.hidden`", "class Output", "dataclasses"],
    CatchesAll: ["never reached 'blocks.", "Every step must call it exactly once"],
}


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused_by_name(kind: type[Blocks], p: int) -> None:
    with pytest.raises(CutError) as caught:
        cut_of(kind(), batches(0)[0], p)
    assert [words for words in REFUSED[kind] if words not in str(caught.value)] == []


FOR_ANY_NUMBER_OF_STAGES = (WritesParameter, BindsParameter, TwoPasses)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind not in FOR_ANY_NUMBER_OF_STAGES])
def test_one_stage_refuses_nothing(kind: type[Blocks]) -> None:
    check_cut(kind(), [batches(0)[0]], 1)


UNSEEN_BY_FILLS = (CheckpointAcross,)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind not in UNSEEN_BY_FILLS])
def test_refused_without_the_comparison_with_the_uncut_module(kind: type[Blocks]) -> None:
    """Large modules are not compared as a whole."""
    with pytest.raises(CutError):
        cut_of(kind(), batches(0)[0], 3, check="fills")


@pytest.mark.parametrize(
    ("p", "options", "words"),
    [
        (5, {}, ["5 stages need as many blocks", "Blocks has 4", "blocks.0, blocks.1", "Lower `devices`"]),
        (2, {"split_points": ["blocks.9"]}, ["does not have: blocks.9", "could begin: blocks.0, blocks.1"]),
        (3, {"split_points": ["blocks.1"]}, ["3 stages begin at 2 split points", "has 1"]),
        (3, {"split_points": ["blocks.2", "blocks.1"]}, ["another order", "Reorder `split_points`"]),
        (2, {"split_points": ["blocks"]}, ["can't begin at 'blocks'", "is not called", "other modules"]),
    ],
)
def test_places_that_are_no_place_to_cut_are_refused(p: int, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CutError) as caught:
        cut_of(Blocks(), batches(0)[0], p, **options)
    assert [each for each in words if each not in str(caught.value)] == []


@pytest.mark.parametrize("points", [["blocks.1"], ["blocks.2.linear"], ["blocks.3"]])
def test_split_points_say_where_stages_begin(points: list[str]) -> None:
    cut = check_cut(Blocks(), [batches(0)[0]], 2, split_points=points)
    assert cut.starts == tuple(points)


class Routed(Blocks):
    """A hook takes from the first block what goes into the loss: nothing as a number, but a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []
        self.blocks[0].linear.register_forward_hook(lambda module, args, output: self.taken.append(output))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.taken.clear()
        loss = super().forward(x, y)
        return loss + sum((each - each.detach()).sum() for each in self.taken)


@pytest.mark.parametrize("p", [2, 3])
def test_a_gradient_past_the_cut_is_refused_where_the_module_is_too_big_to_compare(p: int) -> None:
    with pytest.raises(CutError, match=r"depends on 'blocks.0.linear.weight' past what crosses to stage 1.*by a hook"):
        cut_of(Routed(), batches(0)[0], p, check="fills")


@pytest.mark.parametrize("p", [2, 3])
def test_what_crosses_as_it_should_is_not_refused_there(p: int) -> None:
    cut_of(Blocks(), batches(0)[0], p, check="fills")
