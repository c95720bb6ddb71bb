"""What runs inside `untouched` leaves the module and the generators as they were; weights must not be written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.untouched import Snapshot, untouched
from lightning_cpipe.stage.randomness import get_state, same_state


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(3)
        self.register_buffer("nothing", None)
        self.tensor = torch.zeros(3)
        self.list = [torch.zeros(2), 1]
        self.tuple = (torch.zeros(2), [0])
        self.dict = {"a": torch.zeros(2), "b": {"c": 0}}
        self.set = {1, 2}
        self.queue: deque[int] = deque([1], maxlen=2)
        self.number = 0.5
        self.nan = float("nan")
        self.name = "old"
        self.absent: Tensor | None = None


def put(attribute: str, value: Any) -> Callable[[Module], None]:
    return lambda module: setattr(module, attribute, value)


CHANGES: dict[str, tuple[tuple[str, str], Callable[[Module], Any]]] = {
    "a buffer written": (("inner", "running_mean"), lambda m: m.inner(torch.randn(4, 3))),
    "a buffer bound": (("inner", "running_var"), lambda m: setattr(m.inner, "running_var", torch.full((3,), 9.0))),
    "a buffer made": (("", "nothing"), put("nothing", torch.ones(2))),
    "a buffer removed": (("inner", "running_var"), lambda m: setattr(m.inner, "running_var", None)),
    "a buffer registered": (("inner", "new"), lambda m: m.inner.register_buffer("new", torch.ones(1))),
    "a tensor written": (("", "tensor"), lambda m: m.tensor.add_(1)),
    "a tensor bound": (("", "tensor"), put("tensor", torch.ones(3))),
    "a tensor resized": (("", "tensor"), lambda m: m.tensor.resize_(5)),
    "a tensor for None": (("", "absent"), put("absent", torch.ones(3))),
    "None for a tensor": (("", "tensor"), put("tensor", None)),
    "a list appended to": (("", "list"), lambda m: m.list.append(3)),
    "a list's tensor written": (("", "list"), lambda m: m.list[0].add_(1)),
    "a list emptied": (("", "list"), lambda m: m.list.clear()),
    "a tuple's tensor written": (("", "tuple"), lambda m: m.tuple[0].add_(1)),
    "a tuple's list appended to": (("", "tuple"), lambda m: m.tuple[1].append(1)),
    "a dict's entry": (("", "dict"), lambda m: m.dict.update(d=1)),
    "an inner dict's entry": (("", "dict"), lambda m: m.dict["b"].update(c=1)),
    "a set": (("", "set"), lambda m: m.set.add(3)),
    "a queue": (("", "queue"), lambda m: m.queue.append(2)),
    "a number": (("", "number"), put("number", 0.75)),
    "a string": (("", "name"), put("name", "new")),
    "a number for a string": (("", "name"), put("name", 1)),
    "an attribute made": (("inner", "made"), lambda m: setattr(m.inner, "made", 1)),
    "an attribute deleted": (("", "name"), lambda m: delattr(m, "name")),
    "the mode": (("inner", "training"), lambda m: m.inner.eval()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed_and_put_back(change: str) -> None:
    place, act = CHANGES[change]
    module = Module()
    first = Snapshot(module)
    with untouched(module) as before:
        assert before.changes() == {}
        act(module)
        assert place in before.changes()
    assert first.changes() == {}
    assert not hasattr(module.inner, "made")
    assert not hasattr(module.inner, "new")


def test_changes_are_told_as_copies_of_what_stands_there_now() -> None:
    module = Module()
    with untouched(module) as before:
        module.tensor += 1
        del module.name
        changes = before.changes()
        module.tensor += 1
    (copy,) = changes["", "tensor"]
    assert copy.tolist() == [1, 1, 1]
    assert changes["", "name"] == []


@pytest.mark.parametrize("change", [change for change in CHANGES if "None" not in change])
def test_the_objects_of_before_are_put_back(change: str) -> None:
    """Others may hold them."""
    module = Module()
    attributes = dict(module.__dict__)
    buffers = dict(module.inner._buffers)
    with untouched(module):
        CHANGES[change][1](module)
    assert all(module.__dict__[key] is value for key, value in attributes.items())
    assert all(module.inner._buffers[key] is value for key, value in buffers.items())


def test_a_graph_of_before_may_have_saved_what_is_put_back() -> None:
    module = Module()
    weight = torch.ones(3, requires_grad=True)
    product = weight * module.inner.running_var * module.tensor
    with untouched(module):
        module.inner.running_var.mul_(2)
        module.tensor.add_(1)
    product.sum().backward()
    assert weight.grad.tolist() == [0, 0, 0]


def test_what_an_attribute_was_bound_to_meanwhile_is_not_written() -> None:
    """It may be the batch."""
    module, batch, items = Module(), torch.ones(3), [7]
    with untouched(module):
        module.tensor, module.list, module.dict = batch, items, {"mine": batch}
    assert batch.tolist() == [1, 1, 1]
    assert items == [7]
    assert module.tensor.tolist() == [0, 0, 0]


def test_an_attribute_may_hold_a_tensor_of_a_graph() -> None:
    module = Module()
    weight = torch.ones(3, requires_grad=True)
    module.tensor = weight * 2
    with untouched(module):
        module.tensor = weight * 3
    module.tensor.sum().backward()
    assert weight.grad.tolist() == [2, 2, 2]


def test_gradients_are_put_back() -> None:
    module = Module()
    grad = module.inner.weight.grad = torch.ones(3)
    with untouched(module):
        module.inner.weight.grad = None
        module.inner.bias.grad = torch.ones(3)
    assert module.inner.weight.grad is grad
    assert module.inner.bias.grad is None


def test_hooks_that_a_step_registers_or_removes_are_put_back() -> None:
    """Else each look at a step that registers its hooks once would leave one more."""
    module = Module()
    heard: list[str] = []
    handle = module.inner.register_forward_hook(lambda *_: heard.append("before"))
    with untouched(module):
        handle.remove()
        module.inner.register_forward_hook(lambda *_: heard.append("inside"))
        module.inner.register_forward_pre_hook(lambda *_: heard.append("inside"))
    module.inner(torch.randn(4, 3))
    assert heard == ["before"]
    handle.remove()
    module.inner(torch.randn(4, 3))
    assert heard == ["before"]


def test_whether_a_parameter_is_trained_is_put_back() -> None:
    module = Module()
    with untouched(module):
        module.inner.weight.requires_grad_(False)
    assert module.inner.weight.requires_grad


def test_generators_are_put_back_after_an_error_too() -> None:
    module, state = Module(), get_state()

    def fail() -> None:
        with untouched(module):
            torch.randn(3)
            module.list.append(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same_state(state, get_state())
    assert len(module.list) == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: setattr(weight, "data", weight.data * 2),
    ],
    ids=["in place", "by binding"],
)
def test_writing_a_weight_is_refused(write: Callable[[Tensor], None]) -> None:
    module = Module()
    refused = pytest.raises(CutError, match=r"'inner\.weight' in place.*optimizer.*buffer")
    with refused, untouched(module), torch.no_grad():
        write(module.inner.weight)


def test_a_weight_that_was_bound_to_other_memory_has_its_numbers_again() -> None:
    module = Module()
    with pytest.raises(CutError), untouched(module):
        module.inner.weight.data = torch.zeros(3)
    assert module.inner.weight.tolist() == [1, 1, 1]


def test_nothing_is_put_back_where_nothing_changed() -> None:
    """Autograd would take a rewritten buffer for a changed one."""
    module = Module()
    versions = [tensor._version for tensor in (module.inner.running_mean, module.tensor, module.inner.weight)]
    with untouched(module):
        pass
    assert versions == [tensor._version for tensor in (module.inner.running_mean, module.tensor, module.inner.weight)]
