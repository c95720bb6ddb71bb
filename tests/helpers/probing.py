"""Cuts plain modules, and rehearses their stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.engine.rehearsal import Passed, Rehearsal, added
from lightning_cpipe.equality import close, same_bits
from lightning_cpipe.probe.step import Observed, Step
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.randomness import seeded
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.strategy.setup.probing import find_cut
from lightning_cpipe.tree import flatten, signature

CPU = torch.device("cpu")
STEP = "training_step"
SEED = 11

Run = Callable[[nn.Module, Any], Any]
"""A step of a module on a batch. Gives the loss, or `Observed`."""


def forward_of(module: nn.Module, batch: Any) -> Any:
    """The step of most modules here: `forward` gives the loss."""
    return module(*batch)


def step_of(root: nn.Module, batch: Any, run: Run = forward_of, name: str = STEP, seed: int = SEED) -> Step:
    """A step of a plain module, as the strategy makes it of a LightningModule."""
    trains = name == STEP

    def call() -> Observed:
        if not trains:
            root.eval()
        # A step may write into its batch.
        return observed(run(root, copy.deepcopy(batch)), trains)

    return Step(name, call, trains, seed, signature(batch))


def observed(returned: Any, trains: bool) -> Observed:
    """What a step returned, as the probe looks at it."""
    if isinstance(returned, Observed):
        return returned
    return Observed(returned, None) if trains else Observed(None, returned)


def cut_of(
    root: nn.Module,
    batch: Any,
    num_stages: int,
    split_points: str | Sequence[str] = "auto",
    check: Any = "auto",
    run: Run = forward_of,
    others: Mapping[str, Run] | None = None,
) -> Cut:
    """Cut a plain module; `others` are steps that do not train, by name."""
    steps = [step_of(root, batch, run), *(step_of(root, batch, each, name) for name, each in (others or {}).items())]
    return find_cut(root, steps, num_stages, split_points, CPU, check)


@dataclass
class Result:
    """What a step of training gave, of the whole module or of its stages.

    Attributes:
        loss: of the mini-batch.
        facts: what else it gave.
        gradients: of each parameter that got one.
        buffers: afterwards; of the stages, each from its home.
    """

    loss: Tensor
    facts: Any
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Whole:
    """A copy of the uncut module, to compare with.

    Args:
        root: is copied.
        run: the step.
        cut: the same module's cut into one stage, if it draws random numbers: what a pipeline of one stage draws is
            what any other must draw.
    """

    def __init__(self, root: nn.Module, run: Run = forward_of, cut: Cut | None = None) -> None:
        self.module = copy.deepcopy(root)
        self._run = run
        self._stage = None if cut is None else StageModule(self.module, cut, 0, CPU)

    def step(self, batch: Any, seed: int = SEED) -> Result:
        """One step: forward and backward."""
        batch = copy.deepcopy(batch)
        if self._stage is None:
            with seeded(seed):
                made = observed(self._run(self.module, batch), True)
        else:
            made = self._stage.forward(STEP, lambda: observed(self._run(self.module, batch), True), seed).returned
        with nullcontext() if self._stage is None else self._stage.drawing(seed):
            made.loss.backward()
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        for parameter in self.module.parameters():
            parameter.grad = None
        buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        return Result(made.loss.detach(), made.output, gradients, buffers)


class Stages:
    """A rehearsal of a plain module's stages.

    Attributes:
        modules: a copy for each stage, without the weights of the others.
    """

    def __init__(self, root: nn.Module, cut: Cut, run: Run = forward_of) -> None:
        self._rehearsal = Rehearsal(root, cut, CPU)
        self.modules = self._rehearsal.modules
        self._run = run

    def step(self, batch: Any, seed: int = SEED) -> Result:
        """One step: the forwards from the first stage to the last, the backwards in the other direction."""
        passed = self._forward(STEP, self._run, batch, seed)
        made = passed[-1].returned
        by_stage = self._rehearsal.backward(passed, made.loss, seed)
        for stage, gradients in enumerate(by_stage):
            elsewhere = [name for name in gradients if stage not in self._rehearsal.cut.trained_on[name]]
            assert not elsewhere, f"{elsewhere} get a gradient on stage {stage}"
        return Result(made.loss.detach(), made.output, added(by_stage), self._rehearsal.buffers())

    def evaluate(self, name: str, run: Run, batch: Any, seed: int = SEED) -> Any:
        """A step that does not train: what it returned."""
        with torch.no_grad():
            return self._forward(name, run, batch, seed)[-1].returned.output

    def _forward(self, name: str, run: Run, batch: Any, seed: int) -> list[Passed]:
        def call(module: nn.Module) -> Observed:
            return observed(run(module, copy.deepcopy(batch)), name == STEP)

        return self._rehearsal.forward(name, call, signature(batch), seed)


def require_same(stages: Result, whole: Result, exact: bool = True) -> None:
    """The stages made what the whole module makes; to the bit, or up to rounding."""
    same = same_bits if exact else close
    assert same_bits([stages.loss], [whole.loss]), f"loss {stages.loss} instead of {whole.loss}"
    assert same_bits(flatten(stages.facts)[0], flatten(whole.facts)[0])
    assert stages.gradients.keys() == whole.gradients.keys()
    different = [n for n in whole.gradients if not same([_dense(stages.gradients[n])], [_dense(whole.gradients[n])])]
    assert not different, f"gradients differ: {different}"
    different = [n for n in whole.buffers if not same_bits([stages.buffers[n]], [whole.buffers[n]])]
    assert not different, f"buffers differ: {different}"


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def check_cut(
    root: nn.Module,
    batches: Sequence[Any],
    num_stages: int,
    *,
    run: Run = forward_of,
    exact: bool = True,
    check: Any = "auto",
    split_points: str | Sequence[str] = "auto",
) -> Cut:
    """Cut `root` at the first batch; all batches then give the uncut module's loss, gradients and buffers."""
    cut = cut_of(root, copy.deepcopy(batches[0]), num_stages, split_points, check, run)
    alone = cut_of(root, copy.deepcopy(batches[0]), 1, run=run) if cut.steps[STEP].draws else None
    whole, stages = Whole(root, run, alone), Stages(root, cut, run)
    for number, batch in enumerate(batches):
        require_same(stages.step(batch, SEED + number), whole.step(batch, SEED + number), exact)
    return cut
