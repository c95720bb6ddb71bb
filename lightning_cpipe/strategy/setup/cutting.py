"""Cuts the LightningModule of a run: rank 0 probes it, every rank keeps its part.

A module that was too big for one rank is in parts already, each on the rank where a run before has left it; or it has
no weights yet (see `blueprint`). Rank 0 probes it with weights that are lent.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_cpipe.balance.memory import MemoryNeeds, bytes_of, state_multiple
from lightning_cpipe.engine.mini_batch import SAME_DATA
from lightning_cpipe.errors import CutError, DataMismatchError, LostNumbersError, RankLostError
from lightning_cpipe.probe.lent import lent_weights
from lightning_cpipe.probe.probe import Check, compares_gradients
from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.placement import stages_of
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.pages import let_tensors_into_the_heap
from lightning_cpipe.stage.weights import make_room, needed_by, replace, standing_in
from lightning_cpipe.strategy.loops import (
    PipelineEvaluationLoop,
    PipelinePredictionLoop,
    evaluation_of,
    fetcher_of,
    validation_of,
)
from lightning_cpipe.strategy.options import Options
from lightning_cpipe.strategy.ranks.ending import in_words
from lightning_cpipe.strategy.ranks.processes import Processes
from lightning_cpipe.strategy.ranks.same_numbers import share_numbers
from lightning_cpipe.strategy.setup.as_if_begun import tried
from lightning_cpipe.strategy.setup.blueprint import Blueprint
from lightning_cpipe.strategy.setup.probing import evaluation_probe_step, find_cut, training_probe_step
from lightning_cpipe.strategy.setup.whole_loss import warn_of_other_loss
from lightning_cpipe.transport.control import Control
from lightning_cpipe.tree import flatten


def agree_on_blueprint(
    module: pl.LightningModule,
    blueprint: Blueprint,
    failed: Exception | None,
    control: Control,
    check: Check,
    kept_out: bool,
) -> Blueprint | None:
    """Let all ranks know whether the module goes on without weights until it is cut; if not, build it as a whole.

    Args:
        module: for which `configure_model` ran.
        blueprint: of what that built.
        failed: what it raised, if anything.
        control: of all ranks.
        check: what the user wants to be compared.
        kept_out: whether tensors are kept out of the heap, which a module that is built as a whole shall use again.

    Returns:
        The blueprint; None if the module is whole.

    Raises:
        CutError: if another module was built on another rank.
        Exception: what `configure_model` raises, if it can't be built as a whole, either.
    """
    failures = [each for each in control.compare(None if failed is None else in_words(failed)) if each]
    if not failures and len(set(control.compare(blueprint.fingerprint))) > 1:
        raise CutError(
            "`configure_model` built another module, or drew other random numbers, on another rank. Let it follow"
            " from the module's attributes alone, not from the rank, and draw from the global generators only."
        )
    if blueprint.hollow and not failures and not compares_gradients(module, check):
        return blueprint
    if kept_out:
        let_tensors_into_the_heap()
    if not blueprint.hollow and not failures:
        # Nothing was built.
        return None
    # What is certain is said before, since the memory may not suffice. Any other error may be the user's own.
    if sure := isinstance(failed, LostNumbersError):
        _warn_of_a_whole(module, failures[0])
    try:
        blueprint.build_whole()
    except Exception as error:
        # The same without a thought of parts: it is told once.
        error.__suppress_context__ |= failed is not None and in_words(error) == in_words(failed)
        raise
    if failures and not sure:
        _warn_of_a_whole(module, failures[0])
    return None


def _warn_of_a_whole(module: pl.LightningModule, why: str) -> None:
    rank_zero_warn(
        f"{type(module).__name__} is built as a whole on each rank, since `configure_model` can't be run without the"
        f" memory of all weights: {why}"
    )


def agree_on_cut(
    trainer: pl.Trainer,
    processes: Processes,
    asked: Options,
    schedule: Schedule,
    device: torch.device,
    seed: int,
    blueprint: Blueprint | None = None,
) -> tuple[Cut, bool]:
    """Let all ranks know how the module is cut, and hold the numbers that they need.

    Args:
        trainer: has the module and the loaders.
        processes: the ranks.
        asked: what the user asks for.
        schedule: who does what, when.
        device: where this rank computes.
        seed: what random numbers follow from.
        blueprint: builds the module, if it has no weights yet.

    Returns:
        The cut, and whether the module is in parts now. If not, it is still whole, with rank 0's numbers.

    Raises:
        CutError: if the module can't be cut; on rank 0.
        DataMismatchError: if the ranks' loaders differ in the first batch.
    """
    module, control = trainer.lightning_module, processes.control
    holders = control.compare(_held(module, blueprint))
    lacking = {name for name, _ in module.named_parameters()} - holders[0]
    in_parts = control.share(bool(lacking))
    if not in_parts:
        make_room(module)
    everyones = set.intersection(*holders) if in_parts else {name for name, _ in module.named_parameters()}
    share_numbers(control, module, but={name for name, _ in module.named_parameters()} - everyones)
    first = processes.rank == 0
    with standing_in(module, lent_weights(module, lacking, device)) if first else nullcontext():
        if first:
            # The others move what they keep, once they know it.
            module.to(device)
        if in_parts:
            # Where weights are lent there is nothing to compare gradients with.
            if asked.check == "full":
                _warn_of_fewer_checks(module)
            asked = dataclasses.replace(asked, check="fills")
        cut = _find(trainer, processes, asked, schedule, device, seed)
    if blueprint is not None:
        # Where nothing will run, the module is whole.
        blueprint.build(needed_by(cut, *processes.stages) if cut.steps else blueprint.hollow)
    elif in_parts:
        _bring_home(module, cut, processes, holders)
    return cut, in_parts


def _warn_of_fewer_checks(module: pl.LightningModule) -> None:
    kind = type(module).__name__
    rank_zero_warn(
        f"check='full': the gradients of {kind} are not compared with the uncut module's, and the cut is checked as by"
        " check='fills'. An earlier run left the module in parts, and gradients of the whole need all weights on one"
        f" rank. To compare them, let the first run of a new {kind} have check='full'."
    )


def _held(module: pl.LightningModule, blueprint: Blueprint | None) -> set[str]:
    """The parameters whose numbers are here."""
    hollow = set() if blueprint is None else blueprint.hollow
    present = {name for name, each in module.named_parameters() if not isinstance(each, AbsentParameter)}
    return present - hollow


def _find(
    trainer: pl.Trainer, processes: Processes, asked: Options, schedule: Schedule, device: torch.device, seed: int
) -> Cut:
    module = trainer.lightning_module
    steps = probe_steps(trainer, processes, device, seed, asked.num_microbatches)
    if not steps:
        # Nothing will run, and the module stays whole.
        return Cut(starts=(), steps={})
    needs: MemoryNeeds | None = None
    if asked.memory_limit is not None and trainer.state.fn == TrainerFn.FITTING:
        limit = bytes_of(asked.memory_limit)
        needs = memory_needs(trainer, schedule, processes.num_stages, limit, asked.num_microbatches)
    found: Cut | None = None
    error: CutError | None = None
    num_stages, at, check = processes.num_stages, asked.split_points, asked.check
    unread = processes.stages_between if asked.load_on == "ends" else ()

    def look() -> Cut:
        cut = find_cut(module, steps, num_stages, at, device, check, needs, unread)
        if asked.num_microbatches > 1 and steps[0].trains and (drawn := fetcher_of(trainer).peek()) is not None:
            warn_of_other_loss(module, drawn, device, seed, asked.num_microbatches)
        return cut

    if processes.rank == 0:
        try:
            found = tried(module, steps, look)
        except CutError as raised:
            error = raised
    cut = processes.control.share(found)
    if error is not None:
        raise error
    if cut is None:
        raise RankLostError("rank 0 could not cut the module", 0)
    return cut


def _bring_home(module: pl.LightningModule, cut: Cut, processes: Processes, holders: Sequence[set[str]]) -> None:
    """Send each weight to the ranks that need it now and have not had it, one after the other."""
    needed = [needed_by(cut, *stages_of(rank, processes.held)) for rank in range(processes.num_ranks)]
    for name, parameter in list(module.named_parameters()):
        needy = [rank for rank, names in enumerate(needed) if name in names - holders[rank]]
        if not needy:
            continue
        source = next(rank for rank, held in enumerate(holders) if name in held)
        mine = processes.rank == source
        numbers = parameter.detach().cpu() if mine else torch.empty(parameter.shape, dtype=parameter.dtype)
        processes.control.share_tensors([numbers], source)
        if processes.rank in needy:
            replace(module, parameter, nn.Parameter(numbers, parameter.requires_grad))


def memory_needs(
    trainer: pl.Trainer, schedule: Schedule, num_stages: int, limit: int | None, num_microbatches: int = 1
) -> MemoryNeeds:
    """What decides how much memory the stages of this run need, once its loaders are there.

    The user's `configure_optimizers` is called for a look at the class of what it makes, and nothing of it is kept.
    """
    module = trainer.lightning_module
    with untouched(module):
        made = flatten(module.configure_optimizers())[0]
    multiples = [state_multiple(each) for each in made if isinstance(each, Optimizer)]
    accumulate, length = trainer.accumulate_grad_batches, trainer.num_training_batches
    # An epoch that accumulation does not divide ends with an update of its own.
    divides = length == math.inf or int(length) % accumulate == 0
    schedule = accumulating(schedule, accumulate, None if divides else int(length))
    num_batches = sys.maxsize if schedule.streams else num_microbatches
    return MemoryNeeds(schedule, num_stages, max(multiples, default=0.0), limit, num_batches)


def accumulating(schedule: Schedule, accumulate: int, epoch_length: int | None = None) -> Schedule:
    """A schedule that knows how many mini-batches make an update, if it is of mini-batches."""
    if not isinstance(schedule, Continuous):
        return schedule
    return dataclasses.replace(schedule, accumulate=accumulate, epoch_length=epoch_length)


def probe_steps(
    trainer: pl.Trainer, processes: Processes, device: torch.device, seed: int, num_microbatches: int = 1
) -> list[Step]:
    """The steps that this run will take, each on its first batch; in training on the first micro-batch of it.

    Every rank draws the batches, so that their loaders go the same way; only rank 0 runs the steps.
    """
    module = trainer.lightning_module
    if trainer.state.fn == TrainerFn.FITTING:
        trainer.fit_loop.setup_data()
        first = fetcher_of(trainer).peek()
        _require_same_first_batch(processes, None if first is None else first.fingerprint)
        _require_same_length(processes, "training loaders", trainer.num_training_batches, of_all=True)
        if first is None:
            raise MisconfigurationException("There is no training batch to look at: the training loader is empty.")
        steps = [training_probe_step(module, first, device, seed, num_microbatches)]
        if trainer.enable_validation:
            steps += _evaluation_probe_step(processes, module, validation_of(trainer), "validation_step", device, seed)
        return steps
    name, loop = evaluation_of(trainer)
    return _evaluation_probe_step(processes, module, loop, name, device, seed)


def _evaluation_probe_step(
    processes: Processes,
    module: pl.LightningModule,
    loop: PipelineEvaluationLoop | PipelinePredictionLoop,
    name: str,
    device: torch.device,
    seed: int,
) -> list[Step]:
    steps = evaluation_probe_step(module, loop, name, device, seed)
    _require_same_length(processes, f"loaders of {name}", loop.max_batches)
    return steps


def _require_same_first_batch(processes: Processes, fingerprint: int | None) -> None:
    everyones = processes.control.compare(fingerprint)
    for replica in range(processes.num_replicas):
        found, first = processes.of_pipeline(everyones, replica), replica * len(processes.held)
        others = [rank for rank, theirs in enumerate(found, first) if theirs not in (found[0], None)]
        if others:
            raise DataMismatchError(
                f"the training loaders differ: rank {first} and rank {others[0]} drew different first batches."
                f" {SAME_DATA}"
            )


def _require_same_length(processes: Processes, loaders: str, batches: Any, *, of_all: bool = False) -> None:
    """Where one rank comes to the end before another, that would wait for ever.

    Args:
        processes: the ranks.
        loaders: in words.
        batches: how many there are here.
        of_all: whether pipelines side by side wait for each other, too.
    """
    everyones = processes.control.compare(batches)
    first = 0 if of_all else processes.replica * len(processes.held)
    found = everyones if of_all else processes.of_pipeline(everyones, processes.replica)
    others = [rank for rank, theirs in enumerate(found, first) if theirs != found[0]]
    if others:
        raise DataMismatchError(
            f"the {loaders} differ: rank {first} has {found[0]} batches, and rank {others[0]} has"
            f" {everyones[others[0]]}. {SAME_DATA}"
        )
