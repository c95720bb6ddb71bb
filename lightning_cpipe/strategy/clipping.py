"""Clips gradients by norm: that of all stages where it is known before any of them updates, else each stage's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import Precision
from torch.optim import Optimizer

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.strategy.lightning_private import instead_of
from lightning_cpipe.strategy.whole import Whole
from lightning_cpipe.transport.control import Control


def clip_by_whole_norm(whole: Whole, control: Control, optimizer: Optimizer, clip_val: float) -> None:
    """What `torch.nn.utils.clip_grad_norm_` does to all gradients of the uncut module, to the bit.

    All ranks must call it. The norm is that of the gradients' norms, in the order of the whole optimizer's parameters.

    Args:
        whole: this rank's share in the whole.
        control: where the norms are compared.
        optimizer: this rank's part of it.
        clip_val: the largest norm.
    """
    placed = [(place, each.grad) for place, each in whole.placed(optimizer) if each.grad is not None]
    gradients = [gradient for _, gradient in placed]
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    # One wait for the device, however many they are.
    own = torch.stack([norm.to(norms[0].device) for norm in norms]).cpu() if norms else torch.zeros(0)
    everyones = control.compare(([place for place, _ in placed], own))
    if not any(places for places, _ in everyones):
        return
    by_place = sorted((place, norm) for places, found in everyones for place, norm in zip(places, found.unbind()))
    total = torch.linalg.vector_norm(torch.stack([norm for _, norm in by_place]))
    share = torch.clamp(clip_val / (total + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(share.to(gradient.device))


def clip_stage_by_stage(
    module: pl.LightningModule, precision: Precision, cut: Cut, stages: Sequence[int]
) -> Callable[[], None]:
    """The norm over all stages is known too late in a pipeline, so each stage clips by that of its own gradients.

    Returns:
        A function that undoes it.
    """
    own = [
        {id(parameter) for name, parameter in module.named_parameters() if cut.homes[name][0] == stage}
        for stage in stages
    ]
    clip = precision.clip_grad_by_norm

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
        for ids in own:
            groups = [
                {**group, "params": [each for each in group["params"] if id(each) in ids]}
                for group in optimizer.param_groups
            ]
            clip(SimpleNamespace(param_groups=groups), clip_val)  # type: ignore[arg-type]

    return instead_of(precision, "clip_grad_by_norm", clip_grad_by_norm)
