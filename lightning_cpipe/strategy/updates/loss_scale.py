"""The loss scale of `16-mixed`, in a pipeline.

Plain training scales the loss, divides the gradients by the scale, leaves out an update whose gradients overflowed, and
lowers the scale then. Here the last stage has the scale, since it makes the loss, and every stage divides by the scale
that the last one had for the same mini-batches.

Where an update is left out must not make any stage wait. A stage knows of itself and of those after it:

    a stage leaves out its update if its own gradient, or that of a stage after it, is not finite

What overflows on its way to the first stage is not finite there, either, so this leaves out what is broken and
keeps what is right. The last stage lowers the scale for an overflow that began on an earlier stage, too, as soon as it
hears of it: by the plan of `PartialSums`, some updates later. In flush schedules, where all gradients are there before
any stage updates, all leave it out or none, as in plain Lightning.
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

SCALE_AND_OVERFLOW = TensorSpec((2,), torch.float64)
"""The scale, from the last stage alone; and how many stages' gradients are not finite."""


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
        is_last: whether the rank holds the last stage.
    """

    def __init__(
        self, scaler: GradScaler, device: torch.device, by_stage: ByStage, training: TrainingStream, *, is_last: bool
    ) -> None:
        super().__init__(scaler, device)
        self._by_stage = by_stage
        self._training = training
        self._is_last = is_last

    @override
    def parameters(self, optimizer: Optimizer) -> list[list[nn.Parameter]]:
        return self._by_stage.parameters(optimizer)

    @override
    def agree(self, overflows: Sequence[Tensor]) -> Agreed:
        scales = [torch.zeros_like(each) for each in overflows]
        if self._is_last:
            scales[-1] = self.own_scale().double()
        own = [torch.stack(each) for each in zip(scales, overflows)]
        known = self._training.tell(SCALES, own, _begun_here)
        last = known[-1]
        return Agreed(last.onward[0], [each.onward[1] for each in known], last.onward[1] + last.before[1])

    @override
    def update(self, new_scale: float | Tensor | None = None) -> None:
        if new_scale is None and self._agreed is not None and not self._is_last:
            # So that the scaler says what the last stage's did.
            new_scale = self._agreed.scale.float()
        super().update(new_scale)


def _begun_here(own: Tensor, onward: Tensor) -> Tensor:
    """An overflow counts where it began: what comes from there is not finite on any stage before."""
    return torch.where(onward == own, own, 0.0)
