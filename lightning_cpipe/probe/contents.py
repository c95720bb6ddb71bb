"""What hangs on an attribute: read out to be compared, and kept to be put back.

Opened are lists, tuples, dicts, sets and deques, of whatever class, objects of a user's classes (a meter, a namespace)
and modules that are registered nowhere. Objects of torch's, Lightning's and Python's own classes are not: a Trainer or
a logger leads to everything. Neither are weights, and what has `__slots__` in place of a `__dict__`.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cpipe.equality import VALUES, same_leaf, same_value
from lightning_cpipe.torch_private import set_version_counters

_HOLD_NOTHING = frozenset({*VALUES, bool})
"""Classes of which no object is looked into."""

_NOT_OPENED = (sys.stdlib_module_names | {"torch", "lightning", "lightning_fabric", "pytorch_lightning"}) - {
    "abc", "argparse", "builtins", "collections", "contextlib", "types", "typing",
}  # fmt: skip
"""Packages whose objects, and those derived from them, are left closed; a user's class may derive from the others."""


class Contents:
    """All that hangs below what was read: each thing once, with what it held then.

    Args:
        apart: objects that are looked after elsewhere.
    """

    def __init__(self, apart: Iterable[object]) -> None:
        self._apart = {id(each) for each in apart}
        self._things: dict[int, list[_Kept]] = {}

    def read(self, value: Any) -> list[Any]:
        """`value` as a flat list: of each thing its class, its size and what is in it; of tensors, copies.

        What is not opened stands there itself. No recursion: things may lead back to each other, or far down.
        """
        if type(value) in _HOLD_NOTHING:
            return [value]
        leaves: list[Any] = []
        seen: dict[int, int] = {}
        todo = [value]
        while todo:
            thing = todo.pop()
            if type(thing) in _HOLD_NOTHING or id(thing) in self._apart:
                leaves.append(thing)
            elif id(thing) in seen:
                leaves.append(f"number {seen[id(thing)]} again")
            elif not (parts := self._parts(thing)):
                leaves.append(thing)
            else:
                if not isinstance(thing, (tuple, Tensor)):
                    # Only these lead back to themselves, or are one thing in two places for a reason.
                    seen[id(thing)] = len(seen)
                inside: list[Any] = []
                for part in parts:
                    leaves += part.head
                    inside += part.inside
                if _HOLD_NOTHING.issuperset(map(type, inside)):
                    leaves += inside
                else:
                    todo += reversed(inside)
        return leaves

    def put_back(self) -> None:
        """Let everything hold again what it held; what did not change is not written."""
        for part in chain.from_iterable(self._things.values()):
            part.put_back()

    def _parts(self, thing: Any) -> list[_Kept]:
        if id(thing) not in self._things and (parts := _parts_of(thing)):
            self._things[id(thing)] = parts
        return self._things.get(id(thing), [])


def same_contents(before: list[Any], now: list[Any]) -> bool:
    """Whether two readings are alike; what is not opened must be the very same object."""
    return len(before) == len(now) and all(
        a is b or (isinstance(a, (Tensor, *VALUES)) and same_leaf(a, b)) for a, b in zip(before, now)
    )


class _Kept(Protocol):
    """A thing that can be written into, and what it held.

    Attributes:
        head: what it is, as leaves.
        inside: what it holds, each of which may be a thing of its own.
    """

    head: list[Any]
    inside: list[Any]

    def put_back(self) -> None:
        """Let it hold that again."""


class _KeptTensor:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._numbers = tensor.detach().clone()
        self._version = None if tensor.is_inference() else tensor._version
        self.head: list[Any] = [self._numbers]
        self.inside: list[Any] = []

    def put_back(self) -> None:
        tensor, numbers = self._tensor, self._numbers
        if tensor.shape != numbers.shape or tensor.dtype != numbers.dtype:
            tensor.data = numbers
        elif not same_leaf(numbers, tensor):
            with torch.no_grad():
                tensor.copy_(numbers)
        if self._version is not None and tensor._version != self._version:
            # A graph of before may need them for its backward, and they are what they were.
            set_version_counters([tensor], [self._version])


