"""Weights for a look at a module that has none: lent from a little memory that all of them share.

The numbers are other ones than the module will have, of the size that initialisers choose, so that activations neither
vanish nor explode on their way through the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_cpipe.stage.absent import AbsentParameter

_APART = 64
"""Elements from one parameter's place in the memory to the next one's; each has a place of its own."""


def lent_weights(root: nn.Module, names: Collection[str], device: torch.device) -> dict[str, nn.Parameter]:
    """Parameters with numbers, to stand in for those of `root` with these names.

    They take the memory of the largest of them, once for each size of numbers. Their gradients take none: what one
    gets shows that it gets one.
    """
    wanted = [(name, parameter) for name, parameter in root.named_parameters() if name in names]
    kinds = [(parameter.dtype, _exponent(parameter)) for _, parameter in wanted]
    needed: dict[_Kind, int] = {}
    for number, ((_, parameter), kind) in enumerate(zip(wanted, kinds)):
        needed[kind] = max(needed.get(kind, 0), number * _APART + parameter.numel())
    rooms = {kind: _numbers(size, *kind, device) for kind, size in needed.items()}
    lent: dict[str, nn.Parameter] = {}
    for number, ((name, parameter), kind) in enumerate(zip(wanted, kinds)):
        numbers = rooms[kind][number * _APART :][: parameter.numel()].view(parameter.shape)
        lent[name] = nn.Parameter(numbers, parameter.requires_grad)
        vars(lent[name]).update({k: v for k, v in vars(parameter).items() if k not in AbsentParameter.__annotations__})
        if parameter.requires_grad:
            lent[name].register_hook(_without_memory)  # type: ignore[no-untyped-call]
    return lent


_Kind = tuple[torch.dtype, int]


def _exponent(parameter: Tensor) -> int:
    """The power of 4 next to the standard deviation that keeps the size of what goes through a layer."""
    inputs = parameter.numel() // parameter.shape[0] if parameter.ndim > 1 and parameter.numel() else 1
    return round(math.log(inputs, 4) / 2)


def _numbers(size: int, dtype: torch.dtype, exponent: int, device: torch.device) -> Tensor:
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.zeros(size, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(exponent)
    drawn = dtype if dtype.itemsize > 1 else torch.float32
    return torch.randn(size, generator=generator, dtype=drawn, device=device).mul_(4.0**-exponent).to(dtype)


def _without_memory(gradient: Tensor) -> Tensor:
    return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)
