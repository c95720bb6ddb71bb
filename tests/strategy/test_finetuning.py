"""Callbacks that freeze weights before training, and unfreeze them when an epoch begins.

With a flush schedule the numbers are those of plain Lightning. In the continuous one they are those of training with
delayed gradients, epoch by epoch: the pipeline is refilled at each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpipe.equality import same_bits
from lightning_cpipe.tree import flatten
from tests.helpers.comparing import TrainingStep, Witness, look, names_on_stages
from tests.helpers.fits import Notes, Seen, fit_alone, fit_in_pipeline, require_same_bits
from tests.helpers.modules import WIDTH, Block, Chain, Tied, noise_loader
from tests.helpers.reference import train_delayed

EPOCHS = 3
RATE = 0.01

loader = partial(noise_loader, samples=24)
"""BatchNorm takes no mini-batch of one sample."""


class Normed(Block):
    """A block that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.statistics(super().forward(x))


class Transfer(Chain):
    """A backbone and a head; the optimizer has what is not frozen when it is made."""

    def __init__(self, block: Callable[[], nn.Module] = Normed) -> None:
        super().__init__(0)
        self.backbone = nn.Sequential(*(block() for _ in range(4)))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], RATE)


class BareStatistics(Transfer):
    """Between its blocks stand layers that keep statistics, and have no weights."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(Block(), nn.BatchNorm1d(WIDTH, affine=False)))
        self.backbone = nn.Sequential(*(part for pair in self.backbone for part in pair))


class TiedTransfer(Tied):
    """Gives the optimizer all there is, which decays weights."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), RATE)


backbone = partial(BackboneFinetuning, 1, lambda epoch: 1.5)


class OneByOne(BaseFinetuning):
    """Unfreezes what lies nearest to the loss first, without its statistics; and freezes the head at last."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch < 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[4 - 2 * epoch :], optimizer, 0.005, train_bn=False)
        else:
            self.freeze(pl_module.head)


class First(BaseFinetuning):
    """Freezes what is tied, and unfreezes it in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.first, pl_module.head])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.make_trainable([pl_module.first, pl_module.head])


class GoesOn(BackboneFinetuning):
    """What had been unfrozen stays so after a resume."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if len(trainer.optimizers[0].param_groups) > 1:
            self.make_trainable(pl_module.backbone)


def kept(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """What the logger was given, what is trained at the end, and the options of the groups."""
    (optimizer,) = trainer.optimizers
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    rows = [each.rows for each in trainer.loggers if isinstance(each, Notes)]
    trained = [name for name, each in module.named_parameters() if each.requires_grad]
    return {"rows": rows, "trained": trained, "options": options, "buffers": dict(module.named_buffers())}


@pytest.mark.parametrize(
    ("p", "devices", "module", "callback"),
    [
        (2, 2, Transfer, backbone),
        (3, 1, TiedTransfer, First),
        pytest.param(4, 2, BareStatistics, OneByOne, marks=pytest.mark.full),
        pytest.param(2, 2, TiedTransfer, First, marks=pytest.mark.full),
    ],
)
def test_flushed_it_is_plain_lightning(
    p: int, devices: int, module: Callable[[], pl.LightningModule], callback: Callable[[], BaseFinetuning]
) -> None:
    options: dict[str, Any] = {
        "module": module,
        "train": loader,
        "val": loader,
        "max_epochs": EPOCHS,
        "callbacks": lambda: [callback(), LearningRateMonitor("step")],
        "gradient_clip_val": 0.5,
        "log_every_n_steps": 1,
        "look": kept,
    }
    plain = fit_alone(**options, logger=Notes())
    ranks = fit_in_pipeline(p, devices=devices, strategy={"schedule": "gpipe"}, **options, logger=Notes())
    first = ranks[0]
    assert first.losses == plain.losses
    assert first.metrics == plain.metrics
    require_same_bits(first.weights, plain.weights)
    require_same_bits(first.found["buffers"], plain.found["buffers"])
    assert first.found["rows"] == plain.found["rows"]
    for each in ranks:
        assert each.found["options"] == plain.found["options"]
        assert each.found["trained"] == plain.found["trained"]


def test_continuous_it_is_training_with_delayed_gradients() -> None:
    callbacks = lambda: [backbone(), Witness()]  # noqa: E731
    seen: Seen = fit_in_pipeline(3, Transfer, loader, callbacks=callbacks, look=look, max_epochs=EPOCHS)[0]
    whole = TrainingStep(Transfer())
    stages, _ = names_on_stages(whole, seen.found.cut, seen.batches[0])
    assert [bool(names) for names in stages] == 3 * [True]
    own = dict(whole.named_parameters())
    # Statistics are not frozen, and what they scale with is in the optimizer from the beginning.
    at_first = {name for name in own if "head" in name or "statistics" in name}
    optimizers = [torch.optim.AdamW([{"params": [own[n] for n in names if n in at_first]}], RATE) for names in stages]
    losses: list[float] = []
    per_epoch = len(seen.batches) // EPOCHS
    for epoch, rate in enumerate([0.0, RATE * 0.1, RATE * 0.1 * 1.5]):
        for optimizer, names in zip(optimizers, stages):
            if epoch == 1:
                optimizer.add_param_group({"params": [own[name] for name in names if name not in at_first]})
            if epoch > 0:
                optimizer.param_groups[1]["lr"] = rate
        trained = [[name for name in names if epoch > 0 or name in at_first] for names in stages]
        made = iter(optimizers)
        losses += train_delayed(
            whole,
            trained,
            [(batch, True) for batch in seen.batches[epoch * per_epoch : (epoch + 1) * per_epoch]],
            lambda net, batch: net(batch),
            lambda _, made=made: (next(made), None),  # type: ignore[misc]
        )
    assert seen.losses == losses
    require_same_bits(seen.weights, {name.removeprefix("module."): each for name, each in own.items()})
    require_same_bits(seen.found.buffers, {name.removeprefix("module."): each for name, each in whole.named_buffers()})


@pytest.mark.full
def test_what_is_tied_and_frozen_gives_no_late_gradient() -> None:
    """Where the copy of a stage lies in the owner's process, as where it has one of its own."""
    options: dict[str, Any] = {"callbacks": lambda: [First()], "max_epochs": EPOCHS}
    on_three, on_one = (fit_in_pipeline(3, TiedTransfer, loader, devices=n, **options)[0] for n in (3, 1))
    assert on_three.losses == on_one.losses
    require_same_bits(on_three.weights, on_one.weights)


