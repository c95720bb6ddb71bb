"""Lightning's own demo modules, unmodified: they train as they do in plain Lightning, or are refused by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringDataModuleNoLen,
    BoringModel,
    DemoModel,
    ManualOptimBoringModel,
    RandomDataset,
    RandomDictDataset,
    RandomIterableDataset,
    RandomIterableDatasetWithLen,
)
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cpipe.tree import tensors_in
from tests.helpers.causes import cause
from tests.helpers.comparing import require_equal_to_reference
from tests.helpers.fits import alone, fit_alone, fit_in_pipeline, in_pipeline, quiet_trainer, require_same_bits

WORDS = 40


def its_own_data() -> None:
    """The loaders are the module's own."""


@pytest.fixture
def text() -> None:
    """What `WikiText2` would download, but for three sequences."""
    path = Path("data/wikitext-2.txt")
    path.parent.mkdir()
    path.write_text("\n".join(" ".join(f"w{(7 * i + j * j) % (WORDS - 1)}" for j in range(20)) for i in range(8)))


def transformer() -> LightningTransformer:
    torch.manual_seed(1)
    return LightningTransformer(vocab_size=WORDS)


def sgd(parameters: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, None]:
    """As `LightningTransformer` configures it."""
    return torch.optim.SGD(parameters, 0.1), None


@pytest.mark.parametrize("p", [2, pytest.param(4, marks=pytest.mark.full)])
def test_the_transformer_equals_the_reference(p: int, text: None) -> None:
    """Encoder, decoder, dropout, and attributes that its first step sets."""
    (seen, *_) = require_equal_to_reference(p, transformer, its_own_data, sgd, epochs=2)
    assert len(seen.losses) == 6


def test_the_lstm_is_refused_for_the_state_that_it_keeps_between_steps(text: None) -> None:
    lstm = LightningLSTM(vocab_size=WORDS)
    # Its own loader takes twenty at a time.
    assert "hidden" in cause(2, lstm, DataLoader(WikiText2()), split_points=["model.decoder"])


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (BoringModel, "2 stages need as many blocks, and BoringModel has"),
        (partial(DemoModel, out_dim=4), "2 stages need as many blocks, and DemoModel has"),
    ],
    ids=["BoringModel", "DemoModel"],
)
def test_what_can_not_be_cut_says_so(module: Any, reason: str) -> None:
    assert reason in cause(2, module(), DataLoader(RandomDataset(32, 4)))


def test_manual_optimization_is_refused_before_any_process_is_started() -> None:
    trainer = quiet_trainer(strategy="continuous_pipe", devices=2)
    with pytest.raises(MisconfigurationException, match="automatic_optimization=False"):
        trainer.fit(ManualOptimBoringModel())


@pytest.mark.parametrize("module", [BoringModel, DemoModel])
def test_one_stage_trains_them_as_plain_lightning_does(module: Any) -> None:
    options = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 2}
    train = partial(DataLoader, RandomDataset(32, 8))
    ours, plain = fit_in_pipeline(1, module, train, **options)[0], fit_alone(module, train, **options)
    assert ours.losses == plain.losses
    require_same_bits(ours.weights, plain.weights)


class TwoLayers(BoringModel):
    """With a layer more, it can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2))

    def step(self, batch: Any) -> Tensor:
        return super().step(batch["a"] if isinstance(batch, dict) else batch)


DATA = {
    "a dataset": lambda: DataLoader(RandomDataset(32, 6)),
    "dicts": lambda: DataLoader(RandomDictDataset(32, 6)),
    "iterable": lambda: DataLoader(RandomIterableDataset(32, 6)),
    "iterable with a length": lambda: DataLoader(RandomIterableDatasetWithLen(32, 6)),
}


@pytest.mark.full
@pytest.mark.parametrize("name", DATA)
def test_the_demo_datasets_are_the_same_on_all_ranks(name: str) -> None:
    seen = fit_in_pipeline(2, TwoLayers, DATA[name], DATA[name], max_epochs=2)
    batches = [[float(torch.stack(tensors_in(batch)).sum()) for batch in of_rank.batches] for of_rank in seen]
    assert batches[0] == batches[1]
    assert len(batches[0]) == 12


def all_entries(data: Any, **options: Any) -> list[Any]:
    """Fit, validate, test and predict with one data module."""
    pl.seed_everything(3, verbose=False)
    module, made = TwoLayers(), data()
    # One update, at the end: there is no delay.
    limits = {f"limit_{name}_batches": 4 for name in ("train", "val", "test", "predict")}
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=1000, **limits, **options)
    trainer.fit(module, datamodule=made)
    found: list[Any] = [trainer.global_step, trainer.num_training_batches]
    trainer.validate(module, datamodule=made, verbose=False)
    trainer.test(module, datamodule=made, verbose=False)
    predictions = trainer.predict(module, datamodule=made)
    # Elsewhere there are none.
    return [*found, [float(each.sum()) for each in predictions or [] if each is not None]]


@pytest.mark.parametrize("data", [BoringDataModule, pytest.param(BoringDataModuleNoLen, marks=pytest.mark.full)])
def test_the_demo_data_modules_serve_all_entries(data: Any) -> None:
    first, second = in_pipeline(2, partial(all_entries, data))
    assert first[:2] == second[:2] == [1, 4]
    assert len(first[2]) == 4
    if data is BoringDataModule:
        assert first == alone(partial(all_entries, data))
