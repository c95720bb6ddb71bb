"""Other numbers in place of a tensor's own, to see whether anything depends on these."""

from __future__ import annotations

import torch
from torch import Tensor


def random_like(tensor: Tensor, generator: torch.Generator, size: float = 1.0) -> Tensor:
    """Other numbers of the same kind: booleans, integers within the range there is, floats of its scale."""
    if tensor.numel() == 0:
        return tensor
    if not _has_fractions(tensor):
        low, high = (0, 1) if tensor.dtype is torch.bool else (int(tensor.min()), int(tensor.max()))
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)
    scale = tensor.detach().abs().mean().nan_to_num(1.0, 1.0, 1.0) + 1e-3
    return torch.randn(tensor.shape, generator=generator).to(tensor) * (scale * size)


def _opposite(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The other side of zero; booleans flipped, integers mirrored within the range there is."""
    if tensor.dtype is torch.bool:
        return ~tensor
    return -tensor if tensor.numel() == 0 or _has_fractions(tensor) else tensor.min() + tensor.max() - tensor


def _huge_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Beyond what a threshold may let through."""
    return random_like(tensor, generator, 1e3)


def _zeros_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """What a stub returns where nobody needs its output; integers stay within the range there is."""
    return torch.zeros_like(tensor) if _has_fractions(tensor) else random_like(tensor, generator)


def is_one_integer(tensor: Tensor) -> bool:
    """Whether all its elements are one integer, so that the range there is has no other."""
    if tensor.numel() == 0 or tensor.dtype is torch.bool or _has_fractions(tensor):
        return False
    return int(tensor.min()) == int(tensor.max())


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


FILLS = (random_like, _opposite, _huge_like, _zeros_like, random_like, random_like)
"""What is tried, in this order. Several: one may hit the true value of a small integer, or lie on the true value's side
of an `if`."""
