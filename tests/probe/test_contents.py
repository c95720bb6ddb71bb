"""Whatever hangs on an attribute, and below it, is read out and put back as it was, in the objects of before."""

from __future__ import annotations

import argparse
import collections
import logging
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric

from lightning_cpipe.probe.contents import Contents, same_contents


class AverageMeter:
    """As it stands in many a training script."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.sum += value
        self.count += 1


class Items(list[Any]):
    """A list of which more is known."""

    def __init__(self, *items: Any) -> None:
        super().__init__(items)
        self.note = "none"

    def __iter__(self) -> Any:
        raise AssertionError("it may do anything here")

    __setitem__ = clear = extend = __iter__


class Table(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError("only through `put`")

    def put(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)


class Queue(collections.deque[Any]):
    pass


class Names(set[str]):
    pass


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Epoch:
    losses: list[Tensor] = field(default_factory=list)
    meter: AverageMeter = field(default_factory=AverageMeter)


def linked() -> Any:
    """Two objects that know each other."""
    one, other = types.SimpleNamespace(number=1), types.SimpleNamespace(number=2)
    one.other, other.other = other, one
    return one


def chained() -> Any:
    """Links of a chain that is longer than Python's recursion may be deep."""
    first = last = types.SimpleNamespace(number=0)
    for number in range(5000):
        last.next = types.SimpleNamespace(number=number)
        last = last.next
    first.last = last
    return first


# What hangs there, and what happens to it.
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a default dict": (lambda: collections.defaultdict(list), lambda x: x["losses"].append(1.0)),
    "a default dict's list": (lambda: collections.defaultdict(list, a=[1]), lambda x: x["a"].append(1.0)),
    "an ordered dict": (lambda: collections.OrderedDict(a=1), lambda x: x.update(b=2)),
    "an ordered dict's order": (lambda: collections.OrderedDict(a=1, b=2), lambda x: x.move_to_end("a")),
    "a counter": (lambda: collections.Counter("abb"), lambda x: x.update("ab")),
    "a dict of the user's": (Table, lambda x: x.put("a", 1)),
    "a list of the user's": (lambda: Items(1, [2]), lambda x: x.append(3)),
    "what is in it": (lambda: Items(1, [2]), lambda x: x[1].append(3)),
    "its attribute": (lambda: Items(1), lambda x: setattr(x, "note", "some")),
    "a queue of the user's": (lambda: Queue([1], 2), lambda x: x.extend([2, 3])),
    "a set of the user's": (lambda: Names("ab"), lambda x: x.add("c")),
    "a named tuple's list": (lambda: Pair([], 1), lambda x: x.left.append(1)),
    "a wrapped dict": (lambda: collections.UserDict(a=1), lambda x: x.update(b=2)),
    "a meter": (AverageMeter, lambda x: x.update(0.5)),
    "a meter in a dict": (lambda: {"train": AverageMeter()}, lambda x: x["train"].update(0.5)),
    "a new attribute": (AverageMeter, lambda x: setattr(x, "latest", 1)),
    "a lost attribute": (AverageMeter, lambda x: delattr(x, "sum")),
    "a dataclass": (Epoch, lambda x: x.losses.append(torch.ones(1))),
    "a dataclass's meter": (Epoch, lambda x: x.meter.update(1.0)),
    "a dataclass's tensor": (lambda: Epoch([torch.ones(2)]), lambda x: x.losses[0].add_(1)),
    "a namespace": (lambda: types.SimpleNamespace(step=0), lambda x: setattr(x, "step", 1)),
    "hyperparameters": (lambda: argparse.Namespace(rate=0.1), lambda x: setattr(x, "rate", 0.2)),
    "an array": (lambda: np.zeros((2, 2)), lambda x: x.__setitem__((0, 1), 3)),
    "an array in a meter": (lambda: types.SimpleNamespace(sums=np.zeros(2)), lambda x: x.sums.__iadd__(1)),
    "what leads back to itself": (linked, lambda x: setattr(x.other, "number", 3)),
    "the last of a long chain": (chained, lambda x: setattr(x.last, "number", -1)),
    "a metric that is not registered": (lambda: {"mean": MeanMetric()}, lambda x: x["mean"].update(2.0)),
    "a buffer that is not registered": (lambda: [nn.BatchNorm1d(2)], lambda x: x[0](torch.randn(4, 2))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_put_back(change: str) -> None:
    make, act = CHANGES[change]
    value = make()
    contents = Contents(apart=[])
    before = contents.read(value)
    assert same_contents(before, Contents(apart=[]).read(value))
    things = [*contents._things]
    act(value)
    assert not same_contents(before, Contents(apart=[]).read(value))
    contents.put_back()
    after = Contents(apart=[])
    assert same_contents(before, after.read(value))
    assert [*after._things] == things, "other objects than before"


@pytest.mark.parametrize("change", [change for change in CHANGES if "a metric" not in change])
def test_another_object_with_the_same_in_it_is_no_change(change: str) -> None:
    """A step that binds an attribute anew to what it was has changed nothing."""
    make, act = CHANGES[change]
    value, other = make(), make()
    assert same_contents(Contents(apart=[]).read(value), Contents(apart=[]).read(other))
    act(other)
    assert not same_contents(Contents(apart=[]).read(value), Contents(apart=[]).read(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1], (1,)),
        ({"a": 1}, {"b": 1}),
        ({"a": [1], "b": []}, {"a": [], "b": [1]}),
        ([[1], 2], [[1, 2]]),
        ({1, 2}, {1, 3}),
        ([], {}),
        (AverageMeter(), types.SimpleNamespace(sum=0.0, count=0)),
    ],
)
def test_readings_tell_things_apart(one: Any, other: Any) -> None:
    assert not same_contents(Contents(apart=[]).read(one), Contents(apart=[]).read(other))


