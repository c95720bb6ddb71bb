"""Weights that a callback freezes before training, and unfreezes when an epoch begins.

What crosses the cuts is settled before that. So the module is cut, and versions are kept, as if nothing were frozen:
gradients cross wherever they may be needed one day, and a stage without a graph, since all up to there is frozen, runs
no backward. Each rank's callback freezes and unfreezes the whole module, and adds groups of all its parameters to the
optimizer; then the rank keeps its part of each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_cpipe.strategy.lightning_private import callbacks_of, instead_of

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

AllInGroups = Callable[[], AbstractContextManager[None]]

_CHANGES_GROUPS = ("on_fit_start", "on_train_epoch_start")
"""The hooks of a `BaseFinetuning` that change the groups of an optimizer."""


def finetunes(trainer: pl.Trainer) -> bool:
    """Whether a callback may unfreeze weights in the run at hand."""
    callbacks = callbacks_of(trainer)
    return trainer.state.fn == TrainerFn.FITTING and any(isinstance(each, BaseFinetuning) for each in callbacks)


@contextmanager
def as_if_unfrozen(trainer: pl.Trainer) -> Iterator[None]:
    """Inside, every weight is trained that a callback may unfreeze, and any statistics of BatchNorm are taken."""
    if not finetunes(trainer):
        yield
        return
    module = trainer.lightning_module
    # By name: weights may be others inside.
    frozen = {name for name, parameter in _that_can_be_trained(module) if not parameter.requires_grad}
    still = [each for each in module.modules() if isinstance(each, _NORMS) and not each.track_running_stats]
    _set_trained(module, frozen, still, trained=True)
    try:
        yield
    finally:
        _set_trained(module, frozen, still, trained=False)


def _that_can_be_trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.is_floating_point() or p.is_complex())


def _set_trained(module: nn.Module, names: set[str], norms: Iterable[nn.Module], *, trained: bool) -> None:
    for name, parameter in _that_can_be_trained(module):
        if name in names:
            parameter.requires_grad_(trained)
    for norm in norms:
        norm.track_running_stats = trained  # type: ignore[assignment]


def let_unfreeze(trainer: pl.Trainer, all_in_groups: AllInGroups) -> list[Callable[[], None]]:
    """Let such callbacks see all parameters in the groups of the optimizers, and change them.

    Args:
        trainer: has the callbacks.
        all_in_groups: inside, the groups have all parameters; afterwards, each rank has its part of what they are then.

    Returns:
        Functions that undo it.
    """
    undo = []
    for callback in callbacks_of(trainer):
        if isinstance(callback, BaseFinetuning):
            for hook in _CHANGES_GROUPS:
                undo.append(instead_of(callback, hook, _inside(all_in_groups, getattr(callback, hook))))
            undo.append(instead_of(callback, "load_state_dict", _making_groups(callback, trainer, all_in_groups)))
    return undo


def _making_groups(
    callback: BaseFinetuning, trainer: pl.Trainer, all_in_groups: AllInGroups
) -> Callable[[dict[str, Any]], None]:
    """Here a checkpoint is loaded after `on_fit_start`, in which Lightning makes the groups of an earlier run anew."""
    lightnings = callback.load_state_dict
    make = _inside(all_in_groups, partial(BaseFinetuning.on_fit_start, callback))

    def load_state_dict(state: dict[str, Any]) -> None:
        lightnings(state)
        make(trainer, trainer.lightning_module)

    return load_state_dict


def _inside(all_in_groups: AllInGroups, lightnings: Callable[..., None]) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        with all_in_groups(), _told_apart_by_identity():
            lightnings(*args)

    return hook


@contextmanager
def _told_apart_by_identity() -> Iterator[None]:
    """Inside, a parameter is in an optimizer if it is itself there.

    Lightning compares numbers, which other stages do not have, and leaves out one whose numbers are another's.
    """
    lightnings = vars(BaseFinetuning)["filter_on_optimizer"]
    BaseFinetuning.filter_on_optimizer = staticmethod(_not_in)  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseFinetuning.filter_on_optimizer = lightnings  # type: ignore[method-assign]


def _not_in(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    given = list(params)
    new = [parameter for parameter in given if id(parameter) not in there]
    if len(new) < len(given):
        rank_zero_warn(
            f"{len(given) - len(new)} of {len(given)} parameters that a finetuning callback adds to the optimizer are"
            " in it already, and stay in their groups. Let `configure_optimizers` leave out what is frozen:"
            " `[p for p in self.parameters() if p.requires_grad]`."
        )
    return new
