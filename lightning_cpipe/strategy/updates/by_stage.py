"""Which of an optimizer's parameters belong to which of a rank's stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.strategy.checkpoints.optimizer_states import parameters_of


class ByStage:
    """Tells the parameters of each stage apart, which one optimizer updates.

    Args:
        module: with all its parameters.
        cut: how it is cut.
        stages: of the rank, in order.
    """

    def __init__(self, module: nn.Module, cut: Cut, stages: Sequence[int]) -> None:
        homes = {id(parameter): cut.homes[name][0] for name, parameter in module.named_parameters()}
        self._own = [{each for each, home in homes.items() if home == stage} for stage in stages]

    def parameters(self, optimizer: Optimizer) -> list[list[nn.Parameter]]:
        """Those of each stage, in the optimizer's order."""
        every = parameters_of(optimizer)
        return [[each for each in every if id(each) in own] for own in self._own]

    def gradients(self, optimizer: Optimizer) -> list[list[Tensor]]:
        """Those of each stage that has some, in the optimizer's order."""
        return [gradients_of(own) for own in self.parameters(optimizer)]


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of those that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
