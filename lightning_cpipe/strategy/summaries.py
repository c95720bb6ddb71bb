"""Lightning's model summaries say where each module's weights live, and count those of the whole module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import LEFTOVER_PARAMS_NAME

from lightning_cpipe.schedules.placement import in_words
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.weights import freeze_stand_ins, unfreeze_stand_ins
from lightning_cpipe.strategy.lightning_private import callbacks_of, instead_of, with_column


def show_stages(
    trainer: pl.Trainer, module: pl.LightningModule, cut: Cut, stages: Sequence[int]
) -> list[Callable[[], None]]:
    """Give the table of every `ModelSummary`, `RichModelSummary` included, a column "Stage".

    Returns:
        Functions that undo it.
    """
    undo: list[Callable[[], None]] = []
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelSummary):
            undo += with_column(callback, "Stage", lambda names: stages_of(names, cut.homes))
            undo.append(instead_of(callback, "on_fit_start", _of_the_whole(callback.on_fit_start, module, cut, stages)))
    return undo


def stages_of(names: Sequence[str], homes: Mapping[str, Iterable[int]]) -> list[str]:
    """The stages that hold weights of each module, such as ``0``, ``0-2`` or ``0, 3``; empty where it has none.

    Args:
        names: of modules; or what Lightning calls the parameters of none of them.
        homes: the stages that hold each parameter's weights.
    """
    of_module = {name: {weight for weight in homes if weight.startswith(f"{name}.")} for name in names}
    of_module[LEFTOVER_PARAMS_NAME] = homes.keys() - set().union(*of_module.values())
    return [in_words({stage for weight in of_module[name] for stage in homes[weight]}) for name in names]


def _of_the_whole(
    users_hook: Callable[..., Any], module: pl.LightningModule, cut: Cut, stages: Sequence[int]
) -> Callable[..., Any]:
    """Weights of other stages count as trainable where they are."""

    def on_fit_start(*args: Any) -> Any:
        unfreeze_stand_ins(module, cut, *stages)
        try:
            return users_hook(*args)
        finally:
            freeze_stand_ins(module, cut, *stages)

    return on_fit_start
