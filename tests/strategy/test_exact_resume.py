"""With `exact_resume=True` a run that was stopped and resumed gives the numbers of one that was not, bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.policies import TWO_BUFFERED
from lightning_cpipe.strategy.checkpoints.exact_resume import ExactResume
from lightning_cpipe.strategy.checkpoints.optimizer_states import IN_FLIGHT
from tests.helpers.fits import Notes, Watcher, quiet_trainer, require_same_bits
from tests.helpers.modules import WIDTH, Block, Chain, Codebook, TiedThrice, noise_loader
from tests.helpers.ranks import run_ranks

EPOCHS, PER_EPOCH = 3, 5
FULL = pytest.mark.full


class Sensitive(Chain):
    """Its numbers depend on all that may be in flight, and on what it has logged in the epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dropout=0.2, noise=True, schedule="step", **options)
        more = (Codebook(), nn.Identity(), nn.BatchNorm1d(WIDTH, affine=False), nn.Identity())
        self.net = nn.Sequential(*(nn.Sequential(Block(0.2), each, nn.BatchNorm1d(WIDTH)) for each in more))
        self.metric = MeanAbsoluteError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.metric(loss.reshape(1), torch.zeros(1))
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        return loss


class Overflows(Chain):
    """Logs the scale of its loss, which is too large at first. On the first stage some gradients are not finite."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.net[0].register_forward_hook(self.breaks)

    def breaks(self, _: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if out.requires_grad and bool(args[0].sum() > 1):
            out.register_hook(lambda gradient: gradient * math.inf)

    def on_train_batch_end(self, *_: Any) -> None:
        self.log("scale", self.trainer.precision_plugin.scaler.get_scale(), on_step=True)


Dropping = partial(Chain, dropout=0.2, noise=True, optimizer="adam")


class Draws(pl.Callback):
    """Draws from the global generators, and trains with it: as a user's hook may."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["weight_decay"] = 0.1 * float(torch.rand(()))


