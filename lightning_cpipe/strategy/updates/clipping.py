"""The norm of the gradients of all stages, as far as it is known before an update, and clipping by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpipe.engine.partial_sums import Sums
from lightning_cpipe.engine.training import TrainingStream
from lightning_cpipe.strategy.checkpoints.optimizer_states import parameters_of
from lightning_cpipe.strategy.checkpoints.whole import Whole
from lightning_cpipe.strategy.lightning_private import instead_of
from lightning_cpipe.strategy.options import Clip
from lightning_cpipe.strategy.ranks.processes import Processes
from lightning_cpipe.strategy.updates.by_stage import ByStage, gradients_of
from lightning_cpipe.torch_private import norms_of, scale_all
from lightning_cpipe.tree import TensorSpec

NORMS = "norms"
"""What the stages of a continuous pipeline tell each other in every update in which the norm is asked for."""

SQUARES = TensorSpec((), torch.float64)
"""In double precision, so that the root of a square is the number that was squared."""


class Norms(ABC):
    """What one rank knows of the norm of all gradients when it updates."""

    @abstractmethod
    def full(self, optimizer: Optimizer) -> Tensor:
        """The norm of the gradients of all stages, as far as it is known; all ranks must ask in the same updates."""

    @abstractmethod
    def clip(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip the gradients of this rank's stages by norm."""

    def take_over(self, precision: Precision) -> Callable[[], None]:
        """Let Lightning clip by these; returns a function that undoes it."""
        return instead_of(precision, "clip_grad_by_norm", self.clip)


class OfOneStage(Norms):
    """Where one stage holds all gradients, Lightning clips them."""

    def full(self, optimizer: Optimizer) -> Tensor:
        return norm_of(gradients_of(parameters_of(optimizer)))

    def clip(self, optimizer: Optimizer, clip_val: float) -> None:
        nn.utils.clip_grad_norm_(parameters_of(optimizer), clip_val)


class Exact(Norms):
    """That of the uncut module's gradients, to the bit, where no stage updates before all have theirs.

    Args:
        whole: this rank's share in the whole.
        processes: among which those of this pipeline compare the norms.
    """

    def __init__(self, whole: Whole, processes: Processes) -> None:
        self._whole = whole
        self._processes = processes

    def full(self, optimizer: Optimizer) -> Tensor:
        """The norm of the norms of all gradients, in the order of the whole optimizer's parameters."""
        placed = [(place, each.grad) for place, each in self._whole.placed(optimizer) if each.grad is not None]
        norms = norms_of([gradient for _, gradient in placed]) if placed else []
        # One wait for the device, however many they are.
        own = torch.stack([norm.to(norms[0].device) for norm in norms]).cpu() if norms else torch.zeros(0)
        found = self._processes.control.compare(([place for place, _ in placed], own))
        everyones = self._processes.of_pipeline(found, self._processes.replica)
        by_place = sorted((place, norm) for places, found in everyones for place, norm in zip(places, found.unbind()))
        if not by_place:
            return torch.zeros(())
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm for _, norm in by_place]))
        return total

    def clip(self, optimizer: Optimizer, clip_val: float) -> None:
        _clip(gradients_of(parameters_of(optimizer)), self.full(optimizer), clip_val)


class InTime(Norms):
    """What a stage of a continuous pipeline knows of the others' norms without waiting for any.

    Args:
        clip: by which norm.
        by_stage: whose the parameters are.
        training: of this rank, with the sums of squares of all stages.
        device: where the stages compute.
    """

    def __init__(self, clip: Clip, by_stage: ByStage, training: TrainingStream, device: torch.device) -> None:
        self._clip = clip
        self._by_stage = by_stage
        self._training = training
        self._device = device
        self._told_in = -1
        self._known: list[Sums] = []

    def full(self, optimizer: Optimizer) -> Tensor:
        """As the last of the rank's stages knows it: of the stages before it, the norms of earlier updates."""
        return self._learn(optimizer)[-1]

    def clip(self, optimizer: Optimizer, clip_val: float) -> None:
        for gradients, total in zip(self._by_stage.gradients(optimizer), self._learn(optimizer, self._clip)):
            _clip(gradients, total, clip_val)

    def _learn(self, optimizer: Optimizer, clip: Clip = "lagged") -> list[Tensor]:
        """The norm that each stage knows, of the gradients as they were when it was first asked for in this update."""
        own = [norm_of(each) for each in self._by_stage.gradients(optimizer)]
        if clip == "stage":
            return own
        if self._told_in != (update := self._training.updates):
            self._known = self._training.tell(NORMS, [norm.to(self._device, torch.float64) ** 2 for norm in own])
            self._told_in = update
        squares = [known.onward + known.before if clip == "lagged" else known.onward for known in self._known]
        return [each.sqrt().to(norm.dtype) for each, norm in zip(squares, own)]


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Of all together, as `torch.nn.utils.clip_grad_norm_` computes it; 0 where there are none."""
    if not gradients:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(gradients[0].device) for norm in norms_of(gradients)])
    )
    return total


def _clip(gradients: Sequence[Tensor], total: Tensor, clip_val: float) -> None:
    if gradients:
        scale_all(gradients, torch.clamp(clip_val / (total + 1e-6), max=1.0))
