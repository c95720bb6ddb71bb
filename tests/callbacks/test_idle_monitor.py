"""`IdleMonitor` logs where each stage's time went, the delay it measured, and what theory predicts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest

from lightning_cpipe import ContinuousPipeStrategy, IdleMonitor
from lightning_cpipe.callbacks.idle_monitor import TABLE_ROWS, timeline_rows
from lightning_cpipe.engine.figures import StageFigures
from lightning_cpipe.engine.timeline import EVALUATION, FORWARD, KINDS, OTHER, WAIT_EVALUATION, WAIT_GRADIENT, Span
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.table import Table
from tests.helpers.fits import Notes, Seen, fit_alone, fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

BATCHES = 8
RATIOS = ("idle_ratio", "idle_ratio_steady", "idle_ratio_run")
TIMES = ("forward", "backward", "update", "wait_activation", "wait_gradient", "wait_decision", "data", "other")


class Figures(pl.Callback):
    """Keeps this rank's figures at the end of each step."""

    def __init__(self) -> None:
        self.figures: list[StageFigures] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if isinstance(trainer.strategy, ContinuousPipeStrategy):
            self.figures.append(trainer.strategy.stage_figures()[trainer.strategy.stage])


def look(trainer: pl.Trainer, _: pl.LightningModule) -> Any:
    monitor, figures = (next(c for c in trainer.callbacks if isinstance(c, kind)) for kind in (IdleMonitor, Figures))
    rows = [row for each in trainer.loggers if isinstance(each, Notes) for row in each.of("pipe/")]
    return rows, monitor.path, figures.figures


def fit(p: int, every: int | None = 1, **options: Any) -> list[Seen]:
    """Fit with a monitor; p = 0 is plain Lightning."""
    settings = {
        "module": Chain,
        "train": partial(noise_loader, samples=3 * BATCHES),
        "max_epochs": 1,
        "callbacks": lambda: [IdleMonitor(every, picture=False), Figures()],
        "logger": Notes(),
        "look": look,
        **options,
    }
    return fit_in_pipeline(p, **settings) if p else [fit_alone(**settings)]


@pytest.mark.parametrize("p", [1, pytest.param(2, marks=pytest.mark.full), 3])
def test_every_stage_is_told_of_at_every_step_on_rank_0(p: int) -> None:
    first, *others = fit(p, val=partial(noise_loader, samples=6), val_check_interval=3)
    rows, _, _ = first.found
    # Once more at the end, when the pipeline is drained.
    assert [step for step, _ in rows] == [*range(1, BATCHES + 1), BATCHES]
    of_stage = {f"{time}_ms" for time in TIMES} | {"delay_updates", "delay_promised_updates", *RATIOS}
    of_evaluation = {"pipe/evaluation_s", "pipe/evaluation_idle_slots", "pipe/evaluation_idle_slots_predicted"}
    of_pipe = {"pipe/idle_ratio_predicted", *(f"pipe/{ratio}" for ratio in RATIOS), *of_evaluation}
    for _, row in rows:
        assert row.keys() == {f"stage{stage}/{name}" for stage in range(p) for name in of_stage} | of_pipe
        for name, value in row.items():
            assert value >= 0, name
            assert "ratio" not in name or value <= 1, name
        for ratio in RATIOS:
            mean = sum(row[f"stage{stage}/{ratio}"] for stage in range(p)) / p
            assert row[f"pipe/{ratio}"] == pytest.approx(mean, abs=1e-6)
    assert rows[-1][1]["pipe/evaluation_s"] > 0
    assert rows[-1][1]["pipe/evaluation_idle_slots_predicted"] == 2 * (p - 1)
    assert (rows[-1][1]["pipe/evaluation_idle_slots"] > 0) == (p > 1)
    assert all(of_rank.found[0] == [] for of_rank in others)
    for of_rank in (first, *others):
        for figures in of_rank.found[2]:
            # No moment is counted twice: the kinds leave something for the loop itself.
            assert figures.seconds(OTHER) > 0
            assert sum(map(figures.seconds, (*KINDS, OTHER))) == pytest.approx(figures.elapsed_ns / 1e9)


