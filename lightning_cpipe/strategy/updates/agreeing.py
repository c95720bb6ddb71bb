"""What stages tell each other of their gradients before they update: norms to clip by, and the scale of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import nn

from lightning_cpipe.engine.partial_sums import links_of
from lightning_cpipe.engine.ties import link_of
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.transfers import POSTED_AHEAD
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.strategy.checkpoints.whole import Whole
from lightning_cpipe.strategy.options import Clip
from lightning_cpipe.strategy.ranks.processes import Processes
from lightning_cpipe.strategy.steps.stage_run import StageRun
from lightning_cpipe.strategy.updates.by_stage import ByStage
from lightning_cpipe.strategy.updates.clipping import NORMS, SQUARES, Exact, InTime, Norms, OfOneStage
from lightning_cpipe.strategy.updates.loss_scale import SCALES, AtFlush, LastStages, LossScale, scale_and_overflows
from lightning_cpipe.transport.wiring import Link
from lightning_cpipe.tree import TensorSpec


def sums_of(schedule: Schedule, cut: Cut, precision: Precision) -> dict[str, TensorSpec]:
    """What stages of a continuous pipeline tell their neighbours in updates, by purpose; a flush has time to ask."""
    if not schedule.streams or cut.num_stages == 1:
        return {}
    scales = {} if _scaler_of(precision) is None else {SCALES: scale_and_overflows(cut.num_stages)}
    return {NORMS: SQUARES} | scales


def links_beside(schedule: Schedule, cut: Cut, sums: Mapping[str, TensorSpec]) -> dict[Link, int]:
    """The links beside the lanes, each with how many messages may be on their way: of ties, and of such sums."""
    # A copy takes the owner's weights as many of its rows later as the owner adds its gradients.
    links = {link_of(tie): schedule.rows_late(tie.user, tie.owner) + POSTED_AHEAD for tie in cut.ties}
    for purpose in sums:
        links |= links_of(purpose, cut.num_stages, schedule)
    return links


def agree_in_updates(
    module: nn.Module,
    whole: Whole | None,
    run: StageRun,
    processes: Processes,
    schedule: Schedule,
    precision: Precision,
    clip: Clip,
    device: torch.device,
) -> tuple[Norms, list[Callable[[], None]]]:
    """Let Lightning clip, and scale losses, by what all stages know.

    Args:
        module: with all its parameters.
        whole: this rank's share in it; None where there is one stage, and Lightning does all.
        run: this rank's stages, which are about to train.
        processes: this rank among the others.
        schedule: who does what, when.
        precision: Lightning's, which clips, and scales losses.
        clip: by which norm a continuous pipeline clips.
        device: where the stages compute.

    Returns:
        What this rank knows of norms, and functions that undo it.
    """
    if whole is None:
        return OfOneStage(), []
    scaler = _scaler_of(precision)
    scales: LossScale | None = None
    norms: Norms
    if schedule.streams:
        by_stage = ByStage(module, run.cut, run.stages)
        norms = InTime(clip, by_stage, run.training, device)
        if scaler is not None:
            scales = LastStages(scaler, device, by_stage, run.training, run.cut.num_stages)
    else:
        norms = Exact(whole, processes)
        if scaler is not None:
            scales = AtFlush(scaler, device, processes.control)
    return norms, [norms.take_over(precision), *([] if scales is None else scales.take_over())]


def _scaler_of(precision: Precision) -> Any:
    """That of ``16-mixed``; None with others."""
    return getattr(precision, "scaler", None)
