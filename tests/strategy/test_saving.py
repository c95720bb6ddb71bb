"""Saving stops no stage, and a crash while saving leaves the older checkpoint whole.

That nobody waits is shown by who waits for whom: if a save waited, the run would never end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.errors import RankLostError, SaveError
from lightning_cpipe.strategy.checkpoints.one_file import write_file
from lightning_cpipe.strategy.checkpoints.promised import Promised
from lightning_cpipe.strategy.checkpoints.saves import Saves
from tests.helpers.fits import Notes, quiet_trainer
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.ranks import run_ranks

LIMIT_S = 60
"""How long a rank waits for what comes at once unless another rank waits for this one."""


class Meeting:
    """Something that happens on one rank and is waited for on another."""

    def __init__(self) -> None:
        self._event = multiprocessing.get_context("fork").Event()

    def happens(self) -> None:
        self._event.set()

    def wait(self) -> None:
        assert self._event.wait(LIMIT_S), "somebody waited"


class SavedByAUser(pl.Callback):
    """Saves once by hand, and looks at the file at once."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint("by_hand.ckpt")
            if trainer.is_global_zero:
                self.found = torch.load("by_hand.ckpt")


class Telling(Notes):
    """A logger that uploads files when it is told of them."""

    def __init__(self) -> None:
        super().__init__()
        self.uploaded: list[tuple[str, bool]] = []

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        path = Path(checkpoint_callback.last_model_path or checkpoint_callback.best_model_path)
        self.uploaded.append((path.name, path.is_file()))


def fit(p: int, callbacks: Callable[[], list[pl.Callback]], **options: Any) -> list[Any]:
    def on_rank(rank: int) -> Any:
        made, logger = callbacks(), Telling()
        strategy = ContinuousPipeStrategy(**options)
        trainer = quiet_trainer(
            strategy=strategy, devices=p, callbacks=made, logger=logger, enable_checkpointing=True, max_epochs=1
        )
        trainer.fit(Chain(), noise_loader())
        user = next((each for each in made if isinstance(each, SavedByAUser)), None)
        return logger.uploaded, {} if user is None else user.found

    return run_ranks(on_rank, p)


