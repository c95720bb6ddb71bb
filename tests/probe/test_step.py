"""A step runs from the same random numbers each time, and what it draws and changes is found out without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.probe.step import Draws, Observed, RecordedStep, Step, find_draws
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.stage.randomness import get_state, same_state
from tests.helpers.probing import step_of


def noise(*_: Any) -> Tensor:
    return torch.rand(3).requires_grad_().sum()


def test_it_draws_the_same_each_time() -> None:
    before = get_state()
    step, other = (step_of(nn.Module(), None, noise, seed=seed) for seed in (1, 2))
    assert step.run().loss == step.run().loss != other.run().loss
    assert same_state(before, get_state())


@pytest.mark.parametrize(("name", "trains"), [("training_step", True), ("validation_step", False)])
def test_a_graph_is_made_only_to_train(name: str, trains: bool) -> None:
    seen = []

    def call() -> Observed:
        seen.append(torch.is_grad_enabled())
        return Observed(None)

    Step(name, call, trains, 0, ()).run()
    assert seen == [trains]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("run", "draws"),
    [(noise, True), (lambda *_: np.random.rand(), True), (lambda *_: 1.0, False)],
    ids=["torch", "numpy", "nothing"],
)
def test_whether_it_draws_is_found_out(run: Callable[..., Any], draws: bool) -> None:
    assert step_of(nn.Module(), None, run, name="predict_step").draws() is draws


class Drawing(nn.Module):
    """Draws in a module called once, in one called twice inside another, and in one that draws nothing in `eval`."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.never = nn.Dropout(0.5), nn.Identity()
        self.outer = nn.ModuleDict({"inner": nn.Dropout(0.5)})
        self.outer.forward = lambda x: self.outer["inner"](self.outer["inner"](x))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.never(self.once(x)))


WATCHED = ["once", "never", "outer", "outer.inner"]


def test_modules_that_draw_are_found_with_those_that_call_a_repeated_one() -> None:
    """As a stub, `outer` would not take the numbers that `inner` takes."""
    root = Drawing()
    found = find_draws(root, step_of(root, (torch.ones(9),)), WATCHED)
    assert found == Draws(frozenset({"once", "outer", "outer.inner"}), frozenset({"outer.inner"}))


def test_what_draws_in_one_step_counts_for_all() -> None:
    root = Drawing()
    batch = (torch.ones(9),)
    evaluates = find_draws(root, step_of(root, batch, name="predict_step"), WATCHED)
    root.train()
    trains = find_draws(root, step_of(root, batch), WATCHED)
    assert evaluates == Draws()
    assert evaluates | trains == trains


@pytest.mark.parametrize("draws", [Draws(), Draws(frozenset({"once"}))])
def test_a_recorded_step_draws_if_any_of_its_modules_may(draws: Draws) -> None:
    root = Drawing().eval()
    recorded = RecordedStep(root, step_of(root, (torch.ones(9),)), WATCHED, draws)
    assert recorded.draws is bool(draws.modules)


def test_a_recorded_step_tells_what_it_made_and_changed() -> None:
    root = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    root.count = 0

    def run(module: nn.Module, batch: Tensor) -> Tensor:
        module.count += 1
        return module(batch).sum()

    with untouched(root) as before:
        recorded = RecordedStep(root, step_of(root, torch.randn(4, 2), run), ["0", "1"], Draws())
        assert before.changes() == {}
    statistics = [("0", "num_batches_tracked"), ("0", "running_mean"), ("0", "running_var")]
    assert recorded.changes == [("", "count"), *statistics]
    assert recorded.writes_buffers == {"0"}
    assert [call.module for call in recorded.recording.calls] == ["0", "1"]
    assert recorded.observed.loss.requires_grad
