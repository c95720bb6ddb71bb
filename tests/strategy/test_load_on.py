"""With `load_on="ends"` the ranks in between iterate no loader, and every number stays the same."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.strategy.data.hearsay import _likeness, _Zeros
from tests.helpers.causes import cause
from tests.helpers.fits import Seen, fit_in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.modules import WIDTH, Chain, noise_loader
from tests.helpers.ranks import run_ranks


class Counted(Dataset[Any]):
    """Counts the samples that are read; each batch also says which they are."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.read = 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        numbers = torch.Generator().manual_seed(index)
        return torch.randn(WIDTH, generator=numbers), torch.randn(WIDTH, generator=numbers), f"sample {index}"


class Flow(Counted, IterableDataset[Any]):
    """The same, and nobody knows how many there will be."""

    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(self.samples))


class OfThree(Chain):
    """Its batches have a third part, of texts."""

    def loss(self, batch: Any) -> Tensor:
        x, y, texts = batch
        assert all(text.startswith("sample") for text in texts)
        return super().loss((x, y))


class Data(pl.LightningDataModule):
    """Two loaders that count."""

    def __init__(self, kind: type[Counted] = Counted) -> None:
        super().__init__()
        self.sets = kind(11), kind(4)

    def setup(self, stage: str) -> None:
        self.loads = self.trainer.strategy.loads_data

    def train_dataloader(self) -> Any:
        return DataLoader(self.sets[0], 3, shuffle=not isinstance(self.sets[0], Flow))

    def val_dataloader(self) -> Any:
        return DataLoader(self.sets[1], 3)


def read(trainer: pl.Trainer, _: pl.LightningModule) -> tuple[bool, int, int]:
    data = trainer.datamodule
    return data.loads, *(each.read for each in data.sets)


def both(p: int, module: Any, train: Any, **options: Any) -> tuple[list[Seen], list[Seen]]:
    """What the ranks saw, the ends loading and all loading; their numbers are the same."""
    strategy = options.pop("strategy", {})
    ends, everyone = (
        fit_in_pipeline(p, module, train, strategy={"load_on": load_on, **strategy}, **options)
        for load_on in ("ends", "all")
    )
    for one, other in zip(ends, everyone, strict=True):
        assert one.losses == other.losses
        assert one.metrics == other.metrics
    assert len(ends[0].losses) > 0
    require_same_bits(ends[0].weights, everyone[0].weights)
    return ends, everyone


@pytest.mark.parametrize(
    ("p", "kind", "cross_epoch"),
    [(4, Counted, True), (3, Flow, True), pytest.param(3, Counted, False, marks=pytest.mark.full)],
)
def test_ranks_in_between_read_nothing_and_change_nothing(p: int, kind: Any, cross_epoch: bool) -> None:
    """A shorter last batch, several epochs, a validation in each; texts in batches arrive everywhere."""
    options = {"max_epochs": 3, "look": read, "strategy": {"cross_epoch": cross_epoch}}
    ends, everyone = both(p, OfThree, partial(Data, kind), **options)
    for rank, (one, other) in enumerate(zip(ends, everyone, strict=True)):
        in_between = rank not in (0, p - 1)
        assert other.found[0]
        assert one.found == ((False, 0, 0) if in_between else other.found)
        for (x, y, texts), (all_x, all_y, all_texts) in zip(one.batches, other.batches, strict=True):
            assert texts == all_texts
            assert torch.equal(x, torch.zeros_like(all_x) if in_between else all_x)
            assert torch.equal(y, torch.zeros_like(all_y) if in_between else all_y)


class StopsOnce(pl.Callback):
    """Stops the first fit in mid-epoch, when other batches are told of already."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 3 and pl_module.fits == 1:
            trainer.should_stop = True


class Fitted(Chain):
    """Counts its fits."""

    fits = 0

    def on_fit_start(self) -> None:
        self.fits += 1


def fitted_twice(load_on: Any, _: int) -> list[float]:
    pl.seed_everything(7, verbose=False)
    module, losses = Fitted(), []

    class Losses(pl.Callback):
        def on_train_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
            losses.append(float(outputs["loss"]))

    strategy = ContinuousPipeStrategy(load_on=load_on)
    trainer = quiet_trainer(strategy=strategy, devices=3, callbacks=[StopsOnce(), Losses()], max_epochs=1)
    trainer.fit(module, noise_loader(shuffle=True))
    trainer.should_stop = False
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, noise_loader(shuffle=True))
    return losses


def test_what_a_stopped_fit_was_told_is_not_taken_for_the_next_one() -> None:
    ends, everyone = (run_ranks(partial(fitted_twice, load_on), 3) for load_on in ("ends", "all"))
    assert ends == everyone
    assert len(ends[0]) > 8


class Masked(Chain):
    """Code between the modules reads the batch, on every stage."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, :1] > 0).float()
        for block in self.net:
            x = mask * block(x)
        return x