def test_rank_0_goes_on_before_other_stages_have_come_to_the_step(tmp_path: Path) -> None:
    """Stage 0 saves only after rank 0 has ended a later step."""
    ahead = Meeting()
    there: dict[str, bool] = {}

    def before(trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.is_global_zero and trainer.global_step == 2:
            ahead.wait()

    def after(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == 3:
            there["at the next step"] = Path("2.ckpt").exists()
            ahead.happens()

    def at_end(trainer: pl.Trainer, *_: Any) -> None:
        there["at the end"] = Path("2.ckpt").exists()
        assert there == ({"at the next step": False} if trainer.is_global_zero else {}) | {"at the end": True}

    def callbacks() -> list[pl.Callback]:
        # Lightning calls those that save last.
        every = ModelCheckpoint(".", "{step}", every_n_train_steps=2, auto_insert_metric_name=False, save_top_k=-1)
        hooks = LambdaCallback(on_train_batch_end=before), LambdaCallback(on_train_batch_end=after)
        return [*hooks, SavedByAUser(5), LambdaCallback(on_train_end=at_end), every]

    (uploaded, by_hand), _ = fit(2, callbacks)
    assert uploaded == [(f"{step}.ckpt", True) for step in (2, 4, 6, 8)]
    assert by_hand["global_step"] == 5
    assert not list(tmp_path.glob(".*"))


class Slow(TorchCheckpointIO):
    """A disk that writes nothing before rank 0 has gone on; a plugin of the user's own."""

    def __init__(self, ahead: Meeting) -> None:
        self.ahead = ahead

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        kinds = {type(value) for value in checkpoint["state_dict"].values()}
        assert kinds == {Tensor}
        assert type(checkpoint["optimizer_states"][0]["state"]) is dict
        self.ahead.wait()
        super().save_checkpoint(checkpoint, path)


def test_nobody_waits_for_the_disk(tmp_path: Path) -> None:
    ahead = Meeting()

    def after(trainer: pl.Trainer, *_: Any) -> None:
        # Two are under way by then.
        if trainer.is_global_zero and trainer.global_step == 4:
            ahead.happens()

    def callbacks() -> list[pl.Callback]:
        best = ModelCheckpoint(".", "{step}", every_n_train_steps=2, auto_insert_metric_name=False, save_last=True)
        return [LambdaCallback(on_train_batch_end=after), best]

    (uploaded, _), _ = fit(2, callbacks, async_save=True, checkpoint_io=Slow(ahead))
    assert all(there for _, there in uploaded)
    assert {path.name for path in tmp_path.iterdir()} == {"8.ckpt", "last.ckpt"}
    assert torch.load("8.ckpt")["global_step"] == torch.load("last.ckpt")["global_step"] == 8


class Full(TorchCheckpointIO):
    """A disk that is full after the first file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if checkpoint["global_step"] > 2:
            raise OSError("no space left on device")
        super().save_checkpoint(checkpoint, path)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_write_that_fails_ends_the_run_and_leaves_the_older_file(tmp_path: Path, in_background: bool) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, auto_insert_metric_name=False)
    strategy = ContinuousPipeStrategy(num_stages=2, checkpoint_io=Full(), async_save=in_background)
    trainer = quiet_trainer(strategy=strategy, devices=1, callbacks=[keep], enable_checkpointing=True, max_epochs=1)
    expected: Any = (SaveError, "4.ckpt was not written .*no space left") if in_background else (OSError, "no space")
    # Lightning leaves the port there.
    with mock.patch.dict(os.environ), pytest.raises(expected[0], match=expected[1]):
        trainer.fit(Chain(), noise_loader())
    assert [path.name for path in tmp_path.iterdir()] == ["2.ckpt"]


@pytest.mark.parametrize("kind", ["dies while it writes", "dies before the exchange", "fails"])
def test_a_crash_while_saving_leaves_the_older_checkpoint_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.ckpt"
    write_file(TorchCheckpointIO(), {"state_dict": {"weight": torch.ones(2)}}, path)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Deadly:
        def __reduce__(self) -> Any:
            if kind == "fails":
                raise OSError("no space left on device")
            die()

    new = {"state_dict": {"weight": torch.zeros(2**20)}, "last": 0 if kind == "dies before the exchange" else Deadly()}
    if kind == "fails":
        with pytest.raises(OSError, match="no space"):
            write_file(TorchCheckpointIO(), new, path)
        assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    else:
        child = os.fork()
        if child == 0:
            with mock.patch("os.replace", die):
                write_file(TorchCheckpointIO(), new, path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert torch.load(path)["state_dict"]["weight"].tolist() == [1, 1]
    # What was left there is in nobody's way.
    write_file(TorchCheckpointIO(), {"state_dict": {}}, path)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path) == {"state_dict": {}}


def test_when_the_pipeline_breaks_what_has_come_is_written_and_no_older_file_removed(tmp_path: Path) -> None:
    missing: Future[Tensor] = Future()
    come: Future[None] = Future()
    parcels = mock.Mock(is_alone=False, afterwards=lambda _: come)

    def abandon() -> None:
        come.set_result(None)
        missing.set_exception(RankLostError("rank 1 is gone", 1))

    parcels.abandon.side_effect = abandon
    saves = Saves(parcels, partial(write_file, TorchCheckpointIO()), in_background=False)
    states: dict[str, Any] = {"1": torch.ones(2), "2": torch.ones(2), "3": Promised.of(missing.result)}
    saves.save({"state_dict": {"weight": states["1"]}}, tmp_path / "1", None, at_once=True)
    for name in ("2", "3"):
        with saves.unhurried():
            saves.save({"state_dict": {"weight": states[name]}}, tmp_path / name, None, at_once=False)
        older = tmp_path / str(int(name) - 1)
        saves.then(older.unlink, older)
    assert saves.will_exist(tmp_path / "3")
    assert saves.will_exist(tmp_path / "1") is False
    assert saves.will_exist(tmp_path / "other") is None
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    with pytest.warns(UserWarning, match=r"no checkpoint at .*/3'\]: the pipeline broke .*rank 1 is gone"):
        saves.break_off()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_lightnings_words_for_paths_are_understood(tmp_path: Path) -> None:
    def on_rank(rank: int) -> list[tuple[int, float]]:
        begun: list[tuple[int, float]] = []

        def trainer(**options: Any) -> pl.Trainer:
            keep = ModelCheckpoint("kept", "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True)
            watch = LambdaCallback(
                on_train_start=lambda trainer, module: begun.append(
                    (trainer.global_step, float(next(iter(trainer.optimizers[0].state.values()))["step"]))
                )
            )
            callbacks = [watch, keep] if options["max_epochs"] > 1 else [keep]
            options |= {"strategy": ContinuousPipeStrategy(), "devices": 2, "default_root_dir": tmp_path}
            return quiet_trainer(callbacks=callbacks, enable_checkpointing=True, **options)

        def chain() -> pl.LightningModule:
            module = Chain()
            module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), 0.01)  # type: ignore[method-assign]
            return module

        one = trainer(max_epochs=1)
        one.fit(chain(), noise_loader())
        one.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
        one.validate(chain(), noise_loader(), ckpt_path="best", verbose=False)
        for path in ("last", "hpc", "kept/step=3.ckpt"):
            trainer(max_epochs=2, limit_train_batches=8, max_steps=9).fit(chain(), noise_loader(), ckpt_path=path)
        return begun

    assert run_ranks(on_rank, 2) == [[(6, 6), (8, 8), (3, 3)]] * 2
