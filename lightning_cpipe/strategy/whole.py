"""The module and its optimizers as the user knows them, taken apart into stages and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.weights import fill, held_by, keep_only, make_room, unfreeze_stand_ins
from lightning_cpipe.strategy.checkpoint import (
    GroupOrder,
    Part,
    State,
    joined,
    keep_own_parameters,
    own_optimizer_state,
    own_state_dict,
    part_of,
)
from lightning_cpipe.transport.control import Control


class Whole:
    """One rank's share in the whole.

    Args:
        module: with all its parameters.
        optimizers: of all parameters; none if nothing is trained.
        cut: how the module will be cut.
        stage: this rank's.
        control: where parts are collected.
    """

    def __init__(
        self, module: pl.LightningModule, optimizers: Sequence[Optimizer], cut: Cut, stage: int, control: Control
    ) -> None:
        self._module = module
        self._optimizers = list(optimizers)
        self._cut = cut
        self._stage = stage
        self._control = control
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._orders = [GroupOrder(optimizer, self._names) for optimizer in self._optimizers]

    def take_apart(self) -> None:
        """Keep the weights of this rank's stage, in the module and in the optimizers."""
        keep_only(self._module, self._cut, self._stage)
        for optimizer in self._optimizers:
            keep_own_parameters(optimizer, self._module.parameters())

    def checkpoint(self, checkpoint: State) -> State:
        """On rank 0, the checkpoint of the whole module; all ranks must call it."""
        parts = self._parts(checkpoint["state_dict"], "optimizer_states" in checkpoint)
        return joined(checkpoint, parts, self._orders) if parts else checkpoint

    def load_module(self, state_dict: Mapping[str, Any], strict: bool) -> None:
        """Load this stage's entries of a whole state dict."""
        own = own_state_dict(dict(state_dict), self._module, self._cut, self._stage, strict)
        self._module.load_state_dict(own, strict=False)

    def own_optimizer_states(self, states: Sequence[State]) -> list[State]:
        """What this stage's optimizers load, out of the states of the whole module's."""
        return [
            own_optimizer_state(saved, optimizer, order, self._names)
            for saved, optimizer, order in zip(states, self._optimizers, self._orders)
        ]

    def put_together(self) -> list[State]:
        """Bring weights and buffers of all stages to rank 0; all ranks must call it.

        Returns:
            On rank 0, the states of the whole module's optimizers.
        """
        everyones = self._control.collect(held_by(self._module, self._cut, self._stage))
        parts = self._parts({}, with_optimizers=True)
        self._module.cpu()
        unfreeze_stand_ins(self._module, self._cut, self._stage)
        if not everyones:
            return []
        own = {"state_dict": {}, "optimizer_states": [optimizer.state_dict() for optimizer in self._optimizers]}
        make_room(self._module)
        for each in everyones:
            fill(self._module, each)
        states: list[State] = joined(own, parts, self._orders)["optimizer_states"]
        return states

    def _parts(self, state_dict: State, with_optimizers: bool) -> list[Part]:
        """All stages' parts, on rank 0."""
        optimizers = self._optimizers if with_optimizers else []
        return self._control.collect(part_of(state_dict, optimizers, self._names, self._cut, self._stage))
