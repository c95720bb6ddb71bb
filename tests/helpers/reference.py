"""The oracle: training with delayed gradients, in one process, without the engine.

Stage s runs the forward of mini-batch j with its weights after ``max(0, j - lag)`` mini-batches, where lag = p - 1 - s,
and updates with the gradient of mini-batch j when its own count of mini-batches is j. That is all a pipeline may do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def train_delayed(
    module: nn.Module,
    stages: Sequence[Sequence[str]],
    batches: Iterable[tuple[Any, bool]],
    loss_of: Callable[[Callable[..., Any], Any], torch.Tensor],
    optimizer_of: Callable[[list[nn.Parameter]], tuple[torch.optim.Optimizer, Any]],
    accumulate: int = 1,
    extra_in_flight: int = 0,
    random_of: Callable[[int], Any] = lambda j: contextlib.nullcontext(),
) -> list[float]:
    """Train `module` in place.

    Args:
        module: whole.
        stages: the names of each stage's parameters.
        batches: each with whether the optimizer steps after it.
        loss_of: the loss of a batch.
        optimizer_of: makes one stage's optimizer, and a scheduler that steps with it (or None).
        accumulate: divides the loss.
        extra_in_flight: multiplies the lag by one more than this.
        random_of: the random scope of mini-batch j.

    Returns:
        The loss of each mini-batch.
    """
    own = dict(module.named_parameters())
    lags = [(len(stages) - 1 - s) * (1 + extra_in_flight) for s in range(len(stages))]
    optimizers = [optimizer_of([own[name] for name in names]) for names in stages]
    history = [[{n: own[n].detach().clone().requires_grad_() for n in names}] for names in stages]
    losses = []
    for j, (batch, updates) in enumerate(batches):
        used = [versions[max(0, j - lag)] for versions, lag in zip(history, lags)]
        weights = {name: weight for version in used for name, weight in version.items()}
        with random_of(j):
            loss = loss_of(partial(functional_call, module, weights), batch)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss / accumulate, list(weights.values()))
        for name, gradient in zip(weights, gradients):
            own[name].grad = gradient if own[name].grad is None else own[name].grad + gradient
        for names, versions, (optimizer, scheduler) in zip(stages, history, optimizers):
            if not updates:
                versions.append(versions[-1])
                continue
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            versions.append({n: own[n].detach().clone().requires_grad_() for n in names})
    return losses