class LaterMasked(Chain):
    """It begins to in the third mini-batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.scale = batch[0][:, :1] if batch_idx > 1 else 1.0
        return super().training_step(batch, batch_idx)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.net:
            x = self.scale * block(x)
        return x


def test_a_stage_in_between_that_reads_the_batch_is_refused() -> None:
    said = cause(3, Masked(), load_on="ends")
    assert "load_on='ends': what stage 1 makes in training_step depends on the batch (float32[3, 8])" in said
    assert "set load_on='all'" in said


@pytest.mark.full
def test_a_stage_that_begins_to_read_the_batch_later_is_found_out() -> None:
    said = cause(3, LaterMasked(), load_on="ends", where="at mini")
    assert "what stage 1 makes in training_step of mini-batch 2 depends on the batch (float32[3, 8])" in said


class Own(nn.Module):
    """A mask that a block makes for itself is no matter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0) * self.linear(x)


@pytest.mark.full
def test_what_blocks_make_of_what_they_are_given_may_depend_on_anything() -> None:
    def module() -> Chain:
        made = Chain()
        made.net[2] = Own()
        return made

    both(3, module, noise_loader, max_epochs=1)


class Differing(pl.LightningDataModule):
    """From the fourth mini-batch on, the first rank draws others than the last one."""

    def train_dataloader(self) -> Any:
        batches = list(noise_loader())
        if self.trainer.global_rank:
            batches[3:] = [(x + 1, y) for x, y in batches[3:]]
        return DataLoader(batches, batch_size=None)


def test_the_ends_must_still_draw_the_same() -> None:
    said = cause(3, Chain(), Differing(), load_on="ends", where="at mini")
    assert "(rank 0)" in said
    assert "drew different mini-batches in training_step: number 3 with fingerprint" in said


def entries(load_on: Any, path: Path, _: int) -> Any:
    """All of them, and a resume in mid-epoch."""
    pl.seed_everything(7, verbose=False)
    saving = ModelCheckpoint(path, "{step}", every_n_train_steps=5, auto_insert_metric_name=False)
    options = {"devices": 3, "enable_checkpointing": True, "max_epochs": 1}
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(load_on=load_on), callbacks=[saving], **options)
    module = Chain()
    loader = partial(noise_loader, samples=7)
    trainer.fit(module, noise_loader())
    found: list[Any] = [trainer.validate(module, loader(), verbose=False)]
    found += [trainer.test(module, loader(), verbose=False)]
    found += [[None if each is None else each.tolist() for each in trainer.predict(module, loader())]]
    again = Chain()
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(load_on=load_on), devices=3, max_epochs=2)
    trainer.fit(again, noise_loader(shuffle=True), ckpt_path=path / "5.ckpt")
    weights = {name: each.tolist() for name, each in again.named_parameters()} if trainer.is_global_zero else {}
    return [*found, trainer.global_step, weights]


@pytest.mark.full
def test_all_entries_give_the_same(tmp_path: Path) -> None:
    ends, everyone = (run_ranks(partial(entries, load_on, tmp_path / load_on), 3) for load_on in ("ends", "all"))
    assert ends == everyone


@pytest.mark.full
def test_numbers_of_arrays_stay_where_they_are_and_long_texts_are_refused() -> None:
    """A rank that was told more than a socket holds, before it listened, made all ranks wait for ever."""
    told = _likeness({"x": np.arange(10**6), "labels": ["a"]})
    assert len(told) < 1000
    heard = _Zeros(io.BytesIO(told)).load()
    assert heard["x"].shape == (10**6,)
    assert heard["x"].dtype == np.arange(1).dtype
    assert not heard["x"].any()
    assert heard["labels"] == ["a"]
    with pytest.raises(MisconfigurationException, match=r"has 400\d{3} bytes, and 65536 at most"):
        _likeness(["text" * 10**5])


def test_two_ranks_are_both_ends() -> None:
    ends, everyone = both(2, Chain, noise_loader, max_epochs=1)
    assert [torch.equal(x, y) for (x, _), (y, _) in zip(ends[1].batches, everyone[1].batches, strict=True)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"load_on": "first"}, "load_on='first'"), ({"load_on": "ends", "schedule": "1f1b"}, "load_on='ends': with")],
)
def test_what_it_can_not_be_is_refused(options: dict[str, Any], reason: str) -> None:
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(**options), devices=3)
    with pytest.raises(MisconfigurationException, match=reason):
        trainer.fit(Chain(), noise_loader())
