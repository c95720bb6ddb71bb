"""Dropout, noise in the step and shuffles do not depend on the number of stages; validation does not touch them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.helpers.fits import Seen, fit_in_pipeline, in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.modules import Chain, noise_loader


def fit(p: int, **options: object) -> list[Seen]:
    module = partial(Chain, dropout=0.3, noise=True)
    return fit_in_pipeline(p, module, partial(noise_loader, shuffle=True), max_epochs=2, **options)


def test_with_the_same_weights_the_losses_are_the_same_for_any_number_of_stages() -> None:
    """With one update at the end of an epoch, every loss of the first one is made with the first weights."""
    runs = [fit(p, accumulate_grad_batches=100)[0].losses[:8] for p in (1, 2, 3, 4)]
    assert len(set(map(tuple, runs))) == 1
    assert len(set(runs[0])) == 8


@pytest.mark.parametrize("p", [2, 4])
def test_validation_in_the_middle_changes_nothing(p: int) -> None:
    without = fit(p)
    validated = fit(p, val=noise_loader, val_check_interval=3)
    assert without[0].losses == validated[0].losses
    require_same_bits(without[0].weights, validated[0].weights)
    assert "val_loss" in validated[0].metrics


@pytest.mark.parametrize("p", [2, 3])
def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(p: int) -> None:
    first, second, other = fit(p), fit(p), fit(p, seed=8)
    assert first[0].losses == second[0].losses
    require_same_bits(first[0].weights, second[0].weights)
    assert first[0].losses != other[0].losses


def draw_in_predict_step(**options: Any) -> list[list[float]]:
    predictions = quiet_trainer(**options).predict(Samples(), noise_loader(samples=9)) or []
    # They are on rank 0.
    return [each.tolist() for each in predictions if each is not None]


class Samples(Chain):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(torch.randn_like(batch[0]))[0]


def test_every_batch_of_an_evaluation_has_random_numbers_of_its_own() -> None:
    """With one stage, all batches had the same."""
    alone, three = (in_pipeline(p, draw_in_predict_step)[0] for p in (1, 3))
    assert len({tuple(each) for each in alone}) == len(alone) == 3
    assert alone == three


class DrawsInHooks(Chain):
    """Its hooks draw: in evaluations, and in training after them."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluation: list[float] = []
        self.training_draws: list[float] = []

    def on_validation_start(self) -> None:
        self.evaluation.append(float(torch.rand(())))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.training_draws.append(float(torch.rand(())))


def draws(_: Any, module: DrawsInHooks) -> tuple[list[float], list[float]]:
    return module.evaluation, module.training_draws


def test_hooks_of_an_evaluation_draw_alike_and_from_numbers_of_their_own() -> None:
    options = {"train": noise_loader, "look": draws, "max_epochs": 2}
    validated = [seen.found for seen in fit_in_pipeline(3, DrawsInHooks, val=noise_loader, **options)]
    without = [seen.found for seen in fit_in_pipeline(3, DrawsInHooks, **options)]
    evaluation = validated[0][0]
    assert len(set(evaluation)) == len(evaluation) == 3
    assert [of_rank[0] for of_rank in validated] == [evaluation] * 3
    assert [of_rank[1] for of_rank in validated] == [of_rank[1] for of_rank in without]
