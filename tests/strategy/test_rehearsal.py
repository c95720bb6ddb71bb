"""Several stages in one process give the numbers of a process each: two on each of two, and all of them on one."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.schedules import Given, ZeroBubble
from tests.helpers.comparing import require_equal_under_policy
from tests.helpers.fits import Notes, Numbers, Seen, fit_in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.modules import WIDTH, Chain, noise_loader
from tests.helpers.ranks import run_ranks

# The last batch of an epoch has two samples: BatchNorm needs more than one.
data = partial(noise_loader, 20, shuffle=True)


class Noisy(Chain):
    """Draws and writes wherever it can: dropout, BatchNorm, noise of its own, into its batch, and on itself.

    One BatchNorm stands between blocks, and has no weights.
    """

    def __init__(self, depth: int = 4) -> None:
        super().__init__(depth, dropout=0.2, noise=True)
        for block in self.net:
            block.norm = nn.BatchNorm1d(WIDTH)
        self.net.insert(2, nn.BatchNorm1d(WIDTH, affine=False))
        self.steps = 0
        self.register_buffer("total", torch.zeros(()))

    def loss(self, batch: Any) -> Tensor:
        self.steps += 1
        self.total += self.steps % 3
        batch[0].mul_(0.5 + 0.01 * self.total)
        return super().loss(batch)

    def on_train_epoch_start(self) -> None:
        self.steps = 0


def buffers_of(trainer: pl.Trainer, module: pl.LightningModule) -> Numbers:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def fit_on(devices: int, module: Any = Noisy, stages: int = 4, **options: Any) -> Seen:
    options = {"max_epochs": 2, "look": buffers_of, **options}
    return fit_in_pipeline(stages, module, data, data, devices=devices, **options)[0]


def require_same(a: Seen, b: Seen) -> None:
    assert a.losses == b.losses
    assert len(a.losses) > 0
    assert a.metrics == b.metrics
    require_same_bits(a.weights, b.weights)
    require_same_bits(a.found, b.found)


def test_four_stages_give_the_same_bits_on_four_processes_on_two_and_on_one() -> None:
    on_four = fit_on(4)
    require_same(on_four, fit_on(2))
    require_same(on_four, fit_on(1))


@pytest.mark.parametrize(
    ("policy", "stages", "accumulate", "extra"),
    [
        ("stash", 8, 1, 0),
        ("stash", 4, 3, 1),
        ("latest", 4, 1, 0),
        ("latest", 4, 3, 0),
        ("vertical", 4, 1, 1),
        ("vertical", 4, 3, 0),
        ("2bw", 4, 3, 0),
    ],
)
def test_one_process_equals_the_reference(policy: str, stages: int, accumulate: int, extra: int) -> None:
    """And every stage keeps the versions that the plan says, no more."""
    module = partial(Chain, stages, dropout=0.2)
    (seen,), schedule = require_equal_under_policy(policy, stages, accumulate, extra, module, devices=1)
    assert seen.found.all_alive == [schedule.live_versions(stage, stages) for stage in range(stages)]


@rank_zero_only
def write(logger: Notes, row: dict[str, float]) -> None:
    """As the methods of Lightning's own loggers."""
    logger.log_metrics(row)


