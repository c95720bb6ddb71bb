"""When two values are the same: to the bit, or up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cpipe.tree import TensorSpec

VALUES = (int, float, complex, str, bytes, frozenset, type(None))
"""What is nothing but its value, tensors aside: of any other object only the class is compared."""


def same_bits(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of leaves are equal, tensors bit for bit (so that NaN equals itself)."""
    return len(a) == len(b) and all(map(same_leaf, a, b))


def same_leaf(a: Any, b: Any) -> bool:
    """The same for two leaves. Objects of which nothing is known are equal if they are of one type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return TensorSpec.of(a) == TensorSpec.of(b) and torch.equal(_as_bytes(a), _as_bytes(b))
    return same_value(a, b) if isinstance(a, VALUES) else type(a) is type(b)


def same_value(a: Any, b: Any) -> bool:
    """Whether two values that are no tensors are equal and of one type; NaN equals itself."""
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def close(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of leaves are equal up to rounding, measured against the largest finite element of each tensor.

    What is not finite, such as the −inf of a mask, must be the same in the same places.
    """
    return len(a) == len(b) and all(map(_close_leaf, a, b))


def _close_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not b.is_floating_point():
        return same_leaf(a, b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = _dense(a), _dense(b)
    sizes = b[torch.isfinite(b)].abs()
    slack = 64 * torch.finfo(b.dtype).eps * float(sizes.max() if sizes.numel() else 0)
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    return bool((same | ((a - b).abs() <= slack)).all())


def _as_bytes(tensor: Tensor) -> Tensor:
    return _dense(tensor).contiguous().reshape(-1).view(torch.uint8)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