class Buffers(pl.Callback):
    """Those of this rank's stages at the end: each pipeline has its own."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ContinuousPipeStrategy)
        homes = strategy.stage_run.cut.buffer_homes
        own = {name: each for name, each in pl_module.named_buffers() if homes.get(name) in strategy.stages}
        self.found = {f"{name} here": each.clone() for name, each in own.items()}


def run(
    p: int,
    module: Callable[[], pl.LightningModule],
    strategy: dict[str, Any],
    ckpt_path: Path | None = None,
    folder: Path | None = None,
    devices: int | None = None,
    averages: Callable[[], list[pl.Callback]] = list,
    **options: Any,
) -> dict[str, Any]:
    """What this rank saw; with a `folder`, saves at each step, after validations and at the end of epochs."""
    # Another process may have been seeded otherwise.
    pl.seed_everything(7 if ckpt_path is None else 8, verbose=False)
    watcher, notes, buffers = Watcher(), Notes(), Buffers()
    saving = partial(ModelCheckpoint, folder, save_top_k=-1, auto_insert_metric_name=False)
    callbacks = [] if folder is None else [
        saving("{step}", every_n_train_steps=1),
        saving("val-{epoch}-{step}", monitor="val_loss"),
        saving("end-{step}", save_on_train_epoch_end=True),
    ]  # fmt: skip
    trainer = quiet_trainer(
        strategy=ContinuousPipeStrategy(num_stages=p, **{"exact_resume": True, **strategy}),
        devices=devices or p,
        callbacks=[watcher, Draws(), buffers, *averages(), *callbacks],
        logger=notes,
        log_every_n_steps=1,
        enable_checkpointing=True,
        **{"max_epochs": EPOCHS, "val_check_interval": 2, "limit_val_batches": 2, **options},
    )
    made = module()
    pipelines = strategy.get("data_parallel_size", 1)
    train = DataLoader(noise_loader(samples=3 * PER_EPOCH * pipelines).dataset, 3, shuffle=True)
    # Which samples a validation sees depends on those before it; with several pipelines, on the script's seed.
    val = DataLoader(noise_loader(samples=9 * pipelines).dataset, 3, shuffle=pipelines == 1)
    trainer.fit(made, train, val, ckpt_path=ckpt_path)
    state = {name: value.clone() for name, value in made.state_dict().items()} if trainer.is_global_zero else {}
    return {"losses": watcher.seen.losses, "rows": notes.rows, "state": {**buffers.found, **state}}


def require_exact(
    tmp_path: Path, p: int, moments: dict[str, int], *, module: Callable[[], Any] = Sensitive, **options: Any
) -> None:
    """A run that goes on from each of these files, saved after so many mini-batches, is the end of the whole run."""
    options = {"strategy": {}, **options}
    ranks = options.get("devices") or p

    def on_rank(rank: int) -> Any:
        whole = run(p, module, folder=tmp_path, **options)
        return whole, [run(p, module, ckpt_path=tmp_path / f"{name}.ckpt", **options) for name in moments]

    accumulate = options.get("accumulate_grad_batches", 1)
    for rank, (whole, resumed) in enumerate(run_ranks(on_rank, ranks)):
        for (name, done), seen in zip(moments.items(), resumed):
            assert seen["losses"] == whole["losses"][done:], name
            require_same_bits(seen["state"], whole["state"])
            epochs, rest = divmod(done, PER_EPOCH)
            steps = epochs * math.ceil(PER_EPOCH / accumulate) + rest // accumulate
            same = [row for row in whole["rows"] if row[0] is None or row[0] >= steps]
            assert seen["rows"] == same[len(same) - len(seen["rows"]) :], name
            assert rank or len(seen["rows"]) > (len(whole["losses"]) - done) // accumulate


def test_what_is_in_flight_goes_on(tmp_path: Path) -> None:
    # After 7 a validation is due, which a resume leaves out, as in plain Lightning.
    require_exact(tmp_path, 3, {"1": 1, "8": 8, "val-1-9": 9, "end-10": 10})


def test_half_an_accumulation_goes_on(tmp_path: Path) -> None:
    """Two validations in each epoch, each after two mini-batches; three make an update. Norms are on their way, too."""
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "strategy": {"versions": "2bw"}}
    require_exact(tmp_path, 3, {"val-1-2": 7, "3": 8, "end-4": 10}, **options)


def test_what_is_in_flight_in_pipelines_side_by_side_goes_on(tmp_path: Path) -> None:
    """Each has its own buffers, random numbers, and gradients of half an accumulation."""
    options = {"accumulate_grad_batches": 2, "strategy": {"data_parallel_size": 2}}
    require_exact(tmp_path, 2, {"val-1-4": 7}, devices=4, **options)


@FULL
@pytest.mark.parametrize(
    ("p", "options"),
    [
        (3, {"averages": lambda: [EMAWeightAveraging(decay=0.8, update_every_n_steps=2)]}),
        *(
            (2, {"devices": 4, **options, "strategy": {"data_parallel_size": 2, **options.get("strategy", {})}})
            for options in (
                {},
                {"module": TiedThrice},
                {"averages": lambda: [EMAWeightAveraging(decay=0.8)]},
                {"strategy": {"schedule": "1f1b", "num_microbatches": 2}, "module": Dropping},
                {"devices": 2},
            )
        ),
        (1, {}),
        (2, {"strategy": {"extra_in_flight": 2}}),
        (3, {"strategy": {"versions": "vertical"}}),
        (3, {"strategy": {"load_on": "ends"}}),
        (3, {"strategy": {"cross_epoch": False}}),
        (3, {"module": TiedThrice}),
        (4, {"strategy": {"split_points": ["net.1", "net.2", "net.3"]}, "devices": 2}),
        (4, {"module": partial(Sensitive, optimizer="adamw"), "devices": 1}),
        (2, {"strategy": {"schedule": "1f1b", "num_microbatches": 3}, "module": Dropping}),
        pytest.param(
            3,
            {"module": Overflows, "plugins": MixedPrecision("16-mixed", "cpu", GradScaler("cpu", 2.0**19))},
            id="16-mixed",
        ),
    ],
    ids=lambda each: re.sub(r" at 0x\w+", "", str(each)),
)
def test_with_everything_else(p: int, options: dict[str, Any], tmp_path: Path) -> None:
    require_exact(tmp_path, p, {"1": 1, "8": 8, "end-10": 10}, **options)


@FULL
def test_what_is_kept_changes_no_number_and_is_left_out_elsewhere(tmp_path: Path) -> None:
    """With another number of stages, and in plain Lightning, the file is like any other."""
    path = tmp_path / "7.ckpt"

    def on_rank(rank: int) -> Any:
        saving = run(3, Sensitive, {}, folder=tmp_path)
        return saving, run(3, Sensitive, {"exact_resume": False})

    for saving, without in run_ranks(on_rank, 3):
        assert saving["losses"] == without["losses"]

    def with_two(rank: int) -> Any:
        exact = run(2, Sensitive, {}, ckpt_path=path)
        return exact, run(2, Sensitive, {"exact_resume": False}, ckpt_path=path)

    for exact, without in run_ranks(with_two, 2):
        assert exact["losses"] == without["losses"]
        assert len(exact["losses"]) == EPOCHS * PER_EPOCH - 7
    plain = quiet_trainer(strategy="auto", devices=1, max_epochs=EPOCHS)
    plain.fit(Sensitive(), noise_loader(samples=3 * PER_EPOCH), ckpt_path=path)
    assert plain.global_step == EPOCHS * PER_EPOCH
    require_same_bits(dict(Sensitive.load_from_checkpoint(path).state_dict()), torch.load(path)["state_dict"])


def exact(schedule: Continuous, starts: tuple[str, ...]) -> ExactResume:
    cut = SimpleNamespace(num_stages=len(starts) + 1, starts=starts)
    run = SimpleNamespace(cut=cut, stages=[0], training=SimpleNamespace(backwarded=0))
    return ExactResume(mock.Mock(), run, mock.Mock(), schedule, None)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (exact(Continuous(), ("net.1",)), r"num_stages=3, now 2; split_points=\['net.1', 'net.2'\], now \['net.1'\]"),
        (exact(Continuous(), ("net.1", "net.3")), r"split_points=.*now \['net.1', 'net.3'\]"),
        (exact(Continuous(extra_in_flight=1), ("net.1", "net.2")), "extra_in_flight=0, now 1"),
        (exact(Continuous(versions=TWO_BUFFERED), ("net.1", "net.2")), "versions='stash', now '2bw'"),
    ],
)
def test_what_is_another_pipelines_is_not_put_back(now: ExactResume, said: str) -> None:
    saved = {"plan": exact(Continuous(), ("net.1", "net.2")).plan}
    with pytest.warns(UserWarning, match=f"another pipeline \\({said}.*filled anew"):
        now.hear({IN_FLIGHT: saved})
    assert not now.is_going_on


def test_a_file_without_it_is_told_of() -> None:
    now = exact(Continuous(), ("net.1",))
    with pytest.warns(UserWarning, match="not saved with exact_resume=True.* filled anew"):
        now.hear({"state_dict": {}})
    assert not now.is_going_on
    now.hear({IN_FLIGHT: {"plan": now.plan, "stages": {0: {"older": {}}}, "beside": []}})
    assert now.is_going_on
