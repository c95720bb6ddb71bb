"""Averages of the weights, stage by stage.

Lightning's averaging callbacks copy the whole module when a fit is set up, before it is cut. The copy is cut like the
module, so that each rank averages the weights of its own stages, at its own step. Where a copy is saved or loaded it is
the whole module's, as in plain Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.view import View
from lightning_cpipe.stage.weights import fill, keep_only, make_room, named_numbers, room_for_all, standing_in
from lightning_cpipe.strategy.checkpoints.gathering import gather_numbers
from lightning_cpipe.strategy.checkpoints.promised import Promised
from lightning_cpipe.strategy.lightning_private import (
    Average,
    after_loading_average,
    averages_of,
    callbacks_of,
    instead_of,
)
from lightning_cpipe.strategy.ranks.processes import Processes
from lightning_cpipe.strategy.sharing.sharing import Sharing


class Averages:
    """One rank's share in the averaged copies.

    Args:
        trainer: whose callbacks made them.
        module: cut already.
        cut: how.
        processes: this rank among the others.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, cut: Cut, processes: Processes) -> None:
        self._trainer = trainer
        self._module = module
        self._cut = cut
        self._parcels = processes.parcels
        self._stages = processes.stages
        self._averages = averages_of(callbacks_of(trainer))

    def __len__(self) -> int:
        return len(self._averages)

    def take_apart(self) -> None:
        """Cut the copies like the module, whose numbers they have: rank 0's, where each rank made its own.

        Raises:
            MisconfigurationException: if a copy was made too early.
        """
        numbers = named_numbers(self._module)
        here = {name: each for name, each in numbers.items() if not isinstance(each, AbsentParameter)}
        for average in self._averages:
            if missing := numbers.keys() - {name for name, _ in average.copy.named_parameters()} - _buffers_of(average):
                raise MisconfigurationException(
                    f"{type(average.callback).__name__} copied the module before it had {min(missing)!r} and"
                    f" {len(missing) - 1} more, so they would have no average. Make all layers in `__init__`; or take"
                    " `WeightAveraging`, which calls `configure_model` first."
                )
            # In an evaluation after a fit they may have been cut before.
            make_room(average.copy)
            keep_only(average.copy, self._cut, *self._stages)
            fill(average.copy, here)

    def arrange(self, view: View, sharing: Sharing, follow: Callable[[], None]) -> list[Callable[[], None]]:
        """Let the callbacks see the weights that are here, but save and load the whole.

        Args:
            view: what modules show.
            sharing: this rank's share of the talk.
            follow: to be called when weights of the module were exchanged.

        Returns:
            Functions that undo it.
        """
        undo = []
        for average in self._averages:
            callback = average.callback
            undo += [
                instead_of(callback, average.saves, self._saving_whole(average, view, sharing)),
                instead_of(callback, average.loads, self._loading_whole(average, follow)),
                *(
                    instead_of(callback, hook, _followed_by(getattr(callback, hook), follow))
                    for hook in average.exchanges
                ),
            ]
        return undo

    def put_together(self) -> None:
        """Make the copies of rank 0 whole; all ranks must call it."""
        for average in self._averages:
            numbers = self._gather(average)
            if self._parcels.gathers:
                make_room(average.copy)
                fill(average.copy, numbers)

    def _gather(self, average: Average) -> dict[str, Promised]:
        return gather_numbers(self._parcels, "averages", average.copy, self._cut, self._stages)

    def _saving_whole(self, average: Average, view: View, sharing: Sharing) -> Callable[..., Any]:
        """On rank 0, which writes the file; the others bring their parts."""
        lightnings = getattr(average.callback, average.saves)

        def save(*args: Any) -> Any:
            sharing.before_collective()
            # A hook may save.
            with view.of_all():
                numbers = self._gather(average)
                if not self._parcels.gathers:
                    return {}
                with standing_in(average.copy, numbers):
                    return lightnings(*args)

        return save

    def _loading_whole(self, average: Average, follow: Callable[[], None]) -> Callable[..., Any]:
        lightnings = getattr(average.callback, average.loads)

        def load(*args: Any) -> None:
            with room_for_all(average.copy), room_for_all(self._module):
                lightnings(*args)
            after_loading_average(self._trainer, average)
            follow()

        return load


def _buffers_of(average: Average) -> set[str]:
    return {name for name, _ in average.copy.named_buffers()}


def _followed_by(hook: Callable[..., Any], follow: Callable[[], None]) -> Callable[..., Any]:
    def hook_and_follow(*args: Any) -> None:
        hook(*args)
        follow()

    return hook_and_follow
