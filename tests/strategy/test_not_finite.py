"""A loss that is not finite is told of with its mini-batch, once; where anomalies are detected it is an error."""

from __future__ import annotations

import pytest
from torch import Tensor

from lightning_cpipe.strategy.steps import not_finite
from tests.helpers.causes import cause
from tests.helpers.fits import fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

SAID = "the loss of mini-batch 11 (batch_idx 3 of epoch 1) is nan"


class Breaks(Chain):
    """Its loss is no number from mini-batch 11 on."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx >= 3 and self.current_epoch == 1 else loss


@pytest.mark.parametrize("devices", [2, pytest.param(1, marks=pytest.mark.full)])
def test_a_loss_that_is_no_number_names_its_mini_batch(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    # Each rank is a copy of this process.
    monkeypatch.setattr(not_finite, "rank_zero_warn", said.append)
    first, *others = fit_in_pipeline(2, Breaks, noise_loader, devices=devices, max_epochs=2, look=lambda *_: said)
    assert [text.partition(",")[0] for text in first.found] == [SAID]
    assert not any(other.found for other in others)


@pytest.mark.full
def test_it_is_an_error_where_anomalies_are_detected() -> None:
    said = cause(2, Breaks(), epochs=2, where="at mini-batch 11", detect_anomaly=True)
    assert f"{SAID}." in said


@pytest.mark.full
def test_it_is_one_in_a_rehearsal_too() -> None:
    with pytest.raises(RuntimeError) as caught:
        fit_in_pipeline(2, Breaks, noise_loader, devices=1, max_epochs=2, detect_anomaly=True)
    assert f"{SAID}." in str(caught.value)
