"""Stands in a checkpoint for what is still on its way from other ranks: who looks at it waits, and nobody else does.

So hooks may rename, drop and compute with what they find, as in a checkpoint that is there.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_cpipe.torch_private import instance_of_subclass, pytree
from lightning_cpipe.tree import flatten


class Promised(Tensor):
    """Stands for a tensor; any function of torch that gets it waits, and works on the tensor."""

    _come: Callable[[], Tensor]
    _tensor: Tensor | None

    @classmethod
    def of(cls, come: Callable[[], Tensor]) -> Promised:
        """What stands for the tensor that `come` waits for."""
        promised = instance_of_subclass(cls, torch.empty(0, device="meta"), requires_grad=False)
        promised._come, promised._tensor = come, None
        return promised

    def here(self) -> Tensor:
        """The tensor; waits for it."""
        if self._tensor is None:
            self._tensor = self._come()
        return self._tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Wait, but for what a module does when it is asked for its state."""
        if func == Tensor.detach:
            (promised,) = args
            return cls.of(lambda: promised.here().detach())
        args, kwargs = pytree.tree_map(_here, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


class PromisedState(UserDict[Any, Any]):
    """Stands for a dict; whoever looks into it waits.

    Args:
        come: waits for it.
    """

    def __init__(self, come: Callable[[], dict[Any, Any]]) -> None:
        # Not the base's, which makes one of its own.
        self._come = come

    @cached_property
    def data(self) -> dict[Any, Any]:  # type: ignore[override]
        """The dict."""
        return self._come()


def _here(leaf: Any) -> Any:
    return leaf.here() if isinstance(leaf, Promised) else leaf


def as_it_is_now(tree: Any) -> Any:
    """A copy that stays as it is while training goes on; what is promised stays promised, and has its own copy."""
    memo: dict[int, Any] = {}
    for leaf in flatten(tree)[0]:
        if isinstance(leaf, (Promised, PromisedState)):
            memo[id(leaf)] = leaf
        elif isinstance(leaf, Tensor) and not leaf.is_leaf:
            memo[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return copy.deepcopy(tree, memo)


def settled(tree: Any) -> Any:
    """The same nested structure, with what was promised in it; waits for it."""
    if isinstance(tree, Promised):
        return tree.here()
    if isinstance(tree, PromisedState):
        return tree.data
    if isinstance(tree, (dict, list)):
        # In place: a state dict has attributes, too.
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            if (found := settled(value)) is not value:
                tree[key] = found
    if type(tree) is tuple:
        found = tuple(map(settled, tree))
        return tree if all(map(is_, found, tree)) else found
    return tree
