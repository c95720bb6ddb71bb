"""What a stage's results depend on is found by a gradient, or by other numbers in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.probe.step import Draws, RecordedStep
from lightning_cpipe.probe.trial import Trial
from lightning_cpipe.stage.cut import Passage, Value
from lightning_cpipe.tree import TemplateTable
from tests.helpers.probing import CPU, step_of


class Two(nn.Module):
    """A first part that makes a value, and a second one that a function uses it in."""

    def __init__(self, make: Callable[[Tensor], Any], use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = Part(make), nn.Linear(4, 4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        value = self.first(x)
        return (self.second(x) * self.use(value, x)).square().mean()


class Part(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x * self.weight)


VALUE = Value("first", 0, 0)


def last_stage(make: Callable[[Tensor], Any], use: Callable[[Any, Tensor], Any]) -> Trial:
    torch.manual_seed(2)
    root = Two(make, use)
    recorded = RecordedStep(root, step_of(root, (torch.randn(6, 4),)), ["first", "second"], Draws())
    calls = recorded.recording.calls
    table: TemplateTable = {(call.module, call.number): call.template for call in calls if call.template is not None}
    return trial_of(root, recorded, table)


def trial_of(root: nn.Module, recorded: RecordedStep, table: TemplateTable) -> Trial:
    passage, recording = Passage(1, None, {"first": None}), recorded.recording
    values = recording.values(passage.stubs)
    return Trial(root, recorded.step, passage, values, recording.rewritten, table, CPU)


def same(value: Any) -> Any:
    return value


USES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Any]]] = {
    "directly": (same, lambda value, x: value),
    "detached": (same, lambda value, x: value.detach()),
    "by its sign": (same, lambda value, x: value.sign()),
    "by its mean's sign": (same, lambda value, x: 2 if value.mean() > 0 else 1),
    "by a small threshold": (same, lambda value, x: 2 if value.abs().max() > 30 else 1),
    "by being zero": (same, lambda value, x: 2 if (value == 0).all() else 1),
    "by one element": (same, lambda value, x: value[3, 2].detach()),
    "by its order": (same, lambda value, x: value.argsort(0).float()),
    "as a choice": (lambda h: h.argmax(-1), lambda value, x: value[:, None]),
    "as an index": (lambda h: h.argmax(-1), lambda value, x: x[:, value[:4]]),
    "by the sum of integers": (lambda h: (h > 0).sum(-1), lambda value, x: value.sum()),
    "as integers that are all the same": (lambda h: torch.full((6,), 3), lambda value, x: value[:, None]),
    "as integers that are all zero": (lambda h: torch.zeros(6, dtype=torch.long), lambda value, x: 1 + value.sum()),
    "as a mask": (lambda h: h > 0, lambda value, x: value),
    "as a mask that is all true": (lambda h: h < 1e9, lambda value, x: value.all()),
    "as half numbers": (lambda h: h.bfloat16(), lambda value, x: value.detach()),
    "as complex numbers": (lambda h: torch.complex(h, h), lambda value, x: value.detach().abs()),
    "by objecting": (lambda h: h > 1e9, lambda value, x: 1 if not value.any() else {}["key"]),
}


@pytest.mark.parametrize("way", USES)
@pytest.mark.parametrize("seed", range(3))
def test_any_use_is_found(way: str, seed: int) -> None:
    trial = last_stage(*USES[way])
    trial._generator.manual_seed(seed)
    assert trial.depending_on([VALUE]) == [VALUE]


@pytest.mark.parametrize(
    "use",
    [
        lambda value, x: 1,
        lambda value, x: len(value),
        lambda value, x: torch.zeros_like(value) + 1,
        lambda value, x: value.shape[0] + value.dim(),
    ],
    ids=["not at all", "its length", "its like", "its shape"],
)
def test_what_is_not_used_does_not_matter(use: Callable[[Any, Tensor], Any]) -> None:
    trial = last_stage(same, use)
    assert trial.depending_on([VALUE]) == []
    assert trial.dependence().values == frozenset()


def test_all_and_only_the_culprits_are_found() -> None:
    trial = last_stage(
        lambda h: [h + number for number in range(9)], lambda value, x: value[2].detach() * value[7].detach()
    )
    assert trial.depending_on(list(trial.values)) == [Value("first", 0, 2), Value("first", 0, 7)]


def test_values_that_matter_only_together_are_found() -> None:
    """Flipping both masks changes nothing."""
    trial = last_stage(lambda h: (h > 0, h > 0.1), lambda value, x: value[0] != value[1])
    assert trial.depending_on(list(trial.values)) == list(trial.values)


def test_a_gradient_tells_dependence_on_values_and_weights() -> None:
    found = last_stage(lambda h: (h, h + 1), lambda value, x: value[0] + value[1].detach()).dependence()
    assert found.values == {VALUE}
    assert found.weights == ("second.weight", "second.bias")


def test_weights_that_are_touched_are_told() -> None:
    root = Two(same, same)
    root.use = lambda value, x: 1 + 0 * root.first.weight.detach()
    recorded = RecordedStep(root, step_of(root, (torch.randn(6, 4),)), ["first", "second"], Draws())
    table = {(call.module, call.number): call.template for call in recorded.recording.calls}
    trial = trial_of(root, recorded, table)
    assert trial.traces().parameters == {id(parameter) for parameter in root.parameters()}
    before = root.first.weight.detach().clone()
    assert not trial.depends_on_weights(["first.weight"])
    assert trial.depends_on_weights(["second.weight"])
    root.use = lambda value, x: root.first.weight.detach()
    assert trial.depends_on_weights(["first.weight"])
    assert torch.equal(root.first.weight, before)
    trial.close()
    assert "forward" not in root.first.__dict__


def test_what_outlives_the_step_counts_as_a_result() -> None:
    """A buffer and an attribute of the root that nothing in this step reads."""
    for keep in ("attribute", "seen"):
        trial = last_stage(same, lambda value, x: 1)
        root = trial._root
        root.register_buffer("seen", torch.zeros(6, 4))

        def use(value: Tensor, x: Tensor, root: Any = root, keep: str = keep) -> int:
            setattr(root, keep, value.detach().clone())
            return 1

        root.use = use
        assert trial.depending_on([VALUE]) == [VALUE]
