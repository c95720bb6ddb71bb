"""Slices a batch into micro-batches, along the first dimension of its tensors."""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

_TOLD = (
    " Tell how with a method of the LightningModule, `split_batch(self, batch, num_microbatches)`, which returns the"
    " micro-batches, or set `num_microbatches=1`."
)


def sliced(batch: Any, most: int) -> tuple[list[Any], list[int]]:
    """A batch in `most` slices, fewer where it has fewer samples; their sizes differ by at most one.

    Every tensor must have as many rows as there are samples; strings, one for each sample, and lists of numbers, one
    for each, are sliced, too. A tensor without a dimension and any other number or string is the same in all slices.
    What holds them may be nested: mappings, lists, tuples, dataclasses.

    Returns:
        The slices, and the number of samples in each.

    Raises:
        MisconfigurationException: if it can't be told how to slice the batch.
    """
    sizes = sorted(set(_sizes(batch)))
    if len(sizes) != 1:
        found = f"tensors with {' and '.join(map(str, sizes))} rows" if sizes else "no tensor that has rows"
        raise MisconfigurationException(f"a batch can't be sliced into micro-batches: it has {found}.{_TOLD}")
    (size,) = sizes
    parts = torch.arange(size).tensor_split(max(1, min(most, size)))
    slices = [_part(batch, size, slice(int(part[0]), int(part[-1]) + 1) if size else slice(0)) for part in parts]
    return slices, [len(part) for part in parts]


def _sizes(node: Any) -> Iterator[int]:
    """The rows of all tensors in a batch."""
    if isinstance(node, Tensor):
        if node.layout is not torch.strided:
            raise _unknown(f"a tensor of layout {node.layout}")
        if node.ndim:
            yield len(node)
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _sizes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _sizes(value)
    elif _is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from _sizes(getattr(node, field.name))
    elif not isinstance(node, (numbers.Number, str, bytes, type(None))):
        raise _unknown(f"an object of class {type(node).__name__}")


def _part(node: Any, size: int, rows: slice) -> Any:
    """Some rows of a batch that has so many."""
    if isinstance(node, Tensor):
        return node[rows] if node.ndim else node
    if isinstance(node, (list, tuple)):
        # A tuple of numbers is rather one thing for all samples, such as the size of an image.
        of_samples = (str, bytes, numbers.Number) if isinstance(node, list) else (str, bytes)
        if len(node) == size and all(isinstance(value, of_samples) for value in node):
            return node[rows]
        parts = [_part(value, size, rows) for value in node]
        return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
    if isinstance(node, Mapping):
        made: Any = copy.copy(node)
        for key, value in node.items():
            made[key] = _part(value, size, rows)
        return made
    if _is_dataclass(node):
        made = copy.copy(node)
        for field in dataclasses.fields(node):
            object.__setattr__(made, field.name, _part(getattr(node, field.name), size, rows))
        return made
    return node


def _is_dataclass(node: Any) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _unknown(found: str) -> MisconfigurationException:
    return MisconfigurationException(f"a batch can't be sliced into micro-batches: it holds {found}.{_TOLD}")
