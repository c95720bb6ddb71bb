"""Lets steps run that need what a run makes before them: attributes from its first hooks, and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import OutOfMemoryError

from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.strategy.ranks.ending import in_words
from lightning_cpipe.strategy.setup.probing import unheard
from lightning_cpipe.strategy.step_names import STEPS
from lightning_cpipe.torch_private import set_version_counters
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
        # Nothing else of it is kept: the failed step's activations hang on its frames.
        why = in_words(failed)
    rank_zero_info(
        f"A step of {type(module).__name__} can't be tried before the run begins ({why}); it is tried again after"
        " `configure_optimizers` and the module's first hooks, such as `on_train_epoch_start`."
    )
    with _as_if_begun(module, steps):
        return look()


@contextmanager
def _as_if_begun(module: pl.LightningModule, steps: Sequence[Step]) -> Iterator[None]:
    """Inside, the trainer has optimizers, and the module's own hooks before the first of these steps have run.

    Nobody hears what they log, and all that they change is put back.
    """
    strategy = module.trainer.strategy
    # An evaluation finds those of a fit before.
    optimizers, schedulers = strategy.optimizers, strategy.lr_scheduler_configs
    children = [(each, dict(each._modules), dict(each._parameters)) for each in module.modules()]
    try:
        with untouched(module):
            if any(step.trains for step in steps):
                strategy.setup_optimizers(module.trainer)
            with unheard(module, {}):
                for step in steps:
                    _call_hooks(module, step)
            yield
    finally:
        strategy.optimizers = optimizers
        strategy.lr_scheduler_configs = schedulers
        for each, modules, parameters in children:
            _put_back(each._modules, modules)
            _put_back(each._parameters, parameters)


def _call_hooks(module: pl.LightningModule, step: Step) -> None:
    """Call the module's hooks before a step.

    Raises:
        CutError: if one writes a weight, which would be written once more in the run.
    """
    weights = list(module.named_parameters())
    versions = [parameter._version for _, parameter in weights]
    names = STEPS[step.name]
    for hook in names.starts:
        getattr(module, hook)()
    if step.batch is not None:
        getattr(module, names.batch_start)(copied(step.batch.whole()), 0)
    for (name, parameter), version in zip(weights, versions):
        if parameter._version != version:
            # It is told here, by who wrote it.
            set_version_counters([each for _, each in weights], versions)
            raise CutError(
                f"{type(module).__name__}: a hook before `{step.name}` ({', '.join(names.starts)}) writes the parameter"
                f" {name!r}, and the step needs what these hooks make, so they run before the cut is found. Set weights"
                " in `__init__`, `setup` or `configure_model`, or make there what the step needs."
            )


def _put_back(holder: dict[str, Any], before: dict[str, Any]) -> None:
    holder.clear()
    holder.update(before)
