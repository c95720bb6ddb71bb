"""Ways to train the same mini-batches. Each runs in processes of its own and says when its steps ended."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining

from benchmarks.workloads import Regression, loader, repeated
from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.engine.timeline import KINDS


@dataclass(frozen=True)
class Work:
    """What is to be trained.

    Attributes:
        block: makes one block; it must not depend on what was made before.
        blocks: how many, over all stages.
        shape: of a mini-batch, (samples, ...).
        batches: mini-batches of a run.
    """

    block: Callable[[], nn.Module]
    blocks: int
    shape: tuple[int, ...]
    batches: int

    def chain(self) -> list[nn.Module]:
        """All blocks."""
        torch.manual_seed(0)
        return [self.block() for _ in range(self.blocks)]


@dataclass
class Outcome:
    """What one rank says.

    Attributes:
        ends: when each step ended, in seconds on the machine's clock.
        begin: when the first one began.
        seconds: spent on each kind of thing, where the contestant measures it.
        steady_idle: share of the steady state that was idle, likewise.
    """

    ends: list[float]
    begin: float
    seconds: dict[str, float] = field(default_factory=dict)
    steady_idle: float | None = None


class _Ends(pl.Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []
        self.begin = 0.0
        self.outcome: Outcome | None = None
        self._at_fill: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        strategy = trainer.strategy
        if isinstance(strategy, ContinuousPipeStrategy):
            figures = strategy.stage_run.training.last.news.books.figures()
            if len(self.ends) == strategy.num_stages + 1:
                self._at_fill = figures
            # The drain begins when the first stage has no more forwards to run.
            if len(self.ends) == trainer.max_steps - strategy.num_stages:
                steady = figures.since(self._at_fill)
                self.outcome = Outcome([], self.begin, steady_idle=steady.idle_s / (steady.elapsed_ns / 1e9))

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        outcome = self.outcome or Outcome([], self.begin)
        outcome.ends = self.ends
        strategy = trainer.strategy
        if isinstance(strategy, ContinuousPipeStrategy):
            figures = strategy.stage_run.training.last.news.books.figures()
            outcome.seconds = {kind: figures.seconds(kind) for kind in KINDS}
        self.outcome = outcome


def ours(work: Work, rank: int, ranks: int, extra_in_flight: int = 0) -> Outcome:
    """ContinuousPipe inside Lightning's Trainer."""
    strategy = ContinuousPipeStrategy(extra_in_flight=extra_in_flight, check="fills")
    return _trained(work, ranks, strategy, work.shape)


def lightning_ddp(work: Work, rank: int, ranks: int) -> Outcome:
    """Lightning's DDP: each rank takes its share of the samples."""
    samples, *rest = work.shape
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
    return _trained(work, ranks, strategy, (samples // ranks, *rest))


def lightning_alone(work: Work, rank: int, ranks: int) -> Outcome:
    """Lightning on one device, in each rank by itself."""
    os.environ.pop("WORLD_SIZE")
    return _trained(work, 1, "auto", work.shape)


def _trained(work: Work, devices: int, strategy: Any, shape: tuple[int, ...]) -> Outcome:
    ends = _Ends()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=work.batches,
        max_epochs=-1,
        callbacks=[ends],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Regression(work.chain()), loader(shape, work.batches))
    assert ends.outcome is not None
    return ends.outcome


def plain_loop(work: Work, rank: int, ranks: int) -> Outcome:
    """A loop of torch alone, in each rank by itself: with two ranks, what the machine can do at most."""
    net = nn.Sequential(*work.chain())
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    begin = time.perf_counter()
    ends = []
    for x, y in repeated(work.shape, work.batches):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        ends.append(time.perf_counter())
    return Outcome(ends, begin)


def torch_schedule(work: Work, rank: int, ranks: int, name: str, micro_batches: int) -> Outcome:
    """A schedule of `torch.distributed.pipelining`, with an update after each mini-batch."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        return _scheduled(work, rank, ranks, name, micro_batches)
    finally:
        dist.barrier()
        dist.destroy_process_group()


def _scheduled(work: Work, rank: int, ranks: int, name: str, micro_batches: int) -> Outcome:
    cls = pipelining.schedules.get_schedule_class(name)
    several = issubclass(cls, pipelining.schedules.PipelineScheduleMulti)
    num_stages = 2 * ranks if several else ranks
    per_stage = max(1, work.blocks // num_stages)
    blocks = work.chain()
    shaped_as_v = name in ("ZBVZeroBubble", "DualPipeV")
    mine = [rank] if not several else [rank, 2 * ranks - 1 - rank] if shaped_as_v else [rank, rank + ranks]
    modules = [nn.Sequential(*blocks[s * per_stage : (s + 1) * per_stage]) for s in mine]
    stages = [pipelining.PipelineStage(module, s, num_stages, torch.device("cpu")) for module, s in zip(modules, mine)]
    schedule = cls(stages if several else stages[0], micro_batches, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], 1e-3)
    first, last = 0 in mine, num_stages - 1 in mine
    ends = []
    begin = 0.0
    for number, (x, y) in enumerate(repeated(work.shape, work.batches + 1)):
        # The first step agrees on shapes; it does not count.
        if number == 1:
            begin = time.perf_counter()
        optimizer.zero_grad()
        inputs = (x,) if first else ()
        schedule.step(*inputs, **({"target": y, "losses": []} if last else {}))
        optimizer.step()
        if number:
            ends.append(time.perf_counter())
    return Outcome(ends, begin)
