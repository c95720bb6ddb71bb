"""The learning-rate finder trains for a while inside `fit`, puts everything back, and training begins."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, LearningRateFinder

from tests.helpers.fits import alone, fit_in_pipeline, in_pipeline, quiet_trainer
from tests.helpers.modules import Chain, noise_loader


class Tuned(Chain):
    """Has a learning rate that a tuner can set."""

    lr = 0.05

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


FIT: dict[str, Any] = {"max_epochs": 2, "gradient_clip_val": 0.5}


def find_and_fit(threshold: float | None, **options: Any) -> Any:
    losses: list[float] = []
    find = LearningRateFinder(num_training_steps=20, early_stop_threshold=threshold)
    note = LambdaCallback(on_train_batch_end=lambda t, m, outputs, *_: losses.append(float(outputs["loss"])))
    trainer = quiet_trainer(callbacks=[find, note], **FIT, **options)
    module = Tuned()
    trainer.fit(module, noise_loader(samples=90))
    return module.lr, trainer.optimizers[0].param_groups[0]["lr"], losses[0], len(losses), trainer.global_step, losses


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(1, None), (1, 1.01), pytest.param(3, None, marks=pytest.mark.full), (3, 1.01)],
    ids=["1, to its end", "1, stopped early", "3, to its end", "3, stopped early"],
)
def test_it_finds_a_rate_and_training_begins_with_the_first_weights(p: int, threshold: float | None) -> None:
    scenario = partial(find_and_fit, threshold)
    plain = alone(scenario)
    first, *others = in_pipeline(p, scenario)
    if p == 1:
        assert first == plain
    assert first[0] == first[1]
    assert (first[0] == Tuned.lr) == (threshold is not None)
    assert first[2:5] == plain[2:5]
    for of_rank in others:
        assert of_rank == first
    if p > 1 and threshold is not None:
        # It found nothing, and left nothing behind.
        assert first[5] == fit_in_pipeline(p, Tuned, partial(noise_loader, samples=90), **FIT)[0].losses
