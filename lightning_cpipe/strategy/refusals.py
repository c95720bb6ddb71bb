"""What can't work in a pipeline, or not yet: refused at set-up, all reasons at once, each with a way out."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

LATER = "A later version will support it."


def refuse(reasons: Iterator[str]) -> None:
    """Raise all reasons together.

    Raises:
        MisconfigurationException: if there is any.
    """
    found = list(reasons)
    if found:
        raise MisconfigurationException(
            "strategy='continuous_pipe' can't run this:\n" + "\n".join(f"  - {reason}" for reason in found)
        )


def reasons_before_set_up(trainer: pl.Trainer, module: pl.LightningModule, sync_batchnorm: bool) -> Iterator[str]:
    """What the flags and the module's class show, before any process is started."""
    if sync_batchnorm:
        yield (
            "Trainer(sync_batchnorm=True): every stage sees the whole mini-batch, so there is nothing to synchronise."
            " Leave it out."
        )
    precision = trainer.precision_plugin
    if isinstance(precision, MixedPrecision) and precision.precision == "16-mixed":
        yield (
            "precision='16-mixed': the loss scale would have to be the same on all stages. Use 'bf16-mixed', or"
            f" 'bf16-true'. {LATER}"
        )
    if not trainer.training:
        return
    if not module.automatic_optimization:
        yield (
            "automatic_optimization=False: in a pipeline the forward and the backward of one step are about different"
            " mini-batches, which only automatic optimization can arrange. Let `training_step` return the loss."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        yield "`training_step(self, dataloader_iter)`: take `batch` and `batch_idx` instead."
    if is_overridden("on_train_batch_start", module) and trainer.strategy.world_size > 1:
        yield from ()


def reasons_in_optimizers(optimizers: list[torch.optim.Optimizer]) -> Iterator[str]:
    """What only the optimizers show."""
    if len(optimizers) > 1:
        yield (
            f"{len(optimizers)} optimizers: use one with several parameter groups. Optimizers that alternate need"
            " manual optimization, which a pipeline can't have."
        )
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            yield (
                "LBFGS evaluates the loss several times per step, each after the weights moved; mini-batches in flight"
                " can't be evaluated again. Use a first-order optimizer."
            )


def clips_by_norm(trainer: pl.Trainer) -> bool:
    """Whether gradients are clipped by norm."""
    return bool(trainer.gradient_clip_val) and str(trainer.gradient_clip_algorithm or "norm").endswith("norm")


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the module has a layer that keeps running statistics."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())