@pytest.mark.parametrize(("p", "extra"), [(1, 0), pytest.param(2, 0, marks=pytest.mark.full), (4, 0), (3, 1)])
def test_the_delay_is_measured_and_it_is_the_promised_one(p: int, extra: int) -> None:
    rows = fit(p, strategy={"extra_in_flight": extra})[0].found[0]
    for stage in range(p):
        lag = (p - 1 - stage) * (1 + extra)
        measured = [int(row[f"stage{stage}/delay_updates"]) for _, row in rows]
        # The figures of a stage ride with a forward: of the last stage's row i, with what was known then.
        assert measured == sorted(measured)
        assert measured[-1] == lag
        assert {row[f"stage{stage}/delay_promised_updates"] for _, row in rows} == {lag}


@pytest.mark.parametrize("accumulate", [2, pytest.param(4, marks=pytest.mark.full)])
def test_with_accumulation_the_delay_keeps_below_the_promised_one(accumulate: int) -> None:
    rows = fit(3, accumulate_grad_batches=accumulate)[0].found[0]
    for stage in range(3):
        promised = {row[f"stage{stage}/delay_promised_updates"] for _, row in rows}
        assert promised == {-(-(2 - stage) // accumulate)}
        assert max(row[f"stage{stage}/delay_updates"] for _, row in rows) == promised.pop()


def test_a_run_logs_the_prediction_for_the_mini_batches_done() -> None:
    rows = fit(3)[0].found[0]
    on_the_way = [Continuous().idle_ratio(3, done, drained=False) for done in range(1, BATCHES + 1)]
    assert [row["pipe/idle_ratio_predicted"] for _, row in rows] == [
        *on_the_way, Table(Continuous(), 3, BATCHES).in_run.slot_exact
    ]  # fmt: skip


def figures_of(backwards: int, elapsed: int, idle: int, evaluation: int = 0, waited: int = 0) -> StageFigures:
    """Figures in milliseconds; a stage whose fill took 10, 6 of them idle, and which evaluated twice."""
    by_kind = {FORWARD: 10 * backwards, WAIT_GRADIENT: idle, EVALUATION: evaluation, WAIT_EVALUATION: waited}
    ns = tuple(1_000_000 * by_kind.get(kind, 0) for kind in KINDS)
    return StageFigures(elapsed * 1_000_000, ns, 10_000_000, 6_000_000, backwards, 1, most_delay=1, evaluations=2)


def logged(*moments: dict[int, StageFigures]) -> list[dict[str, float]]:
    """What the monitor makes of these figures of all stages."""
    notes, monitor = Notes(), IdleMonitor(every_n_steps=1)
    promised = {"promised_delay": lambda stage: 1 - stage, "promised_evaluation_idle_slots": 2}
    strategy = Mock(spec=ContinuousPipeStrategy, num_stages=2, num_replicas=1, schedule=Continuous(), **promised)
    trainer = Mock(strategy=strategy, loggers=[notes], is_global_zero=True, global_step=0)
    trainer.fit_loop.total_batch_idx = 0
    for moment in moments:
        strategy.stage_figures.return_value = moment
        monitor.on_train_batch_end(trainer, Mock(), {}, None, 0)
    return [row for _, row in notes.rows]


def test_the_numbers_are_of_the_time_since_the_last_ones_and_the_run_s_beside_them() -> None:
    first, second = logged(
        {0: figures_of(2, elapsed=50, idle=20), 1: figures_of(2, elapsed=50, idle=10)},
        {0: figures_of(6, elapsed=150, idle=40), 1: figures_of(6, elapsed=130, idle=10)},
    )
    assert first["stage0/forward_ms"] == pytest.approx(10)
    assert first["stage0/wait_gradient_ms"] == pytest.approx(10)
    assert first["stage0/other_ms"] == pytest.approx(5)
    assert first["stage0/idle_ratio"] == first["stage0/idle_ratio_run"] == pytest.approx(20 / 50)
    assert first["stage0/idle_ratio_steady"] == pytest.approx((20 - 6) / (50 - 10))
    assert second["stage0/forward_ms"] == pytest.approx(10)
    assert second["stage0/wait_gradient_ms"] == pytest.approx(20 / 4)
    assert second["stage0/other_ms"] == pytest.approx(40 / 4)
    assert second["stage0/idle_ratio"] == pytest.approx(20 / 100)
    assert second["stage0/idle_ratio_steady"] == pytest.approx((40 - 6) / (150 - 10))
    assert second["stage0/idle_ratio_run"] == pytest.approx(40 / 150)
    assert second["stage1/idle_ratio"] == 0
    assert second["pipe/idle_ratio"] == pytest.approx(0.1)
    assert second["stage0/delay_updates"] == 1
    assert second["stage1/delay_promised_updates"] == 0


def test_evaluations_are_in_no_ratio() -> None:
    waited = (0, 40)
    figures = {
        stage: figures_of(4, elapsed=1100, idle=20, evaluation=1000 - waited[stage], waited=waited[stage])
        for stage in range(2)
    }
    row = logged(figures)[0]
    assert row["pipe/evaluation_s"] == pytest.approx(1)
    # 20 ms for each of two, on one of two stages; a slot takes 5 ms.
    assert row["pipe/evaluation_idle_slots"] == pytest.approx(2)
    assert row["pipe/idle_ratio"] == row["pipe/idle_ratio_run"] == pytest.approx(20 / 100)
    assert row["pipe/idle_ratio_steady"] == pytest.approx((20 - 6) / (100 - 10))


@pytest.mark.parametrize(("every", "steps"), [(3, [3, 6, 8]), (None, [4, 8, 8])])
def test_it_logs_as_often_as_it_is_told_or_as_the_trainer_does(every: int | None, steps: list[int]) -> None:
    assert [step for step, _ in fit(2, every, log_every_n_steps=4)[0].found[0]] == steps


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"logger": False}, 0),
        ({"fast_dev_run": 2}, 0),
        ({"max_steps": 1}, 2),
        ({"logger": [Notes(), Notes()]}, 2 * (BATCHES + 1)),
    ],
    ids=["no logger", "fast_dev_run", "one step", "two loggers"],
)
@pytest.mark.parametrize("p", [0, 2])
def test_it_works_with_any_loggers_and_without(p: int, options: dict[str, Any], rows: int, tmp_path: Path) -> None:
    found, path, _ = fit(p, callbacks=lambda: [IdleMonitor(1), Figures()], **options)[0].found
    assert len(found) == (rows if p else 0)
    drawn = p > 0 and "fast_dev_run" not in options
    assert (path is not None) == drawn
    assert len(list(tmp_path.rglob("pipeline.png"))) == drawn


