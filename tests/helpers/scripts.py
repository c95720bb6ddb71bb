"""A training run with a fault in it: as a script, for any launcher, and for a test's own process.

    python tests/helpers/scripts.py '{"launcher": "popen", "devices": 2, "fault": {"kind": "kill", "rank": 1}}'

With `wait_for_orders` instead, the script imports what it needs once and forks a process for every order.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):
    # With these torchmetrics draws, hears and reads; importing them takes as long as all the rest.
    hidden = ("matplotlib", "scipy", "transformers")
    sys.modules.update(dict.fromkeys(hidden))
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: version("none" if name in hidden else name)

    # A shell that runs the tests in the background lets them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cpipe import ContinuousPipeStrategy

if __name__ in ("__main__", "__mp_main__"):
    # A process that ends looks for garbage in all that these have made, and one that was forked copies it for that: on
    # a busy machine it takes each five seconds, and a launcher ends after its ranks.
    gc.freeze()

WIDTH = 8
BATCHES = 24
"""Mini-batches of an epoch."""

AT = 5
"""The mini-batch at which a fault strikes, unless it is told otherwise."""

MESSAGE = "the fault of this test"
STRUCK = "struck"
"""The file that tells when the fault struck, on the clock that all processes share."""


def local_rank() -> int:
    """This process's rank; every launcher says it in the same variable."""
    return int(os.environ.get("LOCAL_RANK", 0))


class Fault(pl.Callback):
    """Strikes on one rank, at one moment.

    Args:
        kind: what happens: ``raise``; ``kill``, ``stop`` (it hangs) or ``terminate`` to the rank's own process;
            ``interrupt`` to the whole group, as Ctrl+C does; ``orphan`` kills the process that started the rank's own;
            ``tell`` waits until somebody opens the FIFO ``told``.
        rank: on which it happens.
        moment: the hook in which it happens.
        batch: the mini-batch at which it happens, where the hook has one.
    """

    def __init__(self, kind: str, rank: int = 0, moment: str = "train_batch_start", batch: int = AT) -> None:
        self.kind = kind
        self.rank = rank
        self.moment = moment
        self.batch = batch

    def may_strike(self, moment: str, batch: int | None = None) -> None:
        if self.moment != moment or local_rank() != self.rank or batch not in (None, self.batch):
            return
        if not Path(STRUCK).exists():
            Path(STRUCK).write_text(repr(time.monotonic()))
        if self.kind == "raise":
            raise ValueError(MESSAGE)
        if self.kind == "tell":
            Path("told").write_text("")
        elif self.kind == "interrupt":
            os.killpg(0, signal.SIGINT)
        elif self.kind == "orphan":
            os.kill(os.getppid(), signal.SIGKILL)
        else:
            numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}
            os.kill(os.getpid(), numbers[self.kind])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.may_strike("train_batch_start", batch_idx)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self.may_strike("validation_batch_start", batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.may_strike("train_end")


class Noise(Dataset[Tensor]):
    """Noise, the same on every rank."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Tensor:
        if self.fault is not None:
            self.fault.may_strike("data", index)
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


class Module(pl.LightningModule):
    """A chain of linear layers.

    Args:
        fault: strikes inside hooks of the module and its data, too.
        layers: in the chain.
        differs_at: the mini-batch from which on each rank draws in an order of its own.
        workers: of the training loader.
    """

    def __init__(self, fault: Fault | None, layers: int = 6, differs_at: int = BATCHES, workers: int = 0) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        self.fault = fault
        self.differs_at = differs_at
        self.workers = workers

    def may_strike(self, moment: str, batch: int | None = None) -> None:
        if self.fault is not None:
            self.fault.may_strike(moment, batch)

    def configure_callbacks(self) -> list[pl.Callback]:
        # The last hook before the ranks look for each other.
        self.may_strike("before_they_meet")
        return []

    def setup(self, stage: str) -> None:
        self.may_strike("setup")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.may_strike("training_step", batch_idx)
        return self.chain(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.chain(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader[Tensor]:
        own = torch.randperm(BATCHES, generator=torch.Generator().manual_seed(local_rank())).tolist()
        order = [index if index < self.differs_at else own[index] for index in range(BATCHES)]
        return DataLoader(Noise(self.fault), sampler=order, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Noise(None))


def fit(
    launcher: str,
    devices: int,
    fault: dict[str, Any] | None = None,
    epochs: int = 1,
    timeout: float = 60.0,
    pipelines: int = 1,
    nodes: int = 1,
    **options: Any,
) -> pl.Trainer:
    """One run, with `options` for the module; with -1 `epochs` only the fault ends it."""
    strikes = None if fault is None else Fault(**fault)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=ContinuousPipeStrategy(start_method=launcher, timeout=timeout, data_parallel_size=pipelines),
        max_epochs=epochs,
        callbacks=[] if strikes is None else [strikes],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(strikes, **options))
    return trainer


def go_on(trainer: pl.Trainer, fits_again: bool) -> None:
    """What a script does after its run; on other ranks than 0 it fails."""
    if not trainer.is_global_zero:
        raise ValueError(MESSAGE)
    print("gone:", *(child.wait() for child in trainer.strategy.launcher.procs))
    if fits_again:
        trainer.fit(Module(None))


def wait_for_orders() -> None:
    """For every line on standard input, fork a process that goes on as if it had been started with it.

    Its number is printed at once, and its exit status when it has ended. Returns in the forked processes.
    """
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            os.chdir(order["folder"])
            for stream, name in enumerate((os.devnull, "out", "err")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o644), stream)
            os.environ.update(order["environment"])
            tempfile.tempdir = None
            sys.argv = order["arguments"]
            return
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "wait_for_orders":
        wait_for_orders()
    if sys.argv[0] == "torchrun":
        from torch.distributed.run import main

        main(sys.argv[1:])
    else:
        asked = json.loads(sys.argv[1])
        goes_on = asked.pop("goes_on", None)
        trainer = fit(**asked)
        if goes_on is not None:
            go_on(trainer, **goes_on)
        print("fitted")
