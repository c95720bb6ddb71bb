"""Measures what the blocks of a step cost, on the first batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from lightning_cpipe.balance.cache import CostCache
from lightning_cpipe.balance.costs import BlockCost, Costs
from lightning_cpipe.balance.holdings import find_holdings
from lightning_cpipe.balance.stopwatch import Clock, clock_of, time_blocks
from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.survey import Survey


def measure(
    root: nn.Module,
    step: Step,
    survey: Survey,
    blocks: Sequence[str],
    device: torch.device,
    clock: Clock | None = None,
) -> Costs:
    """What the blocks cost: as kept from a run before, or measured and kept for the next.

    Where weights have no numbers (on the meta device), or a whole step does not fit into the device's memory, no time
    is taken.

    Args:
        root: the whole module.
        step: its step.
        survey: of it.
        blocks: modules that the step calls once each, in the order of their calls.
        device: where it runs.
        clock: another one than the device's; what it tells is not kept.
    """
    cache = CostCache(root, step, survey, blocks, device)
    if clock is None and (kept := cache.load()) is not None:
        return kept
    holdings = find_holdings(root, step, blocks)
    kinds = [
        (type(module := root.get_submodule(name)), repr(module), _weights(module), own.returns)
        for name, own in zip(blocks, holdings)
    ]
    forward_s = backward_s = [0.0] * len(blocks)
    timed = not any(parameter.is_meta for parameter in root.parameters())
    if timed:
        try:
            forward_s, backward_s = time_blocks(root, step, blocks, kinds, clock or clock_of(device))
        except torch.OutOfMemoryError as error:
            timed = False
            warnings.warn(
                f"a whole step does not fit into the memory of {device}, so its blocks could not be timed ({error});"
                " they are balanced by floating-point operations.",
                stacklevel=2,
            )
    columns = zip(blocks, survey.operations(root, blocks), forward_s, backward_s, holdings)
    costs = Costs(
        tuple(
            BlockCost(name, operations, forward, backward, own.trained, own.frozen, own.saved, own.output)
            for name, operations, forward, backward, own in columns
        )
    )
    if timed and clock is None:
        cache.save(costs)
    return costs


def _weights(module: nn.Module) -> tuple[object, ...]:
    return tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters())
