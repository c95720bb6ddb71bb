"""Makes of a step in micro-batches the one step of a mini-batch that Lightning, its loggers and the hooks know.

The loss is the sum of the micro-batches' losses, each times what it counts for; every value that is logged for the step
is their mean by the same weights, unless its `reduce_fx` says otherwise. A micro-batch that counts for nothing may have
no loss that is a number: nothing is ever multiplied by it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_cpipe.stage.halves import leaves_reached
from lightning_cpipe.strategy.data.micro_batches import MicroBatch
from lightning_cpipe.strategy.lightning_private import (
    instead_of,
    logging_for,
    reduction_of,
    set_step_values,
    take_step_values,
)

_REDUCTIONS: dict[str, Callable[..., Any]] = {"max": torch.max, "min": torch.min, "sum": torch.add}


class OneStep:
    """What the last stage sees of one mini-batch.

    Args:
        trainer: whose loop is at it.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._before: dict[str, Any] = {}
        self._logged: dict[str, list[tuple[float, Tensor]]] = {}
        self._losses: dict[int, Tensor] = {}
        self._extra: dict[str, Any] = {}

    def begin(self) -> None:
        """No micro-batch has run."""
        self._before = take_step_values(self._trainer)
        self._logged.clear()

    @contextmanager
    def running(self, micro_batch: MicroBatch) -> Iterator[None]:
        """The user's step runs on a micro-batch inside."""
        counts = nullcontext() if micro_batch.weight else _without_means(self._trainer.lightning_module)
        with logging_for(self._trainer, micro_batch.prepared[0], micro_batch.samples), counts:
            yield
        for key, value in take_step_values(self._trainer).items():
            self._logged.setdefault(key, []).append((micro_batch.weight, value))

    def share_of(self, micro_batch: MicroBatch, returned: Any) -> Tensor:
        """What a micro-batch's loss adds to that of the step.

        Raises:
            MisconfigurationException: if its step returned no loss.
        """
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                f"`training_step` returned {type(loss).__name__} for a micro-batch of batch_idx {micro_batch.index} of"
                f" epoch {micro_batch.epoch}: it must return a loss for each, as a tensor, or under 'loss' in a dict."
                " Return one that is zero times something of the model."
            )
        if isinstance(returned, Mapping) and micro_batch.number >= max(self._losses, default=0):
            self._extra = {key: value for key, value in returned.items() if key != "loss"}
        if micro_batch.weight:
            share = loss * micro_batch.weight
        else:
            # In the backward of its own loss, zero times infinity would not be zero. This one reaches the same leaves.
            nothing = [leaf.reshape(-1)[:0].sum().real for leaf in leaves_reached(loss)]
            share = torch.zeros_like(loss).detach().requires_grad_() + sum(nothing)
        self._losses[micro_batch.number] = share.detach()
        return share / self._trainer.accumulate_grad_batches

    def end(self) -> None:
        """All micro-batches have run: the step's own values take the place of theirs."""
        whole = {key: _reduced(each, reduction_of(self._trainer, key)) for key, each in self._logged.items()}
        set_step_values(self._trainer, {**self._before, **whole})

    def output(self, output: dict[str, Any]) -> dict[str, Any]:
        """What the hooks get: the step's loss, and whatever else its last micro-batch returned."""
        loss = sum(share for _, share in sorted(self._losses.items())) / self._trainer.accumulate_grad_batches
        whole = {**output, **self._extra, "loss": loss}
        self._losses, self._extra = {}, {}
        return whole


@contextmanager
def _without_means(module: pl.LightningModule) -> Iterator[None]:
    """Inside, nothing that the module logs goes into a mean; metrics, sums and extremes are logged as ever."""
    log = module.log

    def unless_mean(name: str, value: Any, *args: Any, **options: Any) -> None:
        given = inspect.signature(log).bind(name, value, *args, **options)
        if isinstance(value, Metric) or given.arguments.get("reduce_fx", "mean") not in ("mean", "avg", torch.mean):
            log(name, value, *args, **options)

    undo = instead_of(module, "log", unless_mean)
    try:
        yield
    finally:
        undo()


def _reduced(values: list[tuple[float, Tensor]], reduction: str) -> Tensor:
    if reduction in _REDUCTIONS:
        whole = values[0][1]
        for _, value in values[1:]:
            whole = _REDUCTIONS[reduction](whole, value)
        return whole
    # Zero times what is no number would be none; where none counts, all do.
    counted = [(weight, value) for weight, value in values if weight] or [(1.0, value) for _, value in values]
    mean = sum(value * weight for weight, value in counted)
    assert isinstance(mean, Tensor)
    # It may have been logged for some of them only.
    total = sum(weight for weight, _ in counted)
    return mean if abs(total - 1) < 1e-9 else mean / total
