"""Describes to later stages what a module returned, so that a stub can return the like.

Only the numbers in tensors travel. Structure, shapes, and what is neither a tensor nor a container are told once for
each shape of batch, so they must be the same from then on. What an object holds that can't be taken apart is not known
at all; nor are tensors whose numbers do not fill a rectangle.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

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

_KEPT_TOGETHER = (PackedSequence,)
"""Containers that are not taken apart: torch's kernels count on the numbers in one tensor to fit those in the others,
and read beyond the memory where they do not."""


class Opaque:
    """Stands in a stub's output for an object that can't be taken apart. Whoever uses it gets an error.

    Args:
        kind: the object's class.
        origin: the module that returned it.
    """

    def __init__(self, kind: str, origin: str) -> None:
        self._kind = kind
        self._origin = origin

    def __eq__(self, other: object) -> bool:
        # Whoever passes it on returns it too.
        return isinstance(other, Opaque) and self._kind == other._kind

    def __hash__(self) -> int:
        return hash(self._kind)

    def __repr__(self) -> str:
        return f"an object of class {self._kind}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CutError(
            f"a stage used `.{name}` of {self!r} that {self._origin!r}, a module of an earlier stage, returned. Dense"
            " tensors travel, in tuples, lists, dicts, named tuples, dataclasses, and what is registered with"
            " `torch.utils._pytree.register_pytree_node`; return one of those, or move the cut with `split_points`."
        )


def described(output: Any, module: str) -> tuple[Template, list[Tensor]]:
    """The template of what `module` returned, without what does not travel; and the tensors that do."""
    leaves, structure = flatten(output, _KEPT_TOGETHER)
    known = tuple(TensorSpec.of(leaf) if _travels(leaf) else _known(leaf, module) for leaf in leaves)
    return Template(structure, known), [leaf for leaf in leaves if _travels(leaf)]


def difference(told: Template, found: Template) -> str | None:
    """What sets an output apart from what was told of it, in words; None if nothing does."""
    if told.structure != found.structure:
        return "another structure"
    for before, now in zip(told.leaves, found.leaves):
        if not same_value(before, now):
            return f"{now} in place of {before}"
    return None


def _travels(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested


def _known(leaf: Any, module: str) -> Any:
    if isinstance(leaf, (Opaque, *_PLAIN)):
        return leaf
    kind = type(leaf).__qualname__
    if isinstance(leaf, Tensor):
        kind += " (nested)" if leaf.is_nested else f" ({leaf.layout})"
    return Opaque(kind, module)
