"""Modules that try to be right whole and wrong in stages, each with its story.

A story ends in one of three ways: the stages give what the whole module gives, the cut is refused at set-up, or the
step that differs from the first one fails. None ends in other numbers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.errors import AbsentWeightError, CutError, DataMismatchError
from tests.helpers.chains import WIDTH, Block, Blocks, batches, linear
from tests.helpers.probing import Stages, check_cut, cut_of

# ---- right in stages ----


class RemembersInside(Block):
    """A recurrent state on an attribute of the block, carried from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.cell(x, None if self.state is None else self.state.detach())
        return self.state


class RemembersAtTheRoot(Blocks):
    """The same state on the root, as users of `nn.LSTM` keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.state: Tensor | None = None

    def body(self, x: Tensor) -> Tensor:
        self.state = self.cell(x, None if self.state is None else self.state.detach())
        return super().body(self.state)


class UsesLastStepsOutput(Blocks):
    """What an early block made in the step before is part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Tensor = torch.zeros(4, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        early, late = self.ends(x)
        before, self.before = self.before, early.detach()
        return F.mse_loss(late + before, y)


class BindsBuffer(Blocks):
    """A running mean that is bound anew, not written; of a value that crosses for nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        early, late = self.ends(x)
        self.center = 0.9 * self.center + 0.1 * early.detach().mean(0)
        return F.mse_loss(late - self.center, y)


class Watches(Blocks):
    """Statistics of an early output, gathered at the end for nobody in this step."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH, affine=False)

    def body(self, x: Tensor) -> Tensor:
        early, late = self.ends(x)
        self.statistics(early.detach())
        return late


class Hooked(Blocks):
    """The user's hooks change inputs and outputs; they run on every stage, but only once in effect."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))
            block.register_forward_hook(lambda module, args, output: output * 1.1)
            block.register_forward_hook(lambda module, args, output: output.mul_(0.7))


class HookedBackward(Blocks):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 0.5,))


class TakesFeatures(Blocks):
    """A hook takes an early output for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def body(self, x: Tensor) -> Tensor:
        self.features.clear()
        with self.blocks[0].register_forward_hook(lambda module, args, output: self.features.append(output)):
            return super().body(x) + self.features[0]


class WithoutGradient(Blocks):
    """The first two blocks are called under `no_grad`, like a teacher."""

    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.blocks[1](self.blocks[0](x))
        return self.blocks[3](self.blocks[2](x))


class SwitchesGradients(Blocks):
    """Calls `set_grad_enabled` as a function: a stage that ends in between must not leave it off."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = linear()

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        torch.set_grad_enabled(False)
        still = super().body(x)
        torch.set_grad_enabled(True)
        return still + x


class Where(Blocks):
    """An early output only chooses between two late ones."""

    def body(self, x: Tensor) -> Tensor:
        early, late = self.ends(x)
        return torch.where(early > 0, late, -late)


class Branches(Blocks):
    """Python decides by the sign of an early mean."""

    def body(self, x: Tensor) -> Tensor:
        early, late = self.ends(x)
        return late if early.mean() > 0 else 0.1 * late


class Guards(Blocks):
    """Python looks for numbers that the first batch does not have."""

    def body(self, x: Tensor) -> Tensor:
        early, late = self.ends(x)
        return late.clamp(-1, 1) if bool(early.abs().max() > 50) else late


class Signs(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = super().forward(x)
        return hidden, hidden > 0


class ComparesMasks(Blocks):
    """Two masks matter only where they differ, which they do as much when both are flipped."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Signs(), Signs()

    def body(self, x: Tensor) -> Tensor:
        x, mask = self.one(x)
        x, other = self.other(x)
        return super().body(x) * (mask != other)


class Idle(Block):
    """Returns its input unchanged: one tensor, the output of two modules."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Idles(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.blocks.insert(1, Idle())
        self.blocks.append(Idle())


class View(Block):
    """Returns views: transposed, expanded, and two of one tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = super().forward(x)
        return hidden.t(), hidden[:1].expand(4, -1), hidden[:, 1:]


class Views(Blocks):
    def __init__(self) -> None:
        super().__init__(View)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            turned, first, rest = block(x)
            x = turned.t() + first + F.pad(rest, (1, 0))
        return x


class Twice(Block):
    """Returns one tensor twice; both gradients count."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = super().forward(x)
        return hidden, hidden


class Twins(Blocks):
    def __init__(self) -> None:
        super().__init__(Twice)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            one, other = block(x)
            x = one * 0.3 + other * 0.5
        return x


class Listing(Block):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [super().forward(x)]


class ChangesList(Blocks):
    """The returned list is changed afterwards: appended to, overwritten and emptied."""

    def __init__(self) -> None:
        super().__init__(Listing)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            outputs = block(x)
            outputs.append(outputs[0] * 0.5)
            outputs[0] = outputs[0] + 1
            x = outputs.pop() + outputs.pop()
        return x


class ByName(Block):
    """Takes nothing by position."""

    def forward(self, *, hidden: Tensor, scale: float) -> dict[str, Any]:
        return {"hidden": super().forward(hidden), "scale": scale, "nothing": None}


class ByNames(Blocks):
    def __init__(self) -> None:
        super().__init__(ByName)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            output = block(hidden=x, scale=0.5)
            x = output["hidden"] * output["scale"]
        return x


class UsesWeightOnly(Blocks):
    """A module that is never called; its weight is used at the end, and its device at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.never = linear()

    def body(self, x: Tensor) -> Tensor:
        ones = torch.ones(WIDTH, device=next(self.parameters()).device, dtype=self.never.weight.dtype)
        return F.linear(super().body(x + ones), self.never.weight)


class CallsForward(Blocks):
    """Calls `forward` by hand, past the hooks of the block, and needs the result on both sides of the cut."""

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        late = early = self.blocks[0].forward(x)
        for block in self.blocks[1:]:
            late = block(late)
        return early, late

    def body(self, x: Tensor) -> Tensor:
        return sum(self.ends(x))


class GivesWeight(nn.Module):
    """A module that returns its parameter: tied weights in the only way that crosses a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self) -> Tensor:
        return self.weight


class SharesWeight(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.shared = GivesWeight()

    def body(self, x: Tensor) -> Tensor:
        weight = self.shared()
        return super().body(x @ weight) @ weight.t()


class OtherGenerators(Blocks):
    """The step draws from Python's and NumPy's generators, between the blocks too."""

    def body(self, x: Tensor) -> Tensor:
        x = x * random.random()
        for block in self.blocks:
            x = block(x) + float(np.random.rand())
        return x


class SparseGradient(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH, sparse=True)

    def body(self, x: Tensor) -> Tensor:
        return super().body(x + self.table(torch.arange(len(x))))


class Checkpointed(Block):
    """An activation checkpoint inside the block, with dropout."""

    use_reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(
            lambda x: self.drop(super(Checkpointed, self).forward(x)), x, use_reentrant=self.use_reentrant
        )


class CheckpointedReentrantly(Checkpointed):
    use_reentrant = True


class Checkpoints(Blocks):
    """Checkpoints inside the blocks, reentrant ones in the middle, and around whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = linear()
        self.blocks[0] = Checkpointed()
        self.blocks[1] = CheckpointedReentrantly()

    def body(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        return checkpoint(self.blocks[3], checkpoint(self.blocks[2], x, use_reentrant=False), use_reentrant=False)


class PenalizesGradient(Blocks):
    """A step that calls `autograd.grad` itself, on its own stage."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        late = self.body(x)
        loss = F.mse_loss(late, y)
        (gradient,) = torch.autograd.grad(loss, late, create_graph=True)
        return loss + gradient.square().sum()


class Normed(Blocks):
    """Weights that are computed from others, by parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.blocks[0].linear)
        nn.utils.parametrizations.spectral_norm(self.blocks[1].linear)
        nn.utils.parametrizations.orthogonal(self.blocks[3].linear)


class HalfPrecision(Blocks):
    """Autocast: what crosses is bfloat16."""

    def body(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = super().body(x)
        return x.float()


class Catches(Blocks):
    """Catches every `Exception` of its own step; the one that ends a stage is none."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        try:
            return super().forward(x, y)
        except Exception:
            return x.sum()


class AsksForGradient(Blocks):
    """Python decides by whether an early output has a gradient, which what stands for it has, too."""

    def body(self, x: Tensor) -> Tensor:
        early, late = self.ends(x)
        return late * 2 if early.requires_grad else late


RIGHT = [
    AsksForGradient,
    lambda: Blocks(RemembersInside),
    RemembersAtTheRoot,
    UsesLastStepsOutput,
    BindsBuffer,
    Watches,
    Hooked,
    HookedBackward,
    TakesFeatures,
    WithoutGradient,
    SwitchesGradients,
    Where,
    Branches,
    Guards,
    ComparesMasks,
    Idles,
    Views,
    Twins,
    ChangesList,
    ByNames,
    UsesWeightOnly,
    CallsForward,
    SharesWeight,
    OtherGenerators,
    SparseGradient,
    Checkpoints,
    PenalizesGradient,
    Normed,
    HalfPrecision,
    Catches,
]

SUMMED_IN_ANOTHER_ORDER = [TakesFeatures, CallsForward, SharesWeight, UsesWeightOnly]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_right_in_stages(kind: Callable[[], nn.Module], p: int) -> None:
    """In the third step, the numbers are beyond what the first one showed."""
    check_cut(kind(), batches(0, 1, 100), p, exact=kind not in SUMMED_IN_ANOTHER_ORDER)


def test_compiled_blocks_are_right_in_stages() -> None:
    """Wrapped, and compiled in place; what the probe runs is not compiled, or it would use up what torch allows."""
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        pytest.skip("torch.compile is switched off by TORCHDYNAMO_DISABLE")
    try:
        torch.compile(Block(), backend=backend)(torch.zeros(4, WIDTH))
    except Exception as error:
        pytest.skip(f"torch.compile does not work on this machine: {type(error).__name__}: {error}")
    module = Blocks(lambda: torch.compile(Block(), backend=backend))
    for number in (1, 3):
        module.blocks[number] = Block()
        module.blocks[number].compile(backend=backend)
    compiled.clear()
    cut_of(module, batches(0)[0], 2)
    assert not compiled
    check_cut(module, batches(0, 1), 2)
    assert compiled


def test_right_for_the_same_reason_without_the_comparison_with_the_uncut_module() -> None:
    for kind in (Branches, Guards, ComparesMasks, Where, UsesLastStepsOutput, RemembersAtTheRoot, Hooked):
        check_cut(kind(), batches(0, 1, 100), 3, check="fills")


def test_a_module_called_twice_draws_twice() -> None:
    """A dropout that is used in two places has two masks, and an activation checkpoint repeats each."""

    class DropsTwice(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Sequential(linear(), nn.Dropout(0.5))
            self.drop = nn.Dropout(0.5)
            self.masks: list[Tensor] = []

        def body(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.shared, x, use_reentrant=False)
            ones = torch.ones(4, WIDTH)
            self.masks = [self.drop(ones) != 0, self.drop(ones) != 0, self.shared[1](ones) != 0]
            return super().body(x) * self.masks[0]

    whole = DropsTwice()
    for p in (1, 2, 3):
        cut = check_cut(whole, batches(0, 0), p)
        assert {"drop", "shared.1"} <= cut.draws_repeatedly


@pytest.mark.parametrize("p", [1, 2])
def test_the_masks_of_a_repeated_module_differ(p: int) -> None:
    class Masks(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            ones = torch.ones(64)
            same = (self.drop(ones) == self.drop(ones)).all()
            return super().forward(x, y) + same * torch.tensor(1e6)

    cut = cut_of(Masks(), batches(0)[0], p)
    assert cut.draws_repeatedly == {"drop"}
    assert Stages(Masks(), cut).step(batches(0)[0]).loss < 1e6


# ---- refused at set-up ----


class Tracker(nn.Module):
    """Without weights, so that it runs on every stage, and remembers what it saw there."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Any = 0.0

    def forward(self, x: Tensor) -> Any:
        before, self.before = self.before, x.detach().mean()
        return before


class RemembersBetween(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        early, late = self.ends(x)
        return F.mse_loss(late, y) + self.tracker(early)


class Counts(Blocks):
    """A count that only the last stage comes to increase, and the first one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().forward(x * (1 + self.steps), y)
        self.steps += 1
        return loss


class SwitchesMode(Blocks):
    """A stage that ends between `eval` and `train` would stay in `eval`."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def body(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        self.eval()
        x = super().body(x)
        self.train()
        return x


class FeedsBack(Blocks):
    """What the end of a step learns, the beginning of the next one uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))

    def body(self, x: Tensor) -> Tensor:
        x = super().body(x + self.center)
        self.center = self.center + x.detach().mean(0)
        return x


class HooksTensors(Blocks):
    """A hook on a tensor that crosses would run on both sides."""

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient * 0.5)
        return x


class HooksGradients(Blocks):
    """The gradient of a block's input is scaled, which takes the gradient of its output to happen on one stage."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[1:]:
            block.register_full_backward_hook(lambda module, inputs, outputs: tuple(g * 0.5 for g in inputs))


class WritesOneOfTwins(Twins):
    """Writes into one name of a tensor and reads the other; on the next stage they are two tensors."""

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            one, other = block(x)
            one += 1
            x = other * 0.5
        return x


class WritesUnseen(Blocks):
    """Writes in place without autograd's knowledge."""

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x.data.mul_(2)
        return x


class DrawsInPython(Block):
    """Draws from Python's generator inside a block, where the next stage does not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


class PenalizesInputGradient(Blocks):
    """A gradient of the output by the input passes every stage twice."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        late = self.body(x)
        (gradient,) = torch.autograd.grad(late.sum(), x, create_graph=True)
        return F.mse_loss(late, y) + gradient.square().sum()


REFUSED = [
    RemembersBetween,
    Counts,
    SwitchesMode,
    FeedsBack,
    HooksTensors,
    HooksGradients,
    WritesOneOfTwins,
    WritesUnseen,
    lambda: Blocks(DrawsInPython),
    PenalizesInputGradient,
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused_at_set_up(kind: Callable[[], nn.Module], p: int) -> None:
    with pytest.raises(CutError, match="split_points"):
        cut_of(kind(), batches(0)[0], p)


SEEN_BY_GRADIENTS_ALONE = (HooksTensors, HooksGradients)


@pytest.mark.parametrize(
    "kind", [kind for kind in REFUSED if kind not in SEEN_BY_GRADIENTS_ALONE], ids=lambda kind: kind.__name__
)
def test_refused_without_the_comparison_of_gradients(kind: Callable[[], nn.Module]) -> None:
    """Large modules are compared in two steps, but their gradients are not."""
    with pytest.raises(CutError, match="split_points"):
        cut_of(kind(), batches(0)[0], 2, check="fills")


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_one_stage_runs_it(kind: Callable[[], nn.Module]) -> None:
    check_cut(kind(), batches(0, 1), 1)


def test_attributes_that_outlive_a_step_are_named() -> None:
    with pytest.raises(CutError, match=r"in a second step.*Attributes that the step changes: steps"):
        cut_of(Counts(), batches(0)[0], 2)
    with pytest.raises(CutError, match=r"in a second step.*Attributes that the step changes: tracker\.before"):
        cut_of(RemembersBetween(), batches(0)[0], 2)


def test_buffers_are_not_suspected() -> None:
    """They change in every step, where they belong."""
    module = Counts()
    module.blocks.insert(1, nn.BatchNorm1d(WIDTH))
    with pytest.raises(CutError, match=r"the step changes: steps\. Return"):
        cut_of(module, batches(0)[0], 2)


# ---- a later step that is not like the first ----


class ReturnsNumber(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return super().forward(x), x.mean().item()


class ReturnsNumbers(Blocks):
    """A Python number does not travel: on the next stage it would be that of the first batch for ever."""

    def __init__(self) -> None:
        super().__init__(ReturnsNumber)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, mean = block(x)
            x = x * mean
        return x


class ReturnsMoreOrLess(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = super().forward(x)
        return hidden, hidden.square().mean() if x.mean() > 10 else None


class StructureVaries(Blocks):
    """An extra loss that the first batch does not have."""

    def __init__(self) -> None:
        super().__init__(ReturnsMoreOrLess)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        extra: Any = 0.0
        for block in self.blocks:
            x, more = block(x)
            extra = extra if more is None else extra + more
        return F.mse_loss(x, y) + extra


class Selects(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = super().forward(x)
        return hidden, hidden[x[:, 0] > 10]


class ShapeVaries(Blocks):
    """How many rows were selected is part of the loss; the numbers in them are not."""

    def __init__(self) -> None:
        super().__init__(Selects)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        count = 1
        for block in self.blocks:
            x, selected = block(x)
            count += len(selected)
        return F.mse_loss(x, y) / count


class Skips(Blocks):
    """A later batch leaves out the layer where the next stage begins."""

    def body(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number != 2 or x.mean() < 10:
                x = block(x)
        return x


class EndsEarly(Blocks):
    """A later batch never comes to the next stage."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        early = self.blocks[1](self.blocks[0](x))
        if x.mean() > 10:
            return F.mse_loss(early, y)
        return F.mse_loss(self.blocks[3](self.blocks[2](early)), y)


class Repeats(Blocks):
    """A later batch goes through a block once more."""

    def body(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1 and x.mean() > 10:
                x = block(x)
        return x


class WakesUp(Blocks):
    """A layer that the first batch left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeping = linear()

    def body(self, x: Tensor) -> Tensor:
        return super().body(self.sleeping(x) if x.mean() > 10 else x)


class WritesLater(Blocks):
    """Writes in place into what crosses, but not for the first batch."""

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.mean() > 10:
                x += 1
        return x


LATER: dict[type[Blocks], tuple[type[Exception], str]] = {
    ReturnsNumbers: (DataMismatchError, "'blocks.0' returned something else .* in place of .* Return a tensor"),
    StructureVaries: (DataMismatchError, "'blocks.0' returned something else .*: .* in place of None"),
    ShapeVaries: (
        DataMismatchError,
        r"'blocks.0' returned something else .*float32\[4, 6\] in place of float32\[0, 6\]",
    ),
    Skips: (AbsentWeightError, "stage 0 used the parameter 'blocks.3.linear.weight'"),
    EndsEarly: (CutError, "never reached 'blocks.2'"),
    Repeats: (CutError, "called 2 times on stage 1, more often than for the first"),
    WakesUp: (AbsentWeightError, "'sleeping.weight'"),
    WritesLater: (DataMismatchError, "written in place between the module and the cut"),
}


@pytest.mark.parametrize("kind", LATER, ids=lambda kind: kind.__name__)
def test_a_step_unlike_the_first_fails(kind: type[Blocks]) -> None:
    error, words = LATER[kind]
    with pytest.raises(error, match=words):
        check_cut(kind(), batches(0, 100), 2, split_points=["blocks.2"])
