"""`validate`, `test` and `predict`, before and after `fit`: plain Lightning's numbers with the same weights."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cpipe import ContinuousPipeStrategy
from tests.helpers.fits import alone, in_pipeline, quiet_trainer
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.ranks import run_ranks

EVALUATIONS = {
    "whole": {},
    "numbers of batches": {"limit_val_batches": 2, "limit_test_batches": 3, "limit_predict_batches": 1},
    "shares": {"limit_val_batches": 0.5, "limit_test_batches": 0.6, "limit_predict_batches": 0.7},
    "no inference mode": {"inference_mode": False},
}


def evaluate(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    found = {
        "validate": trainer.validate(module, noise_loader(samples=10), verbose=False),
        "test": trainer.test(module, [noise_loader(samples=10), noise_loader(samples=4, seed=8)], verbose=False),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "predict": trainer.predict(module, noise_loader(samples=10)),
    }
    found["predict several"] = trainer.predict(module, [noise_loader(samples=10), noise_loader(samples=4)])
    return found


class OfLoaders(Chain):
    """Tests and predicts on several loaders, and counts outputs."""

    batches = 0

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().test_step(batch, batch_idx)

    def on_test_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def on_test_epoch_end(self) -> None:
        """Runs where the outputs are, and what it logs is returned on all ranks."""
        self.log("batches", float(self.batches))
        self.batches = 0

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return super().predict_step(batch, batch_idx)


def around_a_fit(optimizer: str = "plain_sgd", limits: str = "whole", **options: Any) -> list[dict[str, Any]]:
    # One update at the end: no delay, so plain Lightning has the same weights.
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=100, **EVALUATIONS[limits], **options)
    module = OfLoaders(optimizer=optimizer)
    before = evaluate(trainer, module)
    trainer.fit(module, noise_loader(), noise_loader(samples=4))
    return [before, evaluate(trainer, module)]


def require_equal(ours: Any, plain: Any) -> None:
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
        elif isinstance(a, list):
            require_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize(
    ("p", "limits"),
    [
        *((1, "whole"), (3, "whole"), (2, "numbers of batches"), (2, "no inference mode")),
        pytest.param(2, "shares", marks=pytest.mark.full),
    ],
)
def test_the_numbers_are_plain_lightnings_before_and_after_a_fit(p: int, limits: str) -> None:
    scenario = partial(around_a_fit, limits=limits)
    plain = alone(scenario)
    assert plain[0]["validate"] != plain[1]["validate"]
    first, *others = in_pipeline(p, scenario)
    for now, lightnings in zip(first, plain, strict=True):
        for name, found in now.items():
            require_equal(found, lightnings[name])
    for of_rank in others:
        for now, lightnings in zip(of_rank, plain, strict=True):
            for name in ("validate", "test", "metrics"):
                assert now[name] == lightnings[name]


def test_an_optimizer_with_state_does_not_hinder_an_evaluation_after_the_fit() -> None:
    scenario = partial(around_a_fit, optimizer="adam")
    assert in_pipeline(2, scenario)[0][1]["validate"] == alone(scenario)[1]["validate"]


def save_after_an_evaluation(**options: Any) -> list[int] | None:
    trainer = quiet_trainer(max_epochs=1, **options)
    module = Chain(optimizer="adam")
    trainer.fit(module, noise_loader())
    trainer.validate(module, noise_loader(), verbose=False)
    trainer.save_checkpoint("saved.ckpt")
    if not trainer.is_global_zero:
        return None
    return [len(state["state"]) for state in torch.load("saved.ckpt")["optimizer_states"]]


def test_a_checkpoint_after_an_evaluation_holds_the_whole_optimizer_of_the_fit_before() -> None:
    assert in_pipeline(2, save_after_an_evaluation)[0] == alone(save_after_an_evaluation) == [16]


class Asked(pl.LightningDataModule):
    """Counts how often each loader is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def loader(self, kind: str) -> Any:
        self.asked[kind] += 1
        # Lightning, which makes a loader for predictions anew, minds positions.
        return DataLoader(noise_loader(samples=4).dataset, batch_size=3)

    def val_dataloader(self) -> Any:
        return self.loader("val")

    def test_dataloader(self) -> Any:
        return self.loader("test")

    def predict_dataloader(self) -> Any:
        return self.loader("predict")


def ask(**options: Any) -> dict[str, int]:
    trainer, module, data = quiet_trainer(**options), Chain(), Asked()
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    return dict(data.asked)


def test_each_loader_is_asked_for_once() -> None:
    """Although the set-up looks at its first batch."""
    assert in_pipeline(2, ask) == 2 * [alone(ask)] == 2 * [{"val": 1, "test": 1, "predict": 1}]


def verbose(**options: Any) -> None:
    trainer = quiet_trainer(**options)
    trainer.validate(Chain(), noise_loader(samples=4))


def test_the_table_of_results_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    in_pipeline(2, verbose)
    assert capfd.readouterr().out.count("val_loss") == 1


class Predictions(pl.callbacks.BasePredictionWriter):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Tensor] = []
        self.epoch: list[Tensor] = []

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, *_: Any
    ) -> None:
        self.batches.append(prediction)

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = list(predictions)


def write_predictions(**options: Any) -> Any:
    writer = Predictions()
    trainer = quiet_trainer(callbacks=[writer], **options)
    found = trainer.predict(Chain(), noise_loader(samples=7))
    return found, writer.batches, writer.epoch


def test_a_prediction_writer_gets_the_predictions_on_rank_0() -> None:
    plain = alone(write_predictions)
    first, second = in_pipeline(2, write_predictions)
    for ours, lightnings in zip(first, plain, strict=True):
        assert len(ours) == 3
        require_equal(ours, lightnings)
    assert second[1] == []


def nothing_to_run(**options: Any) -> list[Any]:
    module = Chain()
    trainer = quiet_trainer(limit_val_batches=0, limit_predict_batches=0, **options)
    found: list[Any] = [
        trainer.validate(module, noise_loader(), verbose=False),
        trainer.predict(module, noise_loader()),
    ]
    found.append(trainer.test(module, noise_loader(samples=0), verbose=False))
    # Another loader than the one that was looked at just now.
    found += [list(each) for each in trainer.test(module, noise_loader(), verbose=False)]
    return found


@pytest.mark.parametrize("p", [1, 2])
def test_there_may_be_nothing_to_evaluate(p: int) -> None:
    """There was no step to cut the module for; and the next evaluation took over the empty loader."""
    plain = alone(nothing_to_run)
    assert plain[-1] == ["test_loss"]
    for found in in_pipeline(p, nothing_to_run):
        assert found == plain


def test_there_may_be_nothing_to_evaluate_on_several_stages_of_one_process() -> None:
    """It had no stage to clip for, and asked where the weights were."""
    (found,) = run_ranks(lambda _: nothing_to_run(strategy=ContinuousPipeStrategy(num_stages=4), devices=1), 1)
    assert found == alone(nothing_to_run)
