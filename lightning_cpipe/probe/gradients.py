"""Gradients for a look at them, left nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(outputs: Sequence[Tensor], arriving: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each input; None where an input gets none. Nothing is left in `.grad`.

    Reentrant activation checkpoints refuse `torch.autograd.grad`, since the weights inside are no part of the graph;
    for them `backward` is run, and what it left is taken away.
    """
    if not _has_reentrant_checkpoint(outputs):
        return list(torch.autograd.grad(outputs, inputs, arriving, allow_unused=True))
    saved = [each.grad for each in inputs]
    try:
        for each in inputs:
            each.grad = None
        torch.autograd.backward(outputs, arriving)
        return [each.grad for each in inputs]
    finally:
        for each, grad in zip(inputs, saved):
            each.grad = grad


def _has_reentrant_checkpoint(outputs: Sequence[Tensor]) -> bool:
    """Whether there is one anywhere in the graph."""
    nodes = [output.grad_fn for output in outputs]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False
