"""Pipelines side by side, each with its own data: what is random in them, and what is averaged over them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_cpipe.stage.randomness import derived_seed
from lightning_cpipe.strategy.lightning_private import all_gather_stacked, instead_of
from lightning_cpipe.transport.counterparts import Counterparts


def seed_of_replica(seed: int, replica: int) -> int:
    """What the random numbers of a pipeline's steps follow from; the first one's are those of a single pipeline."""
    return seed if replica == 0 else derived_seed(seed, "replica", replica)


def reduced(value: Any, operation: Any, counterparts: Counterparts | None) -> Any:
    """One value out of those of a rank and its counterparts, who must all ask for it.

    Args:
        value: this rank's; what is no tensor stays what it is.
        operation: ``mean``, ``sum``, ``max`` or ``min``, also as torch's own.
        counterparts: None where there is one pipeline.
    """
    if counterparts is None or not isinstance(value, Tensor):
        return value
    return counterparts.reduce(value, "sum" if operation is None else str(operation).rpartition(".")[2].lower())


def gathered(tensor: Tensor, counterparts: Counterparts | None, *, sync_grads: bool) -> Tensor:
    """The tensors of a rank and its counterparts, stacked; the tensor itself where there is one pipeline."""
    if counterparts is None:
        return tensor
    return all_gather_stacked(tensor, group=counterparts.group, sync_grads=sync_grads)


def alone_in_steps(strategy: Any) -> list[Callable[[], None]]:
    """Let this rank reduce and gather as if its counterparts had the same, while it looks at a step without them.

    Returns:
        Functions that undo it.
    """
    size = strategy.num_replicas

    def all_gather(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor if size == 1 else torch.stack([tensor] * size)

    return [
        instead_of(strategy, "reduce", lambda value, *_, **__: value),
        instead_of(strategy, "all_gather", all_gather),
    ]
