"""Describes to later stages what a module returned, so that a stub can return the like.

Only the numbers in tensors travel. Structure, shapes, and what is neither a tensor nor a container are told once for
each shape of batch, so they must be the same from then on. What an object holds that can't be taken apart is not known
at all.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lightning_cpipe.equality import same_value
from lightning_cpipe.errors import CutError
from lightning_cpipe.tree import Template, TensorSpec, flatten

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    range,
    type,
    Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.Size,
)
"""What is known as a whole."""


class Opaque:
    """Stands in a stub's output for an object that can't be taken apart. Whoever uses it gets an error.

    Args:
        kind: the object's class.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self._kind == other._kind

    def __hash__(self) -> int:
        return hash(self._kind)

    def __repr__(self) -> str:
        return f"an object of class {self._kind}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CutError(
            f"a stage used `.{name}` of {self!r} that a module of an earlier stage returned. Tensors travel in tuples,"
            " lists, dicts, named tuples, dataclasses, and what is registered with"
            " `torch.utils._pytree.register_pytree_node`; return one of those."
        )


def described(output: Any) -> tuple[Template, list[Tensor]]:
    """The template of a module's output, without the objects that don't travel; and its tensors."""
    leaves, structure = flatten(output)
    known = tuple(TensorSpec.of(leaf) if isinstance(leaf, Tensor) else _known(leaf) for leaf in leaves)
    return Template(structure, known), [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def difference(told: Template, found: Template) -> str | None:
    """What sets an output apart from what was told of it, in words; None if nothing does."""
    if told.structure != found.structure:
        return "another structure"
    for before, now in zip(told.leaves, found.leaves):
        if not same_value(before, now):
            return f"{now} in place of {before}"
    return None


def _known(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (Opaque, *_PLAIN)) else Opaque(type(leaf).__qualname__)