class _KeptArray:
    def __init__(self, array: Any) -> None:
        self._array = array
        self._numbers = array.copy()
        self.head: list[Any] = [str(array.dtype), str(array.shape), array.tobytes()]
        self.inside: list[Any] = []

    def put_back(self) -> None:
        if self._array.tobytes() != self.head[-1]:
            self._array[...] = self._numbers


class _KeptItems:
    """What a container holds, or an object in its attributes.

    Args:
        thing: the container or object.
        read: what it holds, as a list.
        write: lets it hold such a list instead.
    """

    def __init__(self, thing: Any, read: Callable[[Any], list[Any]], write: Callable[[Any, list[Any]], object]) -> None:
        self._thing, self._read, self._write = thing, read, write
        self.inside = read(thing)
        self.head: list[Any] = [type(thing).__qualname__, len(self.inside)]

    def put_back(self) -> None:
        now = self._read(self._thing)
        if len(now) != len(self.inside) or not all(map(_is_still, self.inside, now)):
            self._write(self._thing, self.inside)


def _is_still(before: Any, now: Any) -> bool:
    return before is now or (type(before) in _HOLD_NOTHING and same_value(before, now))


def _parts_of(thing: Any) -> list[_Kept]:
    """What must be kept of a thing; nothing if it is not to be opened."""
    if isinstance(thing, Tensor):
        return [] if isinstance(thing, nn.Parameter) else [_KeptTensor(thing)]
    if type(thing) is np.ndarray:
        return [_KeptArray(thing)]
    base = next((base for base in type(thing).__mro__ if base in _CONTAINERS), None)
    parts: list[_Kept] = [] if base is None else [_KeptItems(thing, *_CONTAINERS[base])]
    if _has_open_attributes(thing):
        parts.append(_KeptItems(thing, _attributes, _set_attributes))
    return parts


def _has_open_attributes(thing: Any) -> bool:
    cls = type(thing)
    if cls.__module__ == "builtins" or issubclass(cls, type) or not hasattr(thing, "__dict__"):
        # Functions, classes and the like.
        return False
    return issubclass(cls, nn.Module) or not any(
        base.__module__.partition(".")[0] in _NOT_OPENED for base in cls.__mro__
    )


# By the methods of the base class: a subclass may do more in its own, as `Counter.update` adds up.


def _pairs(base: Any) -> Callable[[Any], list[Any]]:
    return lambda thing: [*chain.from_iterable(base.items(thing))]


def _set_pairs(base: Any) -> Callable[[Any, list[Any]], object]:
    def write(thing: Any, items: list[Any]) -> None:
        base.clear(thing)
        base.update(thing, zip(items[::2], items[1::2]))

    return write


def _set_queue(thing: Any, items: list[Any]) -> None:
    deque.clear(thing)
    deque.extend(thing, items)


def _set_set(thing: Any, items: list[Any]) -> None:
    set.clear(thing)
    set.update(thing, *items)


def _attributes(thing: Any) -> list[Any]:
    return [*chain.from_iterable(vars(thing).items())]


def _set_attributes(thing: Any, items: list[Any]) -> None:
    vars(thing).clear()
    vars(thing).update(zip(items[::2], items[1::2]))


_CONTAINERS: dict[type, tuple[Callable[[Any], list[Any]], Callable[[Any, list[Any]], object]]] = {
    list: (lambda thing: [*list.__iter__(thing)], lambda thing, items: list.__setitem__(thing, slice(None), items)),
    tuple: (lambda thing: [*tuple.__iter__(thing)], lambda thing, items: None),
    deque: (lambda thing: [*deque.__iter__(thing)], _set_queue),
    OrderedDict: (_pairs(OrderedDict), _set_pairs(OrderedDict)),
    dict: (_pairs(dict), _set_pairs(dict)),
    # As a whole: its order says nothing.
    set: (lambda thing: [frozenset(set.__iter__(thing))], _set_set),
}
