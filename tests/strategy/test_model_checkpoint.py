"""`ModelCheckpoint` keeps the files that plain Lightning would keep, and all ranks agree on which is the best."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.helpers.fits import alone, in_pipeline, quiet_trainer
from tests.helpers.modules import Chain, noise_loader

KEEPS: dict[str, dict[str, Any]] = {
    "the last epoch": {},
    "the best two": {"monitor": "val_loss", "save_top_k": 2},
    "the worst": {"monitor": "val_loss", "mode": "max"},
    "the best by training loss": {"monitor": "loss_epoch", "save_top_k": 1, "save_on_train_epoch_end": True},
    "every 3 steps": {"every_n_train_steps": 3, "save_top_k": -1},
    "every 3 steps and the last": {"every_n_train_steps": 3, "save_top_k": -1, "save_last": True},
    "the best steps": {"every_n_train_steps": 2, "monitor": "wave", "save_top_k": 3},
    "every second epoch": {"every_n_epochs": 2, "save_top_k": -1, "save_last": "link"},
    "weights only": {"save_weights_only": True, "monitor": "val_loss"},
    "a name that comes again": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{epoch}", "save_last": "link"},
}


REPEATS = {"the best two", "the worst", "every 3 steps"}
"""What they keep is kept in another way, too."""


class Wave(Chain):
    """Logs what goes up and down at each step, whatever is learned."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.log("wave", math.sin(2.5 * self.global_step))
        return super().training_step(batch, batch_idx)


def fit(name: str, folder: str, **options: Any) -> dict[str, Any]:
    keep = ModelCheckpoint(folder, **{"filename": "{epoch}-{step}", **KEEPS[name]})
    trainer = quiet_trainer(callbacks=[keep], enable_checkpointing=True, max_epochs=3, **options)
    trainer.fit(Wave(), noise_loader(), noise_loader(seed=6))
    return {
        "best": Path(keep.best_model_path).name,
        "last": Path(keep.last_model_path).name,
        "kept": sorted(Path(path).name for path in keep.best_k_models),
        "score": None if keep.best_model_score is None else float(keep.best_model_score),
        "scores": sorted(map(float, keep.best_k_models.values())) if keep.monitor else [],
    }


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in REPEATS else ()) for name in KEEPS]
)
def test_the_files_are_plain_lightnings(name: str, tmp_path: Path) -> None:
    plain = alone(partial(fit, name, "plain"))
    assert files(tmp_path / "plain")
    first, *others = in_pipeline(2, partial(fit, name, "ours"))
    assert all(of_rank == first for of_rank in others)
    # The losses fall everywhere, so that the best are the same with delay.
    assert files(tmp_path / "ours") == files(tmp_path / "plain")
    for key in ("best", "last", "kept"):
        assert first[key] == plain[key]
    for path in (tmp_path / "ours").iterdir():
        found = torch.load(path)
        assert found["state_dict"].keys() == Chain().state_dict().keys()
        assert all(torch.isfinite(weight).all() for weight in found["state_dict"].values())


def test_one_stage_has_the_scores_of_plain_lightning() -> None:
    one = in_pipeline(1, partial(fit, "the best two", "one"))
    assert one == [alone(partial(fit, "the best two", "plain"))]
    assert len(one[0]["scores"]) == 2


def best_score_and_file(**options: Any) -> tuple[float, str]:
    keep = ModelCheckpoint("best", monitor="val_loss")
    trainer = quiet_trainer(callbacks=[keep], enable_checkpointing=True, max_epochs=2, val_check_interval=3, **options)
    trainer.fit(Chain(), noise_loader(), noise_loader(seed=6))
    return float(keep.best_model_score), keep.best_model_path


def test_the_best_file_holds_the_weights_that_were_validated() -> None:
    score, path = in_pipeline(3, best_score_and_file)[0]
    module = Chain()
    module.load_state_dict(torch.load(path)["state_dict"])
    trainer = quiet_trainer()
    found = trainer.validate(module, noise_loader(seed=6), verbose=False)
    assert found[0]["val_loss"] == score
