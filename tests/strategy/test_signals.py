"""A signal ends all ranks after the same step, with a checkpoint where Lightning saves one, or requeues SLURM's job."""

from __future__ import annotations

import os
import signal
from collections import ChainMap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import Tensor

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.strategy.sharing.signals import InterruptedTogether, Request, Signals
from tests.helpers.fits import alone, in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.ranks import run_ranks

P = 2
AT = 2


class Sends(pl.Callback):
    """Sends signals to this process, each on the ranks and before the step that it is for.

    Args:
        signals: (rank, step, signal).
    """

    def __init__(self, *signals: tuple[int, int, int]) -> None:
        self.signals = signals
        self.steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for rank, step, number in self.signals:
            if (trainer.global_rank, trainer.global_step) == (rank, step):
                os.kill(os.getpid(), number)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps = trainer.global_step


@dataclass
class End:
    """How a fit ended on a rank.

    Attributes:
        error: the exception, and its exit code.
        steps: that were made.
        weights: of the rank's stages.
    """

    error: tuple[str, int | None]
    steps: int
    weights: dict[str, Tensor]


def end(folder: str, signals: list[tuple[int, int, int]], **options: Any) -> End:
    """How a fit ends that saves a checkpoint in a folder then."""
    pl.seed_everything(7, verbose=False)
    # A shell that runs the tests in the background lets them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sends, module = Sends(*signals), Chain()
    options |= {"callbacks": [sends, OnExceptionCheckpoint(folder)], "enable_checkpointing": True}
    trainer = quiet_trainer(max_epochs=50, **options)
    error = ("none", None)
    try:
        trainer.fit(module, noise_loader(), noise_loader(samples=3))
    except BaseException as caught:
        error = type(caught).__name__, getattr(caught, "code", None)
    here = {name: p for name, p in module.named_parameters() if not isinstance(p, AbsentParameter)}
    return End(error, sends.steps, {name: p.detach().clone() for name, p in here.items()})


@pytest.mark.parametrize(
    ("number", "places"),
    [
        (signal.SIGTERM, [(P - 1, AT)]),
        pytest.param(signal.SIGTERM, [(0, AT)], marks=pytest.mark.full),
        # As Ctrl-C does in a terminal, each rank at another moment.
        (signal.SIGINT, [(0, AT), (1, AT - 1)]),
    ],
)
def test_a_signal_ends_all_ranks_after_the_same_step_with_a_checkpoint(
    number: int, places: list[tuple[int, int]]
) -> None:
    scenario = partial(end, "ours", [(*place, number) for place in places])
    found = in_pipeline(P, scenario)
    steps = found[0].steps
    assert AT < steps < AT + 2 * P
    assert [each.steps for each in found] == P * [steps]
    saved = torch.load("ours/on_exception.ckpt")
    assert saved["global_step"] == steps
    require_same_bits(saved["state_dict"], dict(ChainMap(*(each.weights for each in found))))
    assert len(saved["optimizer_states"][0]["state"]) == len(saved["state_dict"])
    plain = alone(partial(end, "plain", [(0, AT, number)]))
    assert [each.error for each in found] == P * [plain.error]
    assert plain.error == (("SIGTERMException", None) if number == signal.SIGTERM else ("SystemExit", 1))


def test_a_validation_at_the_step_of_a_signal_is_no_hindrance() -> None:
    """The step's own validation is broken off, as in Lightning."""
    signals = [(0, AT, signal.SIGTERM)]
    for of_rank in in_pipeline(2, partial(end, ".", signals, val_check_interval=AT + 1)):
        assert (of_rank.error[0], of_rank.steps) == ("SIGTERMException", AT + 1)
    assert torch.load("on_exception.ckpt")["global_step"] == AT + 1


SCONTROL = """#!/bin/sh
echo "$@" >> "{folder}/requeued"
ls "{folder}" | grep ckpt > "{folder}/there"
exit 0
"""


def on_slurm(rank: int, ckpt_path: str | None = None) -> tuple[int, int]:
    """A fit that SLURM tells to requeue, each rank at another moment; the steps before and after."""
    tasks = {"PROCID": rank, "LOCALID": rank, "NTASKS": 2, "NTASKS_PER_NODE": 2, "NODEID": 0, "JOB_ID": 4711}
    os.environ.update({f"SLURM_{name}": str(value) for name, value in tasks.items()})
    os.environ["PATH"] = f"{Path.cwd() / 'bin'}:{os.environ['PATH']}"
    pl.seed_everything(7, verbose=False)
    trainer = quiet_trainer(
        callbacks=[] if ckpt_path else [Sends((0, AT, signal.SIGUSR1), (1, AT - 1, signal.SIGUSR1))],
        strategy=ContinuousPipeStrategy(async_save=True),
        devices=2,
        max_epochs=2,
        plugins=[SLURMEnvironment(auto_requeue=True)],
    )
    begun: list[int] = []
    trainer.callbacks.append(pl.callbacks.LambdaCallback(on_train_start=lambda t, _: begun.append(t.global_step)))
    trainer.fit(Chain(), noise_loader(), noise_loader(samples=3), ckpt_path=ckpt_path)
    return begun[0], trainer.global_step


@pytest.mark.filterwarnings("ignore:.*ended before the epoch ended:UserWarning")
def test_slurm_s_signal_saves_on_all_ranks_and_requeues_once(tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(SCONTROL.format(folder=tmp_path))
    scontrol.chmod(0o755)
    assert run_ranks(on_slurm, 2) == 2 * [(0, 16)]
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    # Here nobody goes on before the file is there: the job ends next.
    assert (tmp_path / "there").read_text() == "hpc_ckpt_1.ckpt\n"
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    saved = torch.load("hpc_ckpt_1.ckpt")
    assert AT < saved["global_step"] <= AT + 2
    # The job that was requeued goes on there.
    assert run_ranks(partial(on_slurm, ckpt_path="hpc"), 2) == 2 * [(saved["global_step"], 16)]


def test_a_requeue_signal_without_training_is_ignored_with_a_warning() -> None:
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(), devices=1)
    module = Chain()
    module.trainer = trainer
    trainer.strategy.connect(module)
    with pytest.warns(UserWarning, match="nothing is trained"):
        trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)


def test_a_job_is_requeued_once_and_before_an_end() -> None:
    signals = Signals(trainer := mock.Mock())
    signals.heard = lambda: Request.REQUEUE | Request.TERMINATE
    assert [signals.decide() for _ in range(3)] == [Request.REQUEUE, Request.TERMINATE, Request.TERMINATE]
    assert trainer._signal_connector.received_sigterm is True


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signals = Signals(mock.Mock())

    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        assert signals.decide() == Request.INTERRUPT
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt) as caught, signals.obeyed(several=True):
            press_twice()
        assert not isinstance(caught.value, InterruptedTogether)
        assert not signals.ended_together
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(InterruptedTogether), signals.obeyed(several=True):
            signals.act()
        assert signals.ended_together
    finally:
        signal.signal(signal.SIGINT, before)
