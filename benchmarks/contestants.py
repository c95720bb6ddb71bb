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
from lightning_cpipe.schedules import Continuous, Given, GPipe, OneFOneB, Schedule
from lightning_cpipe.schedules.comparison import Cost
from lightning_cpipe.schedules.exchange import read_csv

SHAPED_AS_V = ("ZBVZeroBubble", "DualPipeV")
"""Schedules of torch in which a rank holds two parts of the model: one from the front, one from the end."""

TWO_PARTS_PER_RANK = ("Interleaved1F1B", *SHAPED_AS_V)
"""Schedules of torch in which a rank holds two parts of the model."""


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


@dataclass(frozen=True)
class Price:
    """What a contestant's plan costs besides time.

    Attributes:
        kept: mini-batches whose forwards the fullest rank keeps for their backwards, at most.
        versions: of its weights that each stage needs at once.
        delay: updates by which each stage's gradients are late.
    """

    kept: float = 1.0
    versions: str = "1"
    delay: str = "0"

    @classmethod
    def of(cls, schedule: Schedule, ranks: int, batches: int, micro_batches: int) -> Price:
        """Count it on the plan for so many batches; for a flush schedule these are the micro-batches of one."""
        cost = Cost.of("", schedule, ranks, batches)
        _, versions, delay = cost.per_stage.words()
        return cls(cost.kept / micro_batches, versions, delay)


@dataclass
class Outcome:
    """What one rank says.

    Attributes:
        ends: when each step ended, in seconds on the machine's clock.
        begin: when the first one began.
        seconds: spent on each kind of thing, where the contestant measures it.
        steady_idle: measured share of the steady state in which it waited for a neighbour; None where it has none, or
            none that can be told.
        price: of the whole contestant; by default that of training without a pipeline.
    """

    ends: list[float]
    begin: float
    seconds: dict[str, float] = field(default_factory=dict)
    steady_idle: float | None = None
    price: Price = Price()


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
            schedule = strategy.schedule
            fill = schedule.lag(0, strategy.num_stages) if isinstance(schedule, Continuous) else 0
            if len(self.ends) == fill + 2:
                self._at_fill = figures
            # The drain begins when the first stage has no more forwards to run.
            if len(self.ends) == trainer.max_steps - fill - 1:
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


def ours(work: Work, rank: int, ranks: int, num_microbatches: int = 1, **options: Any) -> Outcome:
    """ContinuousPipe inside Lightning's Trainer, with options of the strategy.

    Without looks: they come at powers of two, so often in a run as short as these that they hide the steady state.
    """
    strategy = ContinuousPipeStrategy(num_microbatches=num_microbatches, check="fills", looks=False, **options)
    outcome = _trained(work, ranks, strategy, work.shape)
    batches = work.batches if isinstance(strategy.schedule, Continuous) else num_microbatches
    outcome.price = Price.of(strategy.schedule, ranks, batches, num_microbatches)
    return outcome


def lightning_ddp(work: Work, rank: int, ranks: int) -> Outcome:
    """Lightning's DDP: each rank takes its share of the samples."""
    samples, *rest = work.shape
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
    outcome = _trained(work, ranks, strategy, (samples // ranks, *rest))
    outcome.price = Price(kept=1 / ranks)
    return outcome


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
    """A schedule of `torch.distributed.pipelining`, with an update after each mini-batch.

    Args:
        work: what to train.
        rank: here, that of the first stage is 0.
        ranks: as many stages, or twice as many where `name` is of `TWO_PARTS_PER_RANK`.
        name: of the schedule's class.
        micro_batches: per mini-batch.
    """
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
    num_stages = 2 * ranks if name in TWO_PARTS_PER_RANK else ranks
    per_stage = max(1, work.blocks // num_stages)
    blocks = work.chain()
    mine = [rank, num_stages - 1 - rank] if name in SHAPED_AS_V else [*range(rank, num_stages, ranks)]
    modules = [nn.Sequential(*blocks[s * per_stage : (s + 1) * per_stage]) for s in mine]
    stages = [pipelining.PipelineStage(module, s, num_stages, torch.device("cpu")) for module, s in zip(modules, mine)]
    schedule = cls(stages if several else stages[0], micro_batches, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], 1e-3)
    first, last = 0 in mine, num_stages - 1 in mine
    ends = []
    begin = 0.0
    waits = _Waits()
    for number, (x, y) in enumerate(repeated(work.shape, work.batches + 1)):
        # The first step agrees on shapes; it does not count.
        if number == 1:
            begin, waits.seconds = time.perf_counter(), 0.0
        optimizer.zero_grad()
        inputs = (x,) if first else ()
        with waits:
            schedule.step(*inputs, **({"target": y, "losses": []} if last else {}))
        optimizer.step()
        if number:
            ends.append(time.perf_counter())
    price = Price.of(_plan_of(schedule), ranks, micro_batches, micro_batches)
    return Outcome(ends, begin, steady_idle=waits.seconds / (ends[-1] - begin), price=price)


class _Waits:
    """Inside, the time that this rank waits for messages to arrive or to be sent is added up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._wait = dist.Work.wait

    def __enter__(self) -> None:
        wait = self._wait

        def timed(work: dist.Work, *args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return wait(work, *args)
            finally:
                self.seconds += time.perf_counter() - begin

        dist.Work.wait = timed

    def __exit__(self, *_: Any) -> None:
        dist.Work.wait = self._wait


def _plan_of(schedule: Any) -> Schedule:
    """One of torch's schedules as one of ours: the same, or the plan that it tells."""
    if isinstance(schedule, pipelining.ScheduleGPipe):
        return GPipe()
    if isinstance(schedule, pipelining.Schedule1F1B):
        return OneFOneB()
    lines = ([str(action or "") for action in actions] for _, actions in sorted(schedule.pipeline_order.items()))
    plan = read_csv("\n".join(map(",".join, lines)))
    return Given(plan, stages_per_rank=len(plan.held[0]))
