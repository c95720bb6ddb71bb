"""AdamW with a linear warm-up, for the language models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn


def warmed_up_adamw(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], learning_rate: float, warmup_steps: int
) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns: the rate grows in a line for `warmup_steps` updates, and stays.

    Args:
        parameters: or groups of them, as optimizers take them.
        learning_rate: after the warm-up.
        warmup_steps: until it is reached.
    """
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that are trained, in two groups: matrices decay; biases and the weights of norms do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trained if each.ndim > 1], "weight_decay": weight_decay},
        {"params": [each for each in trained if each.ndim <= 1], "weight_decay": 0.0},
    ]
