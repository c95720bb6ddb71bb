"""Stages of a device that are no neighbours give the numbers of a process each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.callbacks import IdleMonitor
from lightning_cpipe.schedules import Interleaved
from lightning_cpipe.schedules.exchange import write_csv
from tests.helpers.fits import Notes, Seen, fit_in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.modules import Chain, TiedThrice, noise_loader
from tests.strategy.test_rehearsal import Noisy, buffers_of, require_same


def fit(devices: int, schedule: str, most: int, module: Any = Noisy, stages: int = 4, **options: Any) -> list[Seen]:
    strategy = {"schedule": schedule, "num_microbatches": most, **options.pop("strategy", {})}
    options = {"max_epochs": 2, "look": buffers_of, **options}
    train = partial(noise_loader, options.pop("samples", 16), 8, shuffle=True)
    return fit_in_pipeline(stages, module, train, train, devices=devices, strategy=strategy, **options)


def actions(seen: Seen) -> list[tuple[str, int]]:
    return [each for each in seen.spans if each[0] in ("forward", "backward")]


@pytest.mark.parametrize(
    "most",
    [4, *(pytest.param(each, marks=pytest.mark.full) for each in (1, 3))],
)
def test_four_stages_on_two_devices_have_the_bits_of_a_process_each(most: int) -> None:
    """Evaluation, clipping, BatchNorm and random numbers included; rounds of different lengths."""
    on_four = fit(4, "1f1b", most, gradient_clip_val=0.01)
    on_two = fit(2, "interleaved", most, gradient_clip_val=0.01)
    require_same(on_four[0], on_two[0])
    assert on_two[1].metrics == on_two[0].metrics
    # Of the last stages: the plan of a stage's own actions is that of its rank.
    rows = [action for row in Interleaved().rows(3, 4, most) for action in row if action.kind.computes]
    letters = {"F": "forward", "B": "backward"}
    assert actions(on_two[0])[: 2 * most] == [(letters[action.kind.value], action.batch) for action in rows]


@pytest.mark.full
@pytest.mark.parametrize(("devices", "stages"), [(1, 4), (3, 6)])
def test_any_number_of_devices_gives_the_same_bits(devices: int, stages: int) -> None:
    module = partial(Noisy, stages)
    require_same(fit(1, "1f1b", 4, module, stages)[0], fit(devices, "interleaved", 4, module, stages)[0])


@pytest.mark.full
def test_ties_and_a_plan_in_a_file(tmp_path: Path) -> None:
    """A rank has copies of weights that another one owns, and owns others."""
    path = tmp_path / "plan.csv"
    path.write_text(write_csv(Interleaved().plan(4, 2)))
    cut = {"split_points": ["net.1", "net.2", "net.3"]}
    on_four = fit(4, "1f1b", 2, TiedThrice, strategy=cut, look=None)
    for schedule, most in (("interleaved", 2), (str(path), 1)):
        on_two = fit(2, schedule, most, TiedThrice, strategy=cut, look=None)
        assert on_four[0].losses == on_two[0].losses
        require_same_bits(on_four[0].weights, on_two[0].weights)


def test_a_device_holds_two_stages_unless_told_otherwise() -> None:
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(schedule="interleaved"), devices=2)
    assert isinstance(trainer.strategy, ContinuousPipeStrategy)
    assert trainer.strategy.num_stages == 4
    assert trainer.strategy.stages == (1, 3)


def look(trainer: Any, module: Any) -> Any:
    return trainer.global_step, trainer.logger.rows


@pytest.mark.full
def test_what_is_decided_and_what_stages_tell_reaches_all_ranks() -> None:
    """Stopped in the middle by what the last stage sees; the monitor knows of each stage."""
    seen = fit(
        3,
        "interleaved",
        3,
        partial(Chain, 6),
        6,
        look=look,
        logger=Notes(),
        max_epochs=8,
        log_every_n_steps=1,
        callbacks=lambda: [IdleMonitor(picture=False), EarlyStopping("val_loss", min_delta=1e9, patience=2)],
    )
    assert {each.found[0] for each in seen} == {3 * 2}
    told = {name for _, row in seen[0].found[1] for name in row if name.endswith("delay_updates")}
    assert told == {f"stage{stage}/delay_updates" for stage in range(6)}