class Talker(Noisy):
    """Logs before it runs its blocks, in every way there is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("before", batch[0].sum(), on_step=True, on_epoch=True, reduce_fx="sum")
        write(self.logger, {"by hand": 1.0})
        if self.trainer.is_global_zero:
            self.logger.log_metrics({"by rank 0": 2.0})
        return super().training_step(batch, batch_idx)


def test_only_the_last_stage_is_heard() -> None:
    def rows(trainer: pl.Trainer, module: pl.LightningModule) -> list[Any]:
        return [(step, {k: v for k, v in row.items() if k != "epoch"}) for step, row in trainer.logger.rows]

    found = [
        fit_in_pipeline(
            2, Talker, data, data, devices=devices, look=rows, logger=[Notes()], max_epochs=1, log_every_n_steps=1
        )[0]
        for devices in (1, 2)
    ]
    assert found[0].found == found[1].found
    assert len([row for row in found[0].found if "loss_step" in row[1]]) == len(found[0].losses)
    assert [row for row in found[0].found if "by hand" in row[1]]
    assert [row for row in found[0].found if "by rank 0" in row[1]]


def test_a_checkpoint_of_a_rehearsal_is_a_plain_one_and_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    def on_rank(_: int) -> None:
        pl.seed_everything(7, verbose=False)
        module = Noisy()
        before = {name: set(vars(each)) for name, each in module.net.named_modules()}
        strategy = ContinuousPipeStrategy(num_stages=4)
        trainer = quiet_trainer(devices=1, strategy=strategy, max_epochs=1)
        trainer.fit(module, data())
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
        require_same_bits(saved["state_dict"], module.state_dict())
        assert {name: set(vars(each)) for name, each in module.net.named_modules()} == before
        assert not [hook for each in module.modules() for hook in (*each._forward_hooks, *each._forward_pre_hooks)]
        # Plain Lightning goes on from there, optimizer and all; and so does another rehearsal, with the same trainer.
        plain = quiet_trainer(devices=1, max_epochs=2)
        plain.fit(Noisy(), data(), ckpt_path=tmp_path / "after.ckpt")
        assert plain.global_step == 2 * trainer.global_step
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data())
        assert trainer.global_step == plain.global_step

    run_ranks(on_rank, 1)


def test_a_checkpoint_in_mid_stream_is_the_same_however_many_processes(tmp_path: Path) -> None:
    saved = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)

        def saves(folder: Path = folder) -> list[pl.Callback]:
            return [pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)]

        fit_on(devices, stages=2, callbacks=saves, enable_checkpointing=True)
        found = [torch.load(path, weights_only=False) for path in folder.glob("*.ckpt")]
        saved.append(sorted(found, key=lambda each: int(each["global_step"])))
    assert [each["global_step"] for each in saved[0]] == [4, 8, 12]
    for one, two in zip(*saved):
        require_same_bits(one["state_dict"], two["state_dict"])
        states = [each["optimizer_states"][0]["state"] for each in (one, two)]
        for number, state in states[0].items():
            assert torch.equal(state["momentum_buffer"], states[1][number]["momentum_buffer"])


def test_an_evaluation_alone_streams_through_all_stages() -> None:
    def on_rank(_: int) -> tuple[Any, Any]:
        found = []
        for strategy in ("auto", ContinuousPipeStrategy(num_stages=4)):
            pl.seed_everything(7, verbose=False)
            trainer = quiet_trainer(devices=1, strategy=strategy)
            module = Chain()
            found.append(
                (trainer.validate(module, noise_loader(), verbose=False), trainer.predict(module, noise_loader()))
            )
        return found[0], found[1]

    (plain, predicted), (rehearsed, also_predicted) = run_ranks(on_rank, 1)[0]
    assert plain == rehearsed
    assert all(map(torch.equal, predicted, also_predicted))


@pytest.mark.parametrize(
    "schedule", [pytest.param("gpipe", marks=pytest.mark.full), pytest.param("1f1b", marks=pytest.mark.full), "zb"]
)
def test_flush_schedules_are_rehearsed_too(schedule: str) -> None:
    """With micro-batches of different sizes, accumulation, and clipping by the norm of all stages."""
    options: dict[str, Any] = {
        "strategy": {"schedule": schedule, "num_microbatches": 3},
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.01,
    }
    # No BatchNorm: some micro-batches have one sample.
    module = partial(Chain, 4, dropout=0.2, noise=True)
    a_process_each, *fewer = (fit_on(devices, module, **options) for devices in (4, 2, 1))
    for rehearsed in fewer:
        require_same(rehearsed, a_process_each)


def test_split_backwards_are_rehearsed_too() -> None:
    strategy = {"early_input_gradient": True}
    whole, *split = (fit_on(devices, strategy=each) for devices, each in ((1, {}), (2, strategy), (1, strategy)))
    for rehearsed in split:
        require_same(rehearsed, whole)


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("strategy", "accumulate"),
    [
        ({}, 1),
        ({"early_input_gradient": True}, 1),
        ({"extra_in_flight": 1}, 3),
        ({"versions": "latest"}, 1),
        ({"versions": "vertical"}, 3),
        ({"versions": "2bw"}, 7),
        ({"schedule": "gpipe", "num_microbatches": 3}, 1),
        ({"schedule": "1f1b", "num_microbatches": 3}, 2),
        ({"schedule": "zb", "num_microbatches": 3}, 1),
        pytest.param({"schedule": Given(ZeroBubble().plan(8, 3))}, 2, id="given"),
    ],
    ids=lambda each: "-".join(map(str, each.values())) if isinstance(each, dict) else str(each),
)
def test_eight_stages_on_fewer_devices_have_the_bits_of_eight_processes(
    strategy: dict[str, Any], accumulate: int
) -> None:
    module = partial(Chain, 8, dropout=0.2, noise=True)
    options = {"stages": 8, "strategy": strategy, "accumulate_grad_batches": accumulate}
    a_process_each, *fewer = (fit_on(devices, module, **options) for devices in (8, 4, 2, 1))
    for rehearsed in fewer:
        require_same(rehearsed, a_process_each)


def test_a_process_alone_keeps_its_threads() -> None:
    """It took as many as there are cores, and gradients rounded otherwise than in plain Lightning before it."""

    def on_rank(_: int) -> int:
        del os.environ["OMP_NUM_THREADS"]
        torch.set_num_threads(5)
        quiet_trainer(devices=1, strategy=ContinuousPipeStrategy(num_stages=2), fast_dev_run=1).fit(Chain(), data())
        return torch.get_num_threads()

    assert run_ranks(on_rank, 1) == [5]


def test_words_about_a_rank_name_all_its_stages() -> None:
    strategy = ContinuousPipeStrategy(num_stages=4, parallel_devices=[torch.device("cpu")] * 2)
    assert [strategy.named_stages_of(rank) for rank in range(2)] == ["2-3", "0-1"]
