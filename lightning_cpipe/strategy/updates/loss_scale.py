"""The loss scale of `16-mixed`, in a pipeline.

Plain training scales the loss, divides the gradients by the scale, leaves out an update whose gradients overflowed, and
lowers the scale then. Here the last stage has the scale, since it makes the loss, and every stage divides by the scale
that the last one had for the same mini-batches.

Where an update is left out must not make any stage wait. A stage knows of itself and of those after it:

    a stage leaves out its update if its own gradient, or that of a stage after it, is not finite

What overflows on its way to the first stage is not finite there, either, so this leaves out what is broken and
keeps what is right. The last stage hears of an overflow that began on an earlier stage, too, by the plan of
`PartialSums`, some updates later. Until then the same scale overflows in what follows. So a stage tells the scale with
the overflow, and

    an overflow lowers the scale if it was not lowered below the one that overflowed meanwhile

Each scale that is too high is lowered once, as in plain training, however many mini-batches had it. In flush schedules,
where all gradients are there before any stage updates, all leave it out or none, as in plain Lightning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cpipe.engine.training import TrainingStream
from lightning_cpipe.strategy.checkpoints.optimizer_states import parameters_of
from lightning_cpipe.strategy.lightning_private import instead_of
from lightning_cpipe.strategy.updates.by_stage import ByStage, gradients_of
from lightning_cpipe.strategy.updates.clipping import norm_of
from lightning_cpipe.torch_private import scale_all
from lightning_cpipe.transport.control import Control
from lightning_cpipe.tree import TensorSpec

SCALES = "scales"
"""What the stages of a continuous pipeline tell each other in every update."""


def scale_and_overflows(num_stages: int) -> TensorSpec:
    """The scale, from the last stage alone; then for each stage whether its gradient is not finite.

    To the stages before goes 1 for such a stage; to those after it, the scale that overflowed.
    """
    return TensorSpec((1 + num_stages,), torch.float64)


class Agreed(NamedTuple):
    """What is known in one update.

    Attributes:
        scale: of the loss that the gradients are of.
        left_out: for each of the rank's stages, more than 0 if its update is left out.
        overflow: more than 0 if the scale is to be lowered.
    """

    scale: Tensor
    left_out: Sequence[Tensor]
    overflow: Tensor


class LossScale(ABC):
    """Stands in a scaler for what it does with gradients; its state stays its own.

    Args:
        scaler: of this rank.
        device: where the stages compute.
    """

    def __init__(self, scaler: GradScaler, device: torch.device) -> None:
        self._scaler = scaler
        self._device = device
        self._unscale, self._update = scaler.unscale_, scaler.update
        self._agreed: Agreed | None = None

    @abstractmethod
    def parameters(self, optimizer: Optimizer) -> list[list[nn.Parameter]]:
        """Those that are left out together."""

    @abstractmethod
    def agree(self, overflows: Sequence[Tensor]) -> Agreed:
        """Learn what is known in this update; `overflows` are 1 where gradients are not finite, and 0 elsewhere."""

    def take_over(self) -> list[Callable[[], None]]:
        """Stand in; returns functions that undo it."""
        parts: dict[str, Callable[..., Any]] = {"unscale_": self.unscale, "step": self.step, "update": self.update}
        return [instead_of(self._scaler, name, part) for name, part in parts.items()]

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, and drop those of stages whose update is left out."""
        parameters = self.parameters(optimizer)
        norms = [norm_of(gradients_of(own)).to(self._device) for own in parameters]
        self._agreed = self.agree([(~norm.isfinite()).double() for norm in norms])
        if gradients := gradients_of(parameters_of(optimizer)):
            scale_all(gradients, self._agreed.scale.double().reciprocal().float())
        # The one wait for the device that `GradScaler.step` has, too.
        for own, left_out in zip(parameters, torch.stack(list(self._agreed.left_out)).tolist()):
            if left_out:
                for parameter in own:
                    # An optimizer passes over what has no gradient.
                    parameter.grad = None

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Update what is not left out."""
        if self._agreed is None:
            self.unscale(optimizer)
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Lower or raise the scale for what comes next, by the scaler's own rule."""
        agreed, self._agreed = self._agreed, None
        if new_scale is not None or agreed is None:
            self._update(new_scale)
            return
        # The scaler looks at gradients: here is one.
        witness = nn.Parameter(torch.zeros((), device=self._device))
        witness.grad = torch.where(agreed.overflow > 0, torch.inf, 0.0).to(torch.float32)
        self._unscale(torch.optim.SGD([witness], lr=0.0))
        self._update()

    def own_scale(self) -> Tensor:
        """This rank's, on its device: nothing waits for it."""
        scale: Tensor = self._scaler.scale(torch.ones((), device=self._device))
        return scale


class AtFlush(LossScale):
    """Where all ranks' gradients are there before any updates; all have the same scale, without a word.

    Args:
        scaler: of this rank.
        device: where the stages compute.
        control: where overflows are compared.
    """

    def __init__(self, scaler: GradScaler, device: torch.device, control: Control) -> None:
        super().__init__(scaler, device)
        self._control = control

    @override
    def parameters(self, optimizer: Optimizer) -> list[list[nn.Parameter]]:
        return [parameters_of(optimizer)]

    @override
    def agree(self, overflows: Sequence[Tensor]) -> Agreed:
        overflow = torch.tensor(float(sum(self._control.compare(sum(each.item() for each in overflows)))))
        return Agreed(self.own_scale(), [overflow], overflow.to(self._device))


class LastStages(LossScale):
    """Where the last stage updates first.

    Args:
        scaler: of this rank.
        device: where the stages compute.
        by_stage: whose the parameters are.
        training: of this rank, with the sums over stages.
        num_stages: p.
    """

    def __init__(
        self, scaler: GradScaler, device: torch.device, by_stage: ByStage, training: TrainingStream, num_stages: int
    ) -> None:
        super().__init__(scaler, device)
        self._by_stage = by_stage
        self._training = training
        self._num_stages = num_stages
        self._is_last = num_stages - 1 in training.stages

    @override
    def parameters(self, optimizer: Optimizer) -> list[list[nn.Parameter]]:
        return self._by_stage.parameters(optimizer)

    @override
    def agree(self, overflows: Sequence[Tensor]) -> Agreed:
        own = [torch.zeros(1 + self._num_stages, dtype=torch.float64, device=self._device) for _ in overflows]
        for stage, each, overflow in zip(sorted(self._training.stages), own, overflows):
            each[1 + stage] = overflow
        if self._is_last:
            own[-1][0] = self.own_scale()
        known = self._training.tell(SCALES, own, _begun_here)
        last = known[-1]
        scale, *_ = last.onward
        overflowed = last.before[1:]
        overflow = last.onward[1:].sum() + ((overflowed > 0) & (overflowed <= scale)).sum()
        return Agreed(scale, [each.onward[1:].sum() for each in known], overflow)

    @override
    def update(self, new_scale: float | Tensor | None = None) -> None:
        if new_scale is None and self._agreed is not None and not self._is_last:
            # So that the scaler says what the last stage's did.
            new_scale = self._agreed.scale.float()
        super().update(new_scale)


def _begun_here(own: Tensor, onward: Tensor) -> Tensor:
    """An overflow counts where it began: what comes from there is not finite on any stage before."""
    scale, overflows = onward[:1], onward[1:]
    began = torch.where(own[1:].sum() == overflows.sum(), own[1:] * scale, 0.0)
    return torch.cat([torch.zeros_like(scale), began])
