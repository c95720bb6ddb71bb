"""What a step begins to use after the first batch, though it was not sent, is found by a later look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.probe.look import used_unreceived
from lightning_cpipe.stage.cut import Value
from lightning_cpipe.stage.randomness import get_state, same_state
from lightning_cpipe.stage.weights import keep_only
from tests.helpers.probing import CPU, STEP, cut_of, step_of

WIDTH = 4
X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))


class Part(nn.Module):
    """Hands on what comes, and makes something besides."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.make = make

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        h = torch.tanh(self.linear(x))
        return h, self.make(h.detach())


class LaterUse(nn.Module):
    """From some step on, the last stage uses what the first part makes besides."""

    def __init__(self, make: Callable[[Tensor], Any], use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = Part(make), Part(make)
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        self.use = use
        self.counts = False
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h, made = self.first(x)
        h = self.dropout(self.norm(self.second(h)[0]))
        self.seen.append(0)
        return (h * (self.use(made, h) if self.counts else 1)).square().mean()


def found(root: LaterUse) -> list[Value]:
    """What a look at a later step finds on the last of two stages, which has its own weights alone."""
    cut = cut_of(root, (X,), 2, ["second"])
    keep_only(root, cut, 1)
    root.counts = True
    step, passage = step_of(root, (X + 1,)), cut.steps[STEP].passages[1]
    received = [X.clone().requires_grad_() for _ in passage.receives]
    return used_unreceived(root, step, passage, cut.steps[STEP].templates, received, CPU)


def same(value: Any) -> Any:
    return value


USES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Any]]] = {
    "detached": (same, lambda value, h: value),
    "as a mask": (same, lambda value, h: value > 0),
    "by a threshold below": (same, lambda value, h: value < -2),
    "by its order": (same, lambda value, h: value.argmax(-1, keepdim=True)),
    "by its sum's sign": (same, lambda value, h: 2 if value.sum() > 0 else 1),
    "by being zero": (same, lambda value, h: value == 0),
    "by one element": (same, lambda value, h: value[3, 2]),
    "a mask that was made": (lambda h: h > 0, lambda value, h: value),
    "an index that was made": (lambda h: h.argmax(-1), lambda value, h: h[value % 3]),
    "half numbers": (lambda h: h.bfloat16(), lambda value, h: value),
    "complex numbers": (lambda h: torch.complex(h, h), lambda value, h: value.abs()),
    "the difference of two": (lambda h: (h, h + 1), lambda value, h: value[1] - value[0]),
    "by objecting": (same, lambda value, h: 1 if value.abs().max() < 1 else {}["key"]),
}


@pytest.mark.parametrize("way", USES)
def test_a_use_that_begins_later_is_found(way: str) -> None:
    leaves = [1, 2] if way == "the difference of two" else [1]
    assert found(LaterUse(*USES[way])) == [Value("first", 0, leaf) for leaf in leaves]


@pytest.mark.parametrize(
    "use",
    [
        lambda value, h: len(value),
        lambda value, h: torch.zeros_like(value) + 2,
        lambda value, h: 2 + 0 * value.add_(1).isnan(),
    ],
    ids=["its length", "its like", "written, not read"],
)
def test_what_makes_no_difference_is_not_a_use(use: Callable[[Any, Tensor], Any]) -> None:
    assert found(LaterUse(same, use)) == []


def test_integers_stay_within_the_range_of_the_first_batch() -> None:
    """An index out of bounds would end a process on a GPU."""
    given: list[Tensor] = []
    root = LaterUse(lambda h: 5 + h.argmax(-1), lambda value, h: given.append(value.clone()) or 1)
    assert found(root) == []
    others = torch.stack([value for value in given if value.any()])
    assert 5 <= int(others.min()) <= int(others.max()) <= 8
    assert others.unique().numel() > 1


def test_what_stays_on_the_root_module_is_a_result_too() -> None:
    root = LaterUse(same, lambda value, h: 1)
    root.use = lambda value, h: setattr(root, "kept", value.clone()) or 1
    assert found(root) == [Value("first", 0, 1)]


def test_a_step_that_fails_by_itself_says_so_itself() -> None:
    with pytest.raises(KeyError, match="key"):
        found(LaterUse(same, lambda value, h: {}["key"]))


def test_nothing_is_changed_by_a_look() -> None:
    def use(value: Tensor, h: Tensor) -> Tensor:
        root.register_buffer("made", torch.ones(1))
        root.norm.running_mean.add_(1)
        return torch.rand(()) + (value > 0)

    root = LaterUse(same, use)
    buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
    state, attributes = get_state(), vars(root).keys() | vars(root.first).keys()
    assert found(root) == [Value("first", 0, 1)]
    assert same_state(state, get_state())
    assert vars(root).keys() | vars(root.first).keys() == attributes
    assert not root.first._forward_hooks
    assert root.seen == []
    assert {name for name, _ in root.named_buffers()} == buffers.keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in root.named_buffers())


def test_memory_that_runs_out_is_no_use() -> None:
    """A look takes more of it than the forward that follows."""

    def use(value: Tensor, h: Tensor) -> int:
        if value.abs().max() > 0:
            raise torch.OutOfMemoryError("no room for other numbers")
        return 1

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        found(LaterUse(same, use))