def fit_again(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, noise_loader(samples=3 * BATCHES))
    return look(trainer, module)


def test_a_second_fit_is_measured_anew() -> None:
    rows = fit(2, look=fit_again)[0].found[0]
    predicted = [row["pipe/idle_ratio_predicted"] for _, row in rows]
    assert len(predicted) == 2 * (BATCHES + 1)
    assert predicted[: BATCHES + 1] == predicted[BATCHES + 1 :]


def test_the_table_has_a_row_per_span_in_order_of_time() -> None:
    spans = {0: [Span("forward", 0, 5_000_000, 7_000_000)], 1: [Span("backward", 0, 6_000_000, 9_500_000)]}
    assert timeline_rows(spans) == [(0, "forward", 0, 0.0, 2.0), (1, "backward", 0, 1.0, 4.5)]
    assert timeline_rows({}) == []


def test_a_long_table_is_cut_in_the_middle() -> None:
    spans = {0: [Span("forward", i, i * 1_000_000, (i + 1) * 1_000_000) for i in range(2 * TABLE_ROWS)]}
    batches = [row[2] for row in timeline_rows(spans)]
    half = TABLE_ROWS // 2
    assert batches == [*range(half), *range(2 * TABLE_ROWS - half, 2 * TABLE_ROWS)]


def test_where_one_process_holds_all_stages_each_is_told_of_and_none_waits() -> None:
    rows = fit(4, devices=1)[0].found[0]
    for stage in range(4):
        assert rows[-1][1][f"stage{stage}/delay_updates"] == 3 - stage
        assert rows[-1][1][f"stage{stage}/forward_ms"] > 0
        assert rows[-1][1][f"stage{stage}/wait_activation_ms"] < rows[-1][1][f"stage{stage}/forward_ms"]
    assert {row["pipe/idle_ratio_predicted"] for _, row in rows} == {0}