def saving(folder: Path, callback: Callable[[], BaseFinetuning], **when: Any) -> dict[str, Any]:
    """What a run saves, named by its step."""
    saves = partial(ModelCheckpoint, folder, "{step}", save_top_k=-1, auto_insert_metric_name=False, **when)
    return {"callbacks": lambda: [callback(), saves()], "enable_checkpointing": True}


@pytest.mark.full
def test_a_checkpoint_goes_on_as_in_plain_lightning(tmp_path: Path) -> None:
    """Either resumes from the other's, with the groups that were added."""
    options: dict[str, Any] = {"module": Transfer, "train": loader, "look": kept}
    pipeline = partial(fit_in_pipeline, 3, strategy={"schedule": "gpipe"}, **options)
    fit_alone(max_epochs=EPOCHS, **options, **saving(tmp_path / "plain", backbone))
    pipeline(max_epochs=EPOCHS, **saving(tmp_path / "pipeline", backbone))
    ours, theirs = (torch.load(tmp_path / each / "16.ckpt", weights_only=True) for each in ("pipeline", "plain"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same_bits(flatten(ours[part])[0], flatten(theirs[part])[0])
    assert len(ours["optimizer_states"][0]["param_groups"]) == 2
    assert ours["callbacks"]["BackboneFinetuning"] == theirs["callbacks"]["BackboneFinetuning"]
    again: dict[str, Any] = {"max_epochs": EPOCHS + 1, "callbacks": lambda: [backbone()]}
    plain = fit_alone(ckpt_path=tmp_path / "pipeline" / "16.ckpt", **again, **options)
    ranks = pipeline(ckpt_path=tmp_path / "plain" / "16.ckpt", **again)
    assert ranks[0].losses == plain.losses
    require_same_bits(ranks[0].weights, plain.weights)
    for each in ranks:
        assert each.found["options"] == plain.found["options"]
        assert each.found["trained"] == plain.found["trained"]


def test_resumed_exactly_it_is_a_run_that_was_not_stopped(tmp_path: Path) -> None:
    """In the middle of an epoch after that in which the backbone was unfrozen."""
    callback = partial(GoesOn, 1, lambda epoch: 1.5)
    fit = partial(fit_in_pipeline, 2, Transfer, loader, strategy={"exact_resume": True}, max_epochs=EPOCHS, look=kept)
    unbroken = fit(**saving(tmp_path, callback, every_n_train_steps=21))[0]
    resumed = fit(ckpt_path=tmp_path / "21.ckpt", callbacks=lambda: [callback()])
    require_same_bits(resumed[0].weights, unbroken.weights)
    for each in resumed:
        assert each.losses == unbroken.losses[21:]
        assert each.found["trained"] == unbroken.found["trained"]


class Halves(Transfer):
    """The mean of the losses of both halves of a mini-batch; each of two pipelines has one of them."""

    def __init__(self) -> None:
        super().__init__(Block)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        halves = range(2) if (own := getattr(self.trainer.strategy, "replica", None)) is None else [own]
        return torch.stack([super(Halves, self).loss((batch[0][at::2], batch[1][at::2])) for at in halves]).mean()


@pytest.mark.full
def test_pipelines_side_by_side_average_what_was_unfrozen() -> None:
    options: dict[str, Any] = {
        "module": Halves,
        "train": partial(loader, batch_size=6),
        "max_epochs": EPOCHS,
        "callbacks": lambda: [backbone()],
        "use_distributed_sampler": False,
    }
    plain = fit_alone(**options)
    strategy = {"schedule": "gpipe", "data_parallel_size": 2}
    ranks = fit_in_pipeline(2, devices=4, strategy=strategy, **options)
    assert ranks[0].losses != ranks[2].losses
    require_same_bits(ranks[0].weights, plain.weights)
