"""Pipelines side by side train as one whose mini-batches are the sum of theirs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_cpipe import ContinuousPipeStrategy
from tests.helpers import scripts
from tests.helpers.comparing import require_equal_to_reference
from tests.helpers.fits import Seen, fit_in_pipeline, fit_on_rank, quiet_trainer, require_same_bits
from tests.helpers.modules import Chain, Tied, make_optimizer, noise_loader
from tests.helpers.ranks import run_ranks


def test_two_pipelines_train_with_the_mean_of_their_gradients() -> None:
    """Losses of both, weights and randomness are those of a reference that averages, to the bit, in shuffled epochs.

    Each pipeline is on a node of its own.
    """
    ranks = require_equal_to_reference(
        2,
        partial(Chain, dropout=0.3, noise=True, optimizer="adamw"),
        partial(noise_loader, samples=21, shuffle=True),
        make_optimizer("adamw", None),
        epochs=2,
        replicas=2,
        nodes=2,
    )
    first, second = ({float(x) for batch, _ in ranks[at].batches for x in batch[:, 0]} for at in (0, 2))
    # One sample is drawn twice, so that both have as many.
    assert len(first | second) == 21
    assert ranks[1].losses == ranks[0].losses != ranks[2].losses == ranks[3].losses


class Measuring(Chain):
    """Logs what is averaged over the pipelines, and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("own", loss, on_step=True, on_epoch=True)
        self.log("mean", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.seen.update(loss)
        self.log("val_metric", self.seen)
        self.log("val_mean", loss, sync_dist=True)
        self.log("val_own", loss)


class ExchangesAfterSteps(Chain):
    """Exchanges values with the other pipeline in a hook, in each of the ways there are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = MeanMetric()

    def on_train_batch_end(self, *_: Any) -> None:
        mine = torch.tensor(float(self.trainer.strategy.replica))
        self.log("after", mine, sync_dist=True)
        assert self.all_gather(mine).tolist() == [0.0, 1.0]
        self.seen.update(mine)
        assert self.seen.compute() == 0.5


def test_pipelines_may_exchange_values_after_a_step() -> None:
    """The second pipeline waited for rank 0's word of the step, and rank 0 for the second pipeline's value."""
    ranks = fit_in_pipeline(
        2, ExchangesAfterSteps, noise_loader, devices=4, strategy={"data_parallel_size": 2}, max_epochs=1
    )
    assert all(rank.metrics["after"] == 0.5 for rank in ranks)


def test_metrics_are_averaged_where_lightning_averages_them_and_all_ranks_see_the_same(tmp_path: Path) -> None:
    """What is logged with `sync_dist`, and torchmetrics, cover the data of both; the rest is the first one's."""
    checkpoint = partial(ModelCheckpoint, tmp_path, monitor="val_own", filename="{val_mean:.6f}")

    def on_end(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        return trainer.checkpoint_callback.best_model_path

    ranks = fit_in_pipeline(
        2,
        Measuring,
        partial(noise_loader, samples=12),
        partial(noise_loader, samples=12, seed=8),
        devices=4,
        strategy={"data_parallel_size": 2},
        callbacks=lambda: [checkpoint()],
        look=on_end,
        max_epochs=1,
        enable_checkpointing=True,
    )
    first, second = ranks[0], ranks[2]
    for each in ranks:
        assert each.metrics == first.metrics
        assert each.found == first.found
    metrics, steps = first.metrics, len(first.losses)
    assert metrics["own_step"] == first.losses[-1]
    assert metrics["mean_step"] == pytest.approx((first.losses[-1] + second.losses[-1]) / 2)
    assert metrics["own_epoch"] == pytest.approx(sum(first.losses) / steps)
    assert metrics["mean_epoch"] == pytest.approx(sum(first.losses + second.losses) / (2 * steps))
    assert metrics["val_metric"] == pytest.approx(metrics["val_mean"]) != pytest.approx(metrics["val_own"])
    (saved,) = tmp_path.glob("*.ckpt")
    assert str(saved) == first.found
    # One plain file of the whole module.
    state = torch.load(saved, weights_only=True)["state_dict"]
    require_same_bits({name: each for name, each in state.items() if "seen" not in name}, first.weights)


class Stop(pl.Callback):
    """Lets training end at a mini-batch: by a SIGTERM to one rank, or by a flag on it."""

    def __init__(self, rank: int, by_signal: bool) -> None:
        self.rank = rank
        self.by_signal = by_signal

    def on_train_batch_start(self, trainer: pl.Trainer, _: Any, __: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.global_rank == self.rank:
            if self.by_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                trainer.should_stop = True


def ending(rank: int, by_signal: bool) -> tuple[str, int, int]:
    """How a run ends, after how many steps and in which epoch."""
    trainer = quiet_trainer(
        strategy=ContinuousPipeStrategy(data_parallel_size=2),
        devices=4,
        max_epochs=50,
        callbacks=[Stop(rank, by_signal)],
    )
    how = "fitted"
    try:
        trainer.fit(Chain(), noise_loader(samples=90), noise_loader())
    except SystemExit as error:
        how = type(error).__name__
    return how, trainer.global_step, trainer.current_epoch


@pytest.mark.parametrize(
    ("rank", "by_signal", "how"),
    [
        (3, True, "SIGTERMException"),
        pytest.param(0, True, "SIGTERMException", marks=pytest.mark.full),
        pytest.param(0, False, "fitted", marks=pytest.mark.full),
    ],
)
def test_all_pipelines_stop_after_the_same_mini_batch(rank: int, by_signal: bool, how: str, temporary: Path) -> None:
    """Whoever asks: stage 0 of the second pipeline tells its last stage, and that one rank 0."""
    ends = run_ranks(lambda _: ending(rank, by_signal), 4)
    for words in temporary.glob("lightning_cpipe_*"):
        # Forked processes end without what they would do at the end.
        words.unlink()
    assert set(ends) == {ends[0]}
    assert ends[0][0] == how
    assert 3 <= ends[0][1] < 15 * 50


@pytest.mark.full
@pytest.mark.parametrize(("devices", "nodes"), [(6, 1), (6, 2), (6, 3), (2, 1), (2, 2)])
def test_three_stages_lie_on_any_number_of_devices_and_nodes(devices: int, nodes: int) -> None:
    """Two pipelines: of three ranks, also where one has ranks on two nodes, and each on one rank."""
    require_equal_to_reference(
        3,
        partial(Chain, optimizer="adamw"),
        noise_loader,
        make_optimizer("adamw", None),
        epochs=1,
        replicas=2,
        devices=devices,
        nodes=nodes,
    )


def test_a_pipeline_may_span_nodes() -> None:
    require_equal_to_reference(2, Chain, noise_loader, make_optimizer("sgd", None), epochs=1, nodes=2)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_two_agents_of_torchrun_make_one_world(tmp_path: Path) -> None:
    """As on two machines, each with an agent and two of the ranks."""
    options = {"launcher": "popen", "devices": 2, "nodes": 2, "pipelines": 2}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    root = Path(scripts.__file__).parents[2]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *world, f"--node-rank={node}", scripts.__file__,
             json.dumps(options)],
            env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=250) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    for agent, (out, err) in zip(agents, said):
        assert agent.returncode == 0, err
        assert out.count("fitted") == 2


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy",
    [
        {"versions": "latest"},
        {"versions": "vertical"},
        {"versions": "2bw", "accumulate": 2},
        {"extra_in_flight": 1},
        {"early_input_gradient": True},
    ],
    ids=str,
)
def test_policies_work_in_pipelines_side_by_side(strategy: dict[str, Any]) -> None:
    require_equal_to_reference(
        2, Chain, noise_loader, make_optimizer("sgd", None), epochs=2, replicas=2, **strategy
    )  # fmt: skip


