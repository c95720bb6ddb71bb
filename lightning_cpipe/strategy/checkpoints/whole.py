"""The module and its optimizers as the user knows them, taken apart into stages and put together again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpipe.schedules.placement import rank_of
from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.weights import (
    fill,
    freeze_stand_ins,
    held_by,
    keep_only,
    keep_true_alone,
    make_room,
    named_numbers,
    room_for_all,
    standing_in,
    unfreeze_stand_ins,
)
from lightning_cpipe.strategy.checkpoints.averages import Averages
from lightning_cpipe.strategy.checkpoints.gathering import gather_numbers, homes
from lightning_cpipe.strategy.checkpoints.optimizer_states import (
    GroupOrder,
    State,
    keep_own_parameters,
    numbered,
    on_cpu,
    own_optimizer_state,
    parameters_of,
    state_by_name,
    whole_optimizer_state,
)
from lightning_cpipe.strategy.checkpoints.promised import Promised, PromisedState, settled
from lightning_cpipe.strategy.ranks.processes import Processes
from lightning_cpipe.strategy.ranks.same_numbers import share_numbers


class Whole:
    """One rank's share in the whole.

    Args:
        module: with all its parameters.
        optimizers: of all parameters; none if nothing is trained.
        cut: how the module will be cut.
        processes: this rank among the others.
        averages: of its weights.
        stays_in_parts: whether the module is too big to be put together on one rank.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        optimizers: Sequence[Optimizer],
        cut: Cut,
        processes: Processes,
        averages: Averages,
        *,
        stays_in_parts: bool = False,
    ) -> None:
        self._module = module
        self._optimizers = list(optimizers)
        self._cut = cut
        self._stages = processes.stages
        self._control = processes.control
        self._parcels = processes.parcels
        self._held = processes.held
        self.averages = averages
        self.stays_in_parts = stays_in_parts
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._orders = [GroupOrder(optimizer, self._names) for optimizer in self._optimizers]

    def take_apart(self) -> None:
        """Keep the weights of this rank's stages, in the module and in the optimizers."""
        keep_only(self._module, self._cut, *self._stages)
        self._keep_own_in_groups()
        self.averages.take_apart()

    def _keep_own_in_groups(self) -> None:
        owned = [p for name, p in self._module.named_parameters() if self._cut.homes[name][0] in self._stages]
        for optimizer in self._optimizers:
            keep_own_parameters(optimizer, owned)

    @contextmanager
    def in_groups(self) -> Iterator[None]:
        """Inside, the groups of the optimizers have all parameters, and may be changed, on all ranks alike."""
        named = dict(self._module.named_parameters())
        for optimizer, order in zip(self._optimizers, self._orders):
            order.restore(optimizer, named)
        try:
            yield
        finally:
            names = {id(parameter): name for name, parameter in self._module.named_parameters()}
            self._orders = [GroupOrder(optimizer, names) for optimizer in self._optimizers]
            self._keep_own_in_groups()
            freeze_stand_ins(self._module, self._cut, *self._stages)

    def state_dict(self) -> State:
        """On rank 0, that of the whole module, as its own `state_dict` makes it; all ranks must call it.

        Nobody waits: numbers are copied here and promised where they come from another rank, see `Promised`. Elsewhere
        it is empty: nobody writes it.
        """
        promised = self._gather_numbers()
        if not self._parcels.gathers:
            return {}
        with standing_in(self._module, promised):
            return self._module.state_dict()

    def has(self, optimizer: Optimizer) -> bool:
        """Whether it is one of the optimizers that were taken apart."""
        return optimizer in self._optimizers

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """On rank 0, that of the whole module's optimizer, and of its own part elsewhere; all ranks must call it.

        Nobody waits, as for `state_dict`.
        """
        own, order = optimizer.state_dict(), self._orders[self._optimizers.index(optimizer)]
        everyones = self._parcels.give("an optimizer's state", lambda: state_by_name(optimizer, self._names))
        if not self._parcels.gathers:
            return own
        state = PromisedState(lambda: numbered(everyones.result(), order))
        return whole_optimizer_state(own, state, order, order.numbers)

    def own_state_dict(self) -> State:
        """What of the whole module's state dict has its true numbers here; what has none is rank 0's."""
        own, with_home = held_by(self._module, self._cut, *self._stages), homes(self._cut)
        of_others = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in named_numbers(self._module).items()
            if name not in own and name in with_home
        }
        with standing_in(self._module, {**own, **of_others}):
            state = self._module.state_dict()
        storages = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
        for name, value in list(state.items()):
            is_tensor = isinstance(value, Tensor)
            is_own = is_tensor and value.untyped_storage().data_ptr() in storages
            if (is_tensor and value.is_meta) or not (is_own or self._parcels.gathers):
                del state[name]
            elif not is_own:
                # Extra state of a module, which may go on changing while it is written.
                state[name] = copy.deepcopy(value)
        return state

    def own_optimizer_state(self, optimizer: Optimizer) -> State:
        """What of the whole module's optimizer's state is this rank's, by the names of parameters."""
        order = self._orders[self._optimizers.index(optimizer)]
        named = {name: name for name in order.numbers}
        return whole_optimizer_state(optimizer.state_dict(), state_by_name(optimizer, self._names), order, named)

    def is_here(self, name: str) -> bool:
        """Whether this rank needs the numbers of a parameter; so it does what it does not know."""
        return not isinstance(named_numbers(self._module).get(name), AbsentParameter)

    def placed(self, optimizer: Optimizer) -> list[tuple[int, nn.Parameter]]:
        """This stage's parameters of an optimizer, each with its place among all those of the whole module's."""
        numbers = self._orders[self._optimizers.index(optimizer)].numbers
        return [(numbers[self._names[id(parameter)]], parameter) for parameter in parameters_of(optimizer)]

    def load_module(self, state_dict: Mapping[str, Any], strict: bool) -> None:
        """Load this stage's part of a whole state dict.

        The module loads all of it, as it would uncut, since its hooks may know entries by other names. What is of
        other stages is dropped.
        """
        with room_for_all(self._module):
            self._module.load_state_dict(state_dict, strict)

    def own_optimizer_states(self, states: Sequence[State]) -> list[State]:
        """What this stage's optimizers load, out of the states of the whole module's; copies, which they may keep."""
        return [
            on_cpu(own_optimizer_state(saved, optimizer, order, self._names))
            for saved, optimizer, order in zip(states, self._optimizers, self._orders)
        ]

    def put_together(self) -> list[State]:
        """Make the module whole again on every rank; all must call it.

        A script goes on after a run on all ranks alike, with `torch.save` or a forward. A module that is too big for
        that stays in parts; every rank gets its buffers from where they are true.

        Returns:
            On rank 0, the states of the whole module's optimizers.
        """
        if self.stays_in_parts:
            self._module.cpu()
            unfreeze_stand_ins(self._module, self._cut, *self._stages)
            keep_true_alone(self._module, self._cut, *self._stages)
            for name, buffer in self._module.named_buffers():
                self._control.share_tensors([buffer], rank_of(self._cut.buffer_homes[name], self._held))
            return []
        self.averages.put_together()
        numbers = self._gather_numbers()
        states = [self.optimizer_state(optimizer) for optimizer in self._optimizers]
        self._module.cpu()
        unfreeze_stand_ins(self._module, self._cut, *self._stages)
        make_room(self._module)
        fill(self._module, numbers)
        self._parcels.settle()
        share_numbers(self._control, self._module)
        self._share_flags()
        whole: list[State] = settled(states) if self._parcels.gathers else []
        return whole

    def _share_flags(self) -> None:
        """What is trainable where its true numbers are, is so everywhere: callbacks may have changed it there."""
        named = dict(self._module.named_parameters())
        own = {name: p.requires_grad for name, p in named.items() if self._cut.homes[name][0] in self._stages}
        for flags in self._control.compare(own):
            for name, flag in flags.items():
                named[name].requires_grad_(flag)

    def _gather_numbers(self) -> dict[str, Promised]:
        return gather_numbers(self._parcels, "weights", self._module, self._cut, self._stages)
