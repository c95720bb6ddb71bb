"""When two values are the same: to the bit, or up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cpipe.tree import TensorSpec, as_bytes

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
    return len(a) == len(b) and all(difference(here, there) is None for here, there in zip(a, b))


def difference(a: Any, b: Any, rtol: float | None = None) -> str | None:
    """What sets a leaf apart from the one that is expected, in words; None if they are equal up to rounding.

    Args:
        a: what there is.
        b: what is expected.
        rtol: relative tolerance, measured against the largest finite element of `b`; 64 roundings unless given.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None if same_leaf(a, b) else f"{_shown(a)} instead of {_shown(b)}"
    if (found := TensorSpec.of(a)) != (expected := TensorSpec.of(b)):
        return f"{found} instead of {expected}"
    if not b.is_floating_point():
        return None if same_leaf(a, b) else _worst(a, b, _dense(a) != _dense(b))
    a, b = _dense(a), _dense(b)
    slack = _size(b) * (64 * torch.finfo(b.dtype).eps if rtol is None else rtol)
    same = (a == b) | (torch.isnan(a) & torch.isnan(b)) | ((a - b).abs() <= slack)
    return None if bool(same.all()) else _worst(a, b, ~same)


def _worst(a: Tensor, b: Tensor, differing: Tensor) -> str:
    """The element that differs most, with its numbers."""
    wide = torch.complex128 if b.is_complex() else torch.float64
    apart = torch.where(differing, (_dense(a).to(wide) - _dense(b).to(wide)).abs().nan_to_num(nan=torch.inf), -1)
    index = [int(each) for each in torch.unravel_index(apart.argmax(), apart.shape)]
    most, size = float(apart.max()), _size(b)
    here, there = (_dense(each)[tuple(index)].item() for each in (a, b))
    return (
        f"{here:.8g} instead of {there:.8g} at {index} of {TensorSpec.of(b)}, where it differs most: by {most:.3g},"
        f" {most / size if size else torch.inf:.3g} of the largest element; {int(differing.sum())} of {b.numel()}"
        " elements differ"
    )


def _size(tensor: Tensor) -> float:
    """The largest finite element."""
    sizes = _dense(tensor)[torch.isfinite(_dense(tensor))].abs()
    return float(sizes.max()) if sizes.numel() else 0.0


def _shown(leaf: Any) -> str:
    return str(TensorSpec.of(leaf)) if isinstance(leaf, Tensor) else repr(leaf)


def _as_bytes(tensor: Tensor) -> Tensor:
    return as_bytes(_dense(tensor))


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
