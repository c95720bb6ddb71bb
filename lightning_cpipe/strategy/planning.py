"""Looks at a module as a pipeline does when it is set up, in one process, and runs nothing."""

from __future__ import annotations

import math
from typing import NoReturn

import lightning.pytorch as pl
from typing_extensions import override

from lightning_cpipe.balance.forecast import Forecast, forecast
from lightning_cpipe.balance.memory import bytes_of
from lightning_cpipe.probe.probe import probe
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.strategy.data.samples import samples_in
from lightning_cpipe.strategy.lightning_private import TunerExit, set_num_threads_if_needed
from lightning_cpipe.strategy.loops import fetcher_of
from lightning_cpipe.strategy.setup.as_if_begun import tried
from lightning_cpipe.strategy.setup.cutting import memory_needs, probe_steps
from lightning_cpipe.strategy.setup.probing import Choice, choose_starts, not_compiled
from lightning_cpipe.strategy.setup.refusals import refuse
from lightning_cpipe.strategy.strategy import ContinuousPipeStrategy


class Planning(ContinuousPipeStrategy):
    """On one device, what ``trainer.fit`` would do with `num_stages` of them; it ends before anything is trained.

    Attributes:
        forecast: what was found, after `trainer.fit`.
        inside: the modules in which the dominant block could be cut.
    """

    strategy_name = "continuous_pipe_planning"

    forecast: Forecast | None = None
    inside: tuple[str, ...] = ()

    @property
    def _planned_stages(self) -> int:
        assert isinstance(self._options.num_stages, int)
        return self._options.num_stages

    @override
    def refuse_early(self, trainer: pl.Trainer) -> None:
        if not self._schedule.streams:
            refuse([f"schedule={self._schedule.name!r}: only the continuous schedule can be forecast. Leave it out."])
        self._refuse(trainer, self._planned_stages, self._planned_stages)
        # As many as each process of the pipeline will have, before the launcher sets those of a single one.
        set_num_threads_if_needed(num_processes=self._planned_stages)

    @override
    def setup(self, trainer: pl.Trainer) -> NoReturn:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module, asked, device = self._module, self._options, self.root_device
        self.precision_plugin.convert_module(module)
        module.to(device)
        steps = probe_steps(trainer, self.processes, device, self._seed)
        limit = None if asked.memory_limit is None else bytes_of(asked.memory_limit)
        needs = memory_needs(trainer, self._schedule, self._planned_stages, limit)

        def look() -> tuple[Choice, Cut]:
            num_stages, at = self._planned_stages, asked.split_points
            choice = choose_starts(module, steps[0], num_stages, at, device, needs, measured=True)
            return choice, probe(module, steps, choice.survey, choice.starts, device, asked.check)

        with not_compiled():
            choice, cut = tried(module, steps, look)
        if choice.costs is not None:
            drawn = fetcher_of(trainer).peek()
            samples = None if drawn is None else samples_in(drawn.batch)
            self.forecast = forecast(cut, steps[0].name, choice.costs, needs, samples, _planned_batches(trainer))
            if self.forecast.dominant is not None:
                block = self.forecast.dominant[0].name
                parts = (f"{block}.{name}" for name, _ in module.get_submodule(block).named_children())
                self.inside = tuple(part for part in parts if choice.survey.calls[part] == 1)
        raise TunerExit


def _planned_batches(trainer: pl.Trainer) -> int | None:
    """The mini-batches of the whole run; None if they can't be told."""
    epochs = trainer.max_epochs
    by_epochs = math.inf if epochs is None or epochs < 0 else epochs * trainer.num_training_batches
    by_steps = math.inf if trainer.max_steps < 0 else trainer.max_steps * trainer.accumulate_grad_batches
    least = min(by_epochs, by_steps)
    return None if least == math.inf else int(least)
