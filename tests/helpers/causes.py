"""What a fit that fails says."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.errors import RankLostError
from tests.helpers.fits import quiet_trainer
from tests.helpers.modules import noise_loader


def cause(
    devices: int,
    module: pl.LightningModule,
    data: Any = None,
    val: Any = None,
    *,
    epochs: int = 1,
    where: str = "during set-up",
    entry: str = "fit",
    callbacks: Sequence[pl.Callback] = (),
    checkpoints: bool = False,
    detect_anomaly: bool = False,
    **strategy: Any,
) -> str:
    """The one sentence that a run on forked ranks ends with."""
    # torch tells at length how it ends the other ranks.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    chosen = ContinuousPipeStrategy(start_method="fork", **strategy)
    of_trainer: dict[str, Any] = {
        "max_epochs": epochs,
        "callbacks": list(callbacks),
        "enable_checkpointing": checkpoints,
        "detect_anomaly": detect_anomaly,
    }
    trainer = quiet_trainer(strategy=chosen, devices=devices, **of_trainer)
    # Lightning leaves the port there.
    with mock.patch.dict(os.environ), pytest.raises(RankLostError) as caught:
        getattr(trainer, entry)(module, data or noise_loader(), *([] if val is None else [val]))
    assert f"failed: {where}" in str(caught.value)
    return str(caught.value)
