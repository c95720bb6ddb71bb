"""Measures what every stage does with its time, and logs it beside what theory predicts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_cpipe.callbacks.gantt import draw_gantt
from lightning_cpipe.callbacks.loggers import declare, folder_of, log_numbers, log_picture, log_table
from lightning_cpipe.engine.figures import StageFigures
from lightning_cpipe.engine.timeline import KINDS, OF_EVALUATION, OTHER, WAIT_REPLICAS, Span
from lightning_cpipe.strategy.strategy import ContinuousPipeStrategy

_SHOWN = (*(kind for kind in KINDS if kind not in (*OF_EVALUATION, WAIT_REPLICAS)), OTHER)

TABLE_ROWS = 2000
"""The longest timeline that goes into a logger's table."""


class IdleMonitor(pl.Callback):
    """Logs, for each stage and for the pipeline, where the time went.

    Idle is waiting for a neighbour. What is logged, in milliseconds per mini-batch (in a flush schedule per
    micro-batch) since the last time, for stage s:
    ``stage{s}/forward_ms``, ``backward_ms``, ``update_ms``, ``wait_activation_ms``, ``wait_gradient_ms``,
    ``wait_decision_ms``, ``data_ms`` and ``other_ms``; as shares, ``stage{s}/idle_ratio`` (since the last time),
    ``idle_ratio_steady`` (without the fill) and ``idle_ratio_run``; in updates, ``stage{s}/delay_updates`` (measured)
    and ``delay_promised_updates``. The mean over the stages is ``pipe/idle_ratio`` and so on, beside
    ``pipe/idle_ratio_predicted``, which counts slots of the plan. Where a rank holds several stages, ``data``,
    ``update`` and ``wait_decision`` stand with its last one, and ``other`` of each includes the time of the others. Of
    pipelines side by side, the figures are those of the first, and ``wait_replicas_ms`` is the time that its stages
    wait for the gradients of the others, which is not idle.

    What evaluations took is in none of the above: ``pipe/evaluation_s``, with the waiting that they caused, and
    ``pipe/evaluation_idle_slots``, which is that waiting alone, for one evaluation and as a mean over the stages, in
    slots: the time of a forward or backward on the slowest stage. Beside it stands
    ``pipe/evaluation_idle_slots_predicted``, 2 (p - 1) for p processes, where the schedule is the continuous one.

    The stages' figures ride beside the activations to rank 0; nobody waits for them. At the end of `fit` the run's
    timeline goes into a table and a picture.

    Args:
        every_n_steps: how often to log; None for the trainer's own ``log_every_n_steps``.
        picture: whether to draw the timeline at the end.
    """

    def __init__(self, every_n_steps: int | None = None, picture: bool = True) -> None:
        self._every_n_steps = every_n_steps
        self._picture = picture
        self._last: dict[int, StageFigures] = {}
        self.path: str | None = None
        """Of the picture, once it is drawn."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, ContinuousPipeStrategy):
            rank_zero_info("IdleMonitor: without strategy='continuous_pipe' there are no stages to watch.")
            return
        self._last = {}
        if every := self._every_n_steps or trainer.log_every_n_steps:  # type: ignore[attr-defined]
            strategy.tell_figures(every)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if strategy.root_device.type == "cpu" and cores < strategy.num_processes:
            rank_zero_info(
                f"IdleMonitor: {strategy.num_processes} processes share {cores} cores, so idle includes waiting for"
                " one."
            )
        if trainer.is_global_zero:
            blank = {stage: StageFigures() for stage in range(strategy.num_stages)}
            declare(trainer, self._numbers(strategy, blank))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if not trainer.is_global_zero or not isinstance(strategy, ContinuousPipeStrategy):
            return
        every = self._every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.fit_loop.total_batch_idx + 1) % every == 0:
            figures = strategy.stage_figures()
            log_numbers(trainer, self._numbers(strategy, figures))
            self._last = figures

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, ContinuousPipeStrategy):
            return
        timelines = strategy.collect_timelines()
        if not trainer.is_global_zero:
            return
        figures = {stage: of_stage for stage, (_, of_stage) in sorted(timelines.items())}
        spans = {stage: of_stage for stage, (of_stage, _) in sorted(timelines.items())}
        self._last = {}
        numbers = self._numbers(strategy, figures, drained=True)
        log_numbers(trainer, numbers)
        log_table(trainer, "pipe/timeline", ("stage", "kind", "mini_batch", "start_ms", "end_ms"), timeline_rows(spans))
        drawn = self._picture and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if drawn and all(each.backwards for each in figures.values()):
            path = folder_of(trainer) / "pipeline.png"
            draw_gantt(spans, path, self._title(strategy, numbers))
            log_picture(trainer, "pipe/gantt", path)
            self.path = str(path)

    def _numbers(
        self, strategy: ContinuousPipeStrategy, figures: Mapping[int, StageFigures], *, drained: bool = False
    ) -> dict[str, float]:
        numbers: dict[str, float] = {}
        # Over the stages that are told of here; the other ranks do not take part.
        names = ("idle_ratio", "idle_ratio_steady", "idle_ratio_run")
        means = {name: MeanMetric(sync_on_compute=False) for name in names}
        for stage, now in figures.items():
            lately = now.since(self._last.get(stage, StageFigures()))
            for kind in _SHOWN if strategy.num_replicas == 1 else (*_SHOWN, WAIT_REPLICAS):
                numbers[f"stage{stage}/{kind}_ms"] = 1e3 * lately.seconds(kind) / max(1, lately.backwards)
            for name, ratio in zip(means, (lately.idle_ratio, now.steady_idle_ratio, now.idle_ratio)):
                numbers[f"stage{stage}/{name}"] = ratio
                means[name].update(ratio)
            numbers[f"stage{stage}/delay_updates"] = now.delay
            numbers[f"stage{stage}/delay_promised_updates"] = strategy.promised_delay(stage)
        # The stages of one rank wait in its one time.
        per_rank = strategy.schedule.stages_per_rank
        numbers |= {f"pipe/{name}": per_rank * float(mean.compute()) for name, mean in means.items()}
        done = figures[max(figures)].backwards
        numbers["pipe/idle_ratio_predicted"] = strategy.promised_idle_ratio(done, drained=drained)
        numbers["pipe/evaluation_s"] = max(sum(map(each.seconds, OF_EVALUATION)) for each in figures.values())
        slot_s = max(each.slot_s for each in figures.values())
        waited_s = sum(each.waited_per_evaluation_s for each in figures.values()) / len(figures)
        numbers["pipe/evaluation_idle_slots"] = waited_s / slot_s if slot_s else 0.0
        if (promised := strategy.promised_evaluation_idle_slots) is not None:
            numbers["pipe/evaluation_idle_slots_predicted"] = promised
        return numbers

    def _title(self, strategy: ContinuousPipeStrategy, numbers: Mapping[str, float]) -> str:
        return (
            f"{strategy.num_stages} stages, measured: idle {numbers['pipe/idle_ratio_run']:.1%} of the run,"
            f" {numbers['pipe/idle_ratio_steady']:.1%} without the fill;"
            f" predicted by slots: {numbers['pipe/idle_ratio_predicted']:.1%}"
        )


def timeline_rows(spans: Mapping[int, list[Span]]) -> list[tuple[int, str, int, float, float]]:
    """The spans of all stages as a table, in milliseconds from the first; the middle is left out if there are many."""
    zero = min((span.start_ns for each in spans.values() for span in each), default=0)
    rows = [
        (stage, span.kind, span.batch, (span.start_ns - zero) / 1e6, (span.end_ns - zero) / 1e6)
        for stage, each in spans.items()
        for span in each
    ]
    rows.sort(key=lambda row: row[3])
    if len(rows) > TABLE_ROWS:
        rows = rows[: TABLE_ROWS // 2] + rows[-TABLE_ROWS // 2 :]
    return rows