def test_equal_tuples_and_tensors_may_be_one_object_or_two() -> None:
    pair, ones = (1, 2), torch.ones(2)
    one, two = [pair, pair, ones, ones], [pair, (1, len([0, 0])), ones, ones.clone()]
    assert same_contents(Contents(apart=[]).read(one), Contents(apart=[]).read(two))


class Worker(threading.Thread):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: logging.getLogger("test"),
        lambda: TensorDataset(torch.zeros(2)),
        lambda: nn.Parameter(torch.zeros(2)),
        Worker,
        lambda: AverageMeter,
        lambda: AverageMeter().update,
        lambda: nn.functional.relu,
        lambda: np,
    ],
)
def test_what_is_not_a_users_own_stays_closed(make: Callable[[], Any]) -> None:
    """It leads to everything, or is no state."""
    value = make()
    contents = Contents(apart=[])
    (leaf,) = contents.read(value)
    assert leaf is value
    assert not contents._things


def test_what_is_looked_after_elsewhere_stays_closed() -> None:
    """An object that knows the module on which it hangs."""
    module = nn.Linear(2, 2)
    leaves = Contents(apart=[module]).read(types.SimpleNamespace(owner=module))
    assert any(leaf is module for leaf in leaves)
    assert not any(isinstance(leaf, Tensor) for leaf in leaves)


def test_a_shared_thing_is_read_once_and_put_back_for_all() -> None:
    shared = [1]
    one, other = {"a": shared}, {"b": shared}
    contents = Contents(apart=[])
    contents.read(one), contents.read(other)
    shared.append(2)
    contents.put_back()
    assert one["a"] is other["b"] is shared
    assert shared == [1]


def test_what_did_not_change_is_not_written() -> None:
    """Others may read it at the same time."""
    value = Epoch([torch.ones(2)])
    contents = Contents(apart=[])
    contents.read(value)
    version = value.losses[0]._version
    contents.put_back()
    assert value.losses[0]._version == version
