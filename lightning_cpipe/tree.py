"""Nested structures of tensors: what modules return and what loaders yield.

Lists, tuples, named tuples, dicts, dataclasses and whatever is registered with torch's pytree (the outputs of
`transformers` are) are taken apart into leaves and put together again. Any other object is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_cpipe.torch_private import pytree

Content = TypeVar("Content")


@dataclass(frozen=True)
class TensorSpec:
    """What a receiver must know of a tensor before it comes.

    Attributes:
        shape: sizes of the dimensions.
        dtype: element type.
        order: the dimensions from the outermost in memory to the innermost, where that is not their own order; no
            difference between two tensors, but a convolution may round otherwise.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, _order_of(tensor))

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has this shape and dtype."""
        return tensor.shape == self.shape and tensor.dtype == self.dtype

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same numbers in this order in memory."""
        if self.order == _order_of(tensor):
            return tensor
        order = self.order or range(tensor.ndim)
        inverse = [list(order).index(dimension) for dimension in range(tensor.ndim)]
        return tensor.permute(*order).contiguous().permute(inverse)

    @property
    def num_bytes(self) -> int:
        """The memory that such a tensor fills."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


def as_bytes(tensor: Tensor) -> Tensor:
    """The numbers of a dense tensor as bytes, in the order of its dimensions; (bytes,)."""
    flat = tensor.contiguous()
    # A tensor of one element may be contiguous with a stride that `view` would not look at as bytes.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def _order_of(tensor: Tensor) -> tuple[int, ...]:
    """The order of the dimensions in memory; nothing for their own order, or if there are gaps."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return ()
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tuple(order) if tensor.permute(order).is_contiguous() else ()


@dataclass(frozen=True)
class _Fields:
    """A dataclass instance taken apart."""

    cls: type
    names: tuple[str, ...]
    structure: Structure


@dataclass(frozen=True)
class Structure:
    """How leaves are put together again."""

    spec: pytree.TreeSpec
    dataclasses: tuple[tuple[int, _Fields], ...]

    def build(self, leaves: Iterable[Any]) -> Any:
        """The nested structure with these leaves, in the order in which `flatten` gave them."""
        leaves = iter(leaves)
        inner = dict(self.dataclasses)
        outer = []
        for position in range(self.spec.num_leaves):
            if (fields := inner.get(position)) is None:
                outer.append(next(leaves))
                continue
            instance: Any = object.__new__(fields.cls)
            values = fields.structure.build(islice(leaves, fields.structure.num_leaves))
            for name, value in zip(fields.names, values):
                object.__setattr__(instance, name, value)
            outer.append(instance)
        return pytree.tree_unflatten(outer, self.spec)

    def __getstate__(self) -> tuple[Any, tuple[tuple[int, _Fields], ...]]:
        # torch warns when its own specs are pickled; an example with numbers for leaves says the same.
        return pytree.tree_unflatten(range(self.spec.num_leaves), self.spec), self.dataclasses

    def __setstate__(self, state: tuple[Any, tuple[tuple[int, _Fields], ...]]) -> None:
        example, taken_apart = state
        object.__setattr__(self, "spec", pytree.tree_structure(example))
        object.__setattr__(self, "dataclasses", taken_apart)

    @property
    def num_leaves(self) -> int:
        """How many leaves `build` takes."""
        return self.spec.num_leaves + sum(fields.structure.num_leaves - 1 for _, fields in self.dataclasses)


def flatten(tree: Any, closed: tuple[type, ...] = ()) -> tuple[list[Any], Structure]:
    """The leaves of a nested structure in order, and how to build it again; objects of `closed` classes are leaves."""
    if type(tree) is Tensor:
        # What most modules return, each in every step.
        return [tree], _ONE_LEAF
    outer, spec = pytree.tree_flatten(tree, (lambda node: isinstance(node, closed)) if closed else None)
    leaves: list[Any] = []
    taken_apart = []
    for position, leaf in enumerate(outer):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            names = tuple(field.name for field in dataclasses.fields(leaf))
            inner, structure = flatten([getattr(leaf, name) for name in names], closed)
            taken_apart.append((position, _Fields(type(leaf), names, structure)))
            leaves += inner
        else:
            leaves.append(leaf)
    return leaves, Structure(spec, tuple(taken_apart))


_ONE_LEAF = Structure(pytree.tree_structure(0), ())


def copied(tree: Content) -> Content:
    """A deep copy, of a tensor that is a part of another one without the rest of it."""
    tensors = tensors_in(tree)
    memo: dict[int, Any] = {id(each): each.detach().clone().requires_grad_(each.requires_grad) for each in tensors}
    return copy.deepcopy(tree, memo)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a nested structure, in order."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same structure with `function` applied to each tensor."""
    leaves, structure = flatten(tree)
    return structure.build([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


@dataclass(frozen=True)
class Template:
    """The output of a module without its numbers.

    Attributes:
        structure: how the leaves belong together.
        leaves: a `TensorSpec` for each tensor, and every other leaf itself.
    """

    structure: Structure
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, output: Any) -> Template:
        """The template of an output."""
        leaves, structure = flatten(output)
        return cls(structure, tuple(TensorSpec.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    @property
    def specs(self) -> list[TensorSpec]:
        """The specs of its tensors, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorSpec)]

    def build(self, tensors: Iterable[Tensor]) -> Any:
        """The output with these tensors, one for each spec in order."""
        tensors = iter(tensors)
        return self.structure.build([next(tensors) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves])


TemplateTable = dict[tuple[str, int], Template]
"""The outputs of modules without their numbers: (module, call) -> template."""


Signature = Hashable
"""What decides the shapes inside a step: structure, shapes and dtypes of its batch."""


def signature(batch: Any) -> Signature:
    """The signature of a batch. Values of numbers and strings in it are left out."""
    if isinstance(batch, Tensor):
        return TensorSpec.of(batch)
    if isinstance(batch, Mapping):
        return (type(batch), *((key, signature(value)) for key, value in batch.items()))
    if isinstance(batch, (list, tuple)):
        return (type(batch), *map(signature, batch))
    if dataclasses.is_dataclass(batch):
        return (type(batch), *(signature(getattr(batch, field.name)) for field in dataclasses.fields(batch)))
    return (type(batch), *map(signature, tensors_held_by(batch)))


_KNOWN_TO_TORCH = "?bhilqBHILQefdFD"
"""NumPy's types of numbers that are torch's, too, by their letters."""


def tensors_held_by(leaf: Any, depth: int = 3) -> list[Tensor]:
    """The tensors, and NumPy's arrays of numbers as such, in an object that is no nested structure; in order.

    Batches may be objects of any class, with tensors on attributes or on those of their attributes.
    """
    if isinstance(leaf, Tensor):
        return [leaf]
    if isinstance(leaf, (np.ndarray, np.generic)):
        known = leaf.dtype.isnative and leaf.dtype.char in _KNOWN_TO_TORCH
        return [torch.from_numpy(np.array(leaf))] if known else []
    inner = dict(leaf) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", None)
    if not isinstance(inner, dict) or isinstance(leaf, type) or not depth:
        return []
    return [tensor for each in flatten(inner)[0] for tensor in tensors_held_by(each, depth - 1)]
