"""Lets steps run that need what a run makes before them: attributes from its first hooks, and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import OutOfMemoryError, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.strategy.ranks.ending import in_words
from lightning_cpipe.strategy.setup.probing import unheard
from lightning_cpipe.strategy.step_names import STEPS
from lightning_cpipe.tree import copied

Found = TypeVar("Found")


def tried(module: pl.LightningModule, steps: Sequence[Step], look: Callable[[], Found]) -> Found:
    """What a look at a module finds; if a step fails in it, what it finds as if the run had begun.

    Args:
        module: whose steps run in it.
        steps: which.
        look: what it finds; differences are `AssertionError`, and what can't be cut is `CutError`.
    """
    try:
        return look()
    except (AssertionError, CutError, OutOfMemoryError):
        raise
    except Exception as failed:
        rank_zero_info(
            f"A step of {type(module).__name__} can't be tried before the run begins ({in_words(failed)}); it is tried"
            " again after `configure_optimizers` and the module's first hooks, such as `on_train_epoch_start`."
        )
        try:
            with _as_if_begun(module, steps):
                return look()
        except Exception as again:
            # The step's own fault is told once.
            again.__suppress_context__ |= in_words(again) == in_words(failed) or isinstance(again, CutError)
            raise


@contextmanager
def _as_if_begun(module: pl.LightningModule, steps: Sequence[Step]) -> Iterator[None]:
    """Inside, the trainer has optimizers, and the module's own hooks before the first of these steps have run.

    Nobody hears what they log, and all that they change is put back.
    """
    strategy = module.trainer.strategy
    # An evaluation finds those of a fit before.
    optimizers, schedulers = strategy.optimizers, strategy.lr_scheduler_configs
    children = [(each, dict(each._modules)) for each in module.modules()]
    try:
        with untouched(module):
            if any(step.trains for step in steps):
                strategy.setup_optimizers(module.trainer)
            with unheard(module, {}):
                for step in steps:
                    names = STEPS[step.name]
                    for hook in names.starts:
                        getattr(module, hook)()
                    if step.batch is not None:
                        getattr(module, names.batch_start)(copied(step.batch.whole()), 0)
            yield
    finally:
        strategy.optimizers = optimizers
        strategy.lr_scheduler_configs = schedulers
        for each, before in children:
            _put_back(each, before)


def _put_back(module: nn.Module, children: dict[str, nn.Module | None]) -> None:
    if module._modules.keys() != children.keys():
        module._modules.clear()
        module._modules.update(children)
