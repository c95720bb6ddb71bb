"""Lets `ModelCheckpoint` go on while its files are being made: it needs only their names.

What it asks about files is answered as if all were written, and what it does after a save, such as telling loggers,
comes when the file is there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cpipe.strategy.checkpoints.saves import Saves
from lightning_cpipe.strategy.lightning_private import callbacks_of, instead_of, parts_of_saving


def save_unhurried(trainer: pl.Trainer, saves: Saves) -> list[Callable[[], None]]:
    """On rank 0, let no `ModelCheckpoint` wait for a file.

    Returns:
        Functions that undo it.
    """
    undo = []
    for each in callbacks_of(trainer):
        if isinstance(each, ModelCheckpoint):
            save, link = parts_of_saving(each)
            undo += [
                instead_of(each, save.__name__, _unhurried(save, saves)),
                instead_of(each, link.__name__, _afterwards(link, saves)),
                instead_of(each, "file_exists", _foreseeing(each.file_exists, saves)),
            ]
    for logger in trainer.loggers:
        undo.append(instead_of(logger, "after_save_checkpoint", _told_in_turn(logger.after_save_checkpoint, saves)))
    return undo


def _unhurried(save: Callable[..., None], saves: Saves) -> Callable[..., None]:
    def save_checkpoint(trainer: pl.Trainer, filepath: str) -> None:
        with saves.unhurried():
            save(trainer, filepath)

    return save_checkpoint


def _afterwards(link: Callable[..., None], saves: Saves) -> Callable[..., None]:
    def link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        saves.then(partial(link, trainer, filepath, linkpath), linkpath, leaves_file=True)

    return link_checkpoint


def _foreseeing(exists: Callable[..., bool], saves: Saves) -> Callable[..., bool]:
    def file_exists(filepath: str, trainer: pl.Trainer) -> bool:
        foreseen = saves.will_exist(filepath)
        return exists(filepath, trainer) if foreseen is None else bool(trainer.strategy.broadcast(foreseen))

    return file_exists


def _told_in_turn(notify: Callable[[Any], None], saves: Saves) -> Callable[[Any], None]:
    def after_save_checkpoint(callback: Any) -> None:
        still = _naming_files_that_are_there(callback)
        # Some keep it to the end of the run.
        saves.then(lambda: notify(callback if saves.are_done else still))

    return after_save_checkpoint


def _naming_files_that_are_there(callback: Any) -> Any:
    """One that names the files that there are, while the callback itself may name some that are still to come."""
    still = object.__new__(callback.__class__)
    still.__dict__.update(callback.__dict__, best_k_models=dict(callback.best_k_models))
    return still
