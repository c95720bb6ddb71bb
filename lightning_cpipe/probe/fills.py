"""Other numbers in place of a tensor's own, to see whether anything depends on these."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_cpipe.stage.cut import Value
from lightning_cpipe.tree import TensorSpec


def random_like(tensor: Tensor, generator: torch.Generator, size: float = 1.0) -> Tensor:
    """Other numbers of the same kind: booleans, integers within the range there is, floats of its scale."""
    if tensor.numel() == 0:
        return tensor
    if not _has_fractions(tensor.dtype):
        low, high = range_of(tensor) or (0, 1)
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)
    scale = tensor.detach().abs().mean().nan_to_num(1.0, 1.0, 1.0) + 1e-3
    return torch.randn(tensor.shape, generator=generator).to(tensor) * (scale * size)


def _opposite(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The other side of zero; booleans flipped, integers mirrored within the range there is."""
    if tensor.dtype is torch.bool:
        return ~tensor
    return -tensor if tensor.numel() == 0 or _has_fractions(tensor.dtype) else tensor.min() + tensor.max() - tensor


def _huge_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Beyond what a threshold may let through."""
    return random_like(tensor, generator, 1e3)


def _zeros_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """What a stub returns where nobody needs its output; integers stay within the range there is."""
    return torch.zeros_like(tensor) if _has_fractions(tensor.dtype) else random_like(tensor, generator)


def is_one_integer(tensor: Tensor) -> bool:
    """Whether all its elements are one integer, so that the range there is has no other."""
    found = range_of(tensor)
    return found is not None and found[0] == found[1]


def range_of(tensor: Tensor) -> tuple[int, int] | None:
    """The least and the greatest of its integers; None if it has none, or holds something else."""
    return (int(tensor.min()), int(tensor.max())) if tensor.numel() and is_integer(tensor.dtype) else None


def is_integer(dtype: torch.dtype) -> bool:
    """Whether tensors of this type hold integers, booleans aside."""
    return dtype is not torch.bool and not _has_fractions(dtype)


def _has_fractions(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


Fill = Callable[[Tensor, torch.Generator], Tensor]

FILLS: tuple[Fill, ...] = (random_like, _opposite, _huge_like, _zeros_like, random_like, random_like)
"""What is tried, in this order. Several: one may hit the true value of a small integer, or lie on the true value's side
of an `if`."""


def unlike_zeros(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Small numbers of the same kind, where those that were there are zeros and tell nothing."""
    if _has_fractions(tensor.dtype):
        return torch.randn(tensor.shape, generator=generator).to(tensor)
    return torch.randint(0, 2, tensor.shape, generator=generator).to(tensor)


class Scattered:
    """Numbers of all sizes on one side of zero, to stand where zeros stand; integers within the range they had.

    What compares, counts or sorts does something else with them. All are cut out of the same memory, each value's from
    another place: there may be as many as there are activations before a stage.

    Args:
        specs: of the values.
        ranges: of those that are integers.
        seed: which numbers.
        device: where they are made.
    """

    def __init__(
        self,
        specs: Mapping[Value, TensorSpec],
        ranges: Mapping[Value, tuple[int, int]],
        seed: int,
        device: torch.device,
    ) -> None:
        self._specs = specs
        self._ranges = ranges
        self._places = {value: place for place, value in enumerate(specs)}
        size = max((math.prod(spec.shape) for spec in specs.values()), default=0) + len(specs)
        self._uniform = torch.rand(size, generator=torch.Generator(device).manual_seed(seed), device=device)
        self._made: dict[tuple[torch.dtype, bool], Tensor] = {}

    def above(self, value: Value) -> Tensor:
        """Positive numbers, booleans that are true."""
        return self._cut_out(value, negative=False)

    def below(self, value: Value) -> Tensor:
        """Negative numbers, booleans of both kinds."""
        return self._cut_out(value, negative=True)

    def _cut_out(self, value: Value, *, negative: bool) -> Tensor:
        spec, place = self._specs[value], self._places[value]
        mine = slice(place, place + math.prod(spec.shape))
        if value not in self._ranges:
            return self._numbers(spec.dtype, negative)[mine].view(spec.shape)
        low, high = self._ranges[value]
        integers = low + (self._uniform[mine].double() * (high + 1 - low)).long()
        return integers.to(spec.dtype).view(spec.shape)

    def _numbers(self, dtype: torch.dtype, negative: bool) -> Tensor:
        if (dtype, negative) not in self._made:
            if dtype is torch.bool:
                numbers = self._uniform >= (0.5 if negative else 0.0)
            else:
                numbers = (10 ** (6 * self._uniform - 3) * (-1 if negative else 1)).to(dtype)
            self._made[dtype, negative] = numbers
        return self._made[dtype, negative]
