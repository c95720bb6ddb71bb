"""Clips gradients by the norm over all stages, where all of them are there before any stage updates."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

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
    gradients = [(place, each.grad) for place, each in whole.placed(optimizer) if each.grad is not None]
    own = [(place, torch.linalg.vector_norm(gradient).cpu()) for place, gradient in gradients]
    everyones = [norm for stage in control.compare(own) for norm in stage]
    if not everyones:
        return
    norms = [norm for _, norm in sorted(everyones, key=lambda placed: placed[0])]
    total = torch.linalg.vector_norm(torch.stack(norms))
    # As torch has it: without a look at the number, which would wait for the device.
    share = torch.clamp(clip_val / (total + 1e-6), max=1.0)
    for _, gradient in gradients:
        gradient.mul_(share.to(gradient.device))