def in_ddp(**options: Any) -> list[Seen]:
    """The same in Lightning's own data parallelism."""
    return run_ranks(lambda _: fit_on_rank(strategy="ddp", devices=2, **options), 2)


@pytest.mark.full
@pytest.mark.parametrize(("module", "accumulate"), [(Chain, 1), (Chain, 3), (Tied, 1)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb", "interleaved"])
def test_a_flush_schedule_with_one_micro_batch_is_ddp(
    schedule: str, accumulate: int, module: type[pl.LightningModule]
) -> None:
    options = {
        "module": module,
        "train": noise_loader,
        "val": None,
        "max_epochs": 2,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": 0.5,
    }
    stages = 4 if schedule == "interleaved" else 2
    ranks = fit_in_pipeline(
        stages, devices=4, strategy={"data_parallel_size": 2, "schedule": schedule}, **options
    )  # fmt: skip
    plain = in_ddp(**options)
    assert [ranks[0].losses, ranks[2].losses] == [each.losses for each in plain]
    require_same_bits(ranks[0].weights, plain[0].weights)


@pytest.mark.parametrize(
    ("options", "module", "said"),
    [
        ({}, lambda: Sparse(), r"sparse gradients \(words\)"),
    ],
)
def test_what_several_pipelines_can_not_do_is_refused(options: dict[str, Any], module: Any, said: str) -> None:
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(data_parallel_size=2, **options), devices=4)
    with pytest.raises(MisconfigurationException, match=said):
        trainer.fit(module(), noise_loader())


class Sparse(Chain):
    """Has an embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4, 8, sparse=True)
