"""What can't work in a pipeline, or not yet: refused at set-up, all reasons at once, each with a way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_cpipe.balance.memory import bytes_of
from lightning_cpipe.errors import PlanError
from lightning_cpipe.probe.probe import Check
from lightning_cpipe.schedules import Given, GPipe, Interleaved, OneFOneB, ZeroBubble
from lightning_cpipe.schedules.as_one_step import not_one_step
from lightning_cpipe.schedules.check import Fault, check
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.policies import POLICIES, STASH
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.strategy.lightning_private import AVERAGING, callbacks_of
from lightning_cpipe.strategy.options import Clip, LoadOn, Options
from lightning_cpipe.strategy.setup.scheduling import in_words, schedule_of
from lightning_cpipe.strategy.step_names import STEPS
from lightning_cpipe.tree import flatten

LATER = "A later version will support it."

_WATCHED_BY_WANDB = "_wandb_hook_names"
"""What W&B writes on a module that it watches."""

_TESTED = (Continuous, GPipe, OneFOneB, Interleaved, ZeroBubble)
"""Schedules whose plans the tests check, so that no run needs to: with many micro-batches that takes seconds."""

_TOLD_FAULTS = 5
"""So many of a plan's faults are told; one mistake makes many."""


def refuse(reasons: Iterable[str]) -> None:
    """Raise all reasons together.

    Raises:
        MisconfigurationException: if there is any.
    """
    found = list(reasons)
    if found:
        raise MisconfigurationException(
            "strategy='continuous_pipe' can't run this:\n" + "\n".join(f"  - {reason}" for reason in found)
        )


def refuse_broadcast(*_: object, **__: object) -> NoReturn:
    """Stands for `broadcast` inside a step.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "`broadcast` inside a step: the stages run the step of a mini-batch one after the other, so rank 0 would speak"
        " only when the others are past it. Broadcast in a hook, such as `on_train_batch_start`."
    )


def reasons_in_saving(asked: Options, trainer: pl.Trainer) -> Iterator[str]:
    """What a checkpoint in parts can't hold."""
    averaging = [type(each).__name__ for each in callbacks_of(trainer) if isinstance(each, AVERAGING)]
    if asked.save_distributed_checkpoint and averaging:
        yield (
            f"save_distributed_checkpoint=True with {averaging[0]}: it saves the average as a whole. Leave one of them"
            f" out. {LATER}"
        )


def reasons_in_options(asked: Options, num_ranks: int, device: torch.device) -> Iterator[str]:
    """What the strategy's own arguments show."""
    schedule: Schedule | None = None
    written = in_words(asked)
    try:
        schedule = schedule_of(asked)
    except PlanError as error:
        yield f"{written}: {error}"
    flushes = schedule is not None and not isinstance(schedule, Continuous)
    if isinstance(asked.num_stages, int) and asked.num_stages < 1:
        yield f"num_stages={asked.num_stages}: the least is 1."
    elif asked.num_stages != "auto" and asked.num_stages % num_ranks and not isinstance(schedule, Given):
        yield (
            f"num_stages={asked.num_stages} on {num_ranks} devices: each device holds as many stages as the others. Set"
            f" `num_stages` to a multiple of {num_ranks}, or `devices` to {asked.num_stages} or a divisor of it; with"
            " `devices=1` one process runs all stages."
        )
    if not _is_whole(asked.num_microbatches):
        yield f"num_microbatches={asked.num_microbatches!r}: it must be a whole number, of 1 or more."
    elif asked.num_microbatches < 1:
        yield f"num_microbatches={asked.num_microbatches}: the least is 1."
    elif asked.num_microbatches != 1 and not flushes:
        yield (
            f"num_microbatches={asked.num_microbatches}: the continuous schedule streams whole mini-batches. Leave it"
            " out, or set schedule='1f1b', 'gpipe', 'interleaved' or 'zb', which slice them."
        )
    if asked.versions not in POLICIES:
        yield f"versions={asked.versions!r}: there is none of that name; there are {', '.join(map(repr, POLICIES))}."
    elif flushes and asked.versions != STASH.name:
        yield (
            f"versions={asked.versions!r}: with {written} all micro-batches of an update use the same"
            " weights, and there is but one version. Leave it out."
        )
    if asked.exact_resume and asked.versions in POLICIES and not POLICIES[asked.versions].keeps:
        yield (
            f"exact_resume=True with versions={asked.versions!r}: the weights that a mini-batch in flight was forwarded"
            " with are not kept, so it can't be forwarded again. Set versions='stash', or leave `exact_resume` out."
        )
    if flushes and asked.extra_in_flight > 0:
        yield (
            f"extra_in_flight={asked.extra_in_flight}: with {written} nothing of the next mini-batch"
            " is forwarded before the update. Leave it out, or take the continuous schedule."
        )
    if asked.remedy is not None:
        yield f"remedy={asked.remedy!r}: none for now. {LATER}"
    if asked.extra_in_flight < 0:
        yield f"extra_in_flight={asked.extra_in_flight}: the least is 0."
    if flushes and asked.early_input_gradient:
        yield (
            f"early_input_gradient=True: {written} says itself whether backwards are split. Leave it"
            " out, or take schedule='zb'."
        )
    if asked.clip not in get_args(Clip):
        yield f"clip={asked.clip!r}: there is none of that name; there are {', '.join(map(repr, get_args(Clip)))}."
    elif flushes and asked.clip != Options.clip:
        yield f"clip={asked.clip!r}: with {written} the norm of all stages is known before any updates. Leave it out."
    if isinstance(asked.split_points, str) and asked.split_points != "auto":
        yield f"split_points={asked.split_points!r}: give 'auto', or a list of the modules that begin stages 1, 2, …"
    if asked.memory_limit is not None:
        try:
            bytes_of(asked.memory_limit)
        except ValueError as error:
            yield f"memory_limit={error}."
    if asked.check not in get_args(Check):
        yield f"check={asked.check!r}: there is none of that name; there are {', '.join(map(repr, get_args(Check)))}."
    if device.type == "cuda" and asked.process_group_backend not in (None, "nccl"):
        yield (
            f"process_group_backend={asked.process_group_backend!r}: tensors of GPUs travel by NCCL, which does not"
            " hold up the process until they have left. Leave it out."
        )
    if asked.load_on not in get_args(LoadOn):
        yield f"load_on={asked.load_on!r}: there is none of that name; there are 'all' and 'ends'."
    elif asked.load_on == "ends" and flushes:
        yield (
            f"load_on='ends': with {written} each rank slices its own batches. Leave it out, or take the continuous"
            " schedule."
        )
    if asked.timeout <= 0:
        yield f"timeout={asked.timeout:g}: it is in seconds, and must be more than 0."


def reasons_in_replicas(asked: Options, num_processes: int, module: pl.LightningModule) -> Iterator[str]:
    """Why there can't be so many pipelines side by side."""
    size = asked.data_parallel_size
    if size < 1:
        yield f"data_parallel_size={size}: the least is 1."
    elif num_processes % size:
        yield (
            f"data_parallel_size={size} with {num_processes} devices: each pipeline has as many as the others. Set"
            f" `devices` times `num_nodes` to a multiple of {size}."
        )
    if size <= 1:
        return
    if asked.num_stages == 1 or (asked.num_stages == "auto" and num_processes == size):
        yield (
            f"data_parallel_size={size} with one stage: without a pipeline that is plain data parallelism. Use"
            " strategy='ddp', or more devices or stages."
        )
    sparse = [name for name, each in module.named_modules() if getattr(each, "sparse", False) is True]
    if sparse:
        yield (
            f"data_parallel_size={size} with sparse gradients ({', '.join(sparse)}): pipelines average dense ones. Make"
            " the embedding with `sparse=False`."
        )


def _is_whole(number: object) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(number, int) and not isinstance(number, bool)


def reasons_in_plan(asked: Options, schedule: Schedule, num_ranks: int, num_stages: int) -> Iterator[str]:
    """Why a pipeline of these sizes can't run the plan of a user, or of a schedule that was added."""
    words, m = in_words(asked), asked.num_microbatches
    given = isinstance(schedule, Given)
    if (num_stages % num_ranks and not given) or not _is_whole(m) or type(schedule) in _TESTED:
        return
    # A mini-batch with fewer samples has fewer micro-batches; a given plan runs what is left of it.
    sizes = range(1, m + 1)
    if isinstance(schedule, Given):
        plan, sizes = schedule.given, range(schedule.num_batches, schedule.num_batches + 1)
        if m != schedule.num_batches:
            yield f"num_microbatches={m}: the plan of {words} is for {schedule.num_batches} of them. Leave it out."
        if plan.num_stages != num_stages or plan.num_ranks % num_ranks:
            yield (
                f"{words}: the plan is for {plan.num_stages} stages on {plan.num_ranks} devices, not for {num_stages}"
                f" on {num_ranks}. Set `devices` to {plan.num_ranks} or a divisor of it and leave `num_stages` out, or"
                " write a plan of that size."
            )
    try:
        for size in sizes:
            if faults := _faults(schedule, num_stages, size):
                told = "; ".join(map(str, faults[:_TOLD_FAULTS]))
                more = f"; and {len(faults) - _TOLD_FAULTS} more" if len(faults) > _TOLD_FAULTS else ""
                yield f"{words}: the plan for {size} micro-batches can't run: {told}{more}."
                return
    except PlanError as error:
        yield f"{words}: {error}"


def _faults(schedule: Schedule, num_stages: int, size: int) -> list[Fault]:
    if isinstance(schedule, Given):
        return check(schedule.given) or not_one_step(schedule.given)
    plan = schedule.plan(num_stages, size)
    return check(plan, schedule) or not_one_step(plan)


def reasons_in_trainer(
    trainer: pl.Trainer, module: pl.LightningModule, layer_sync: Any, num_stages: int
) -> Iterator[str]:
    """What the trainer's flags and the module's class show, before any process is started."""
    if layer_sync is not None:
        yield (
            "Trainer(sync_batchnorm=True): every stage sees the whole mini-batch of its pipeline, so there is"
            " nothing to synchronise in one; pipelines side by side keep statistics of their own. Leave it out."
        )
    for step in STEPS:
        if is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True):
            yield f"`{step}(self, dataloader_iter)`: take `batch` and `batch_idx` instead."
    if num_stages > 1 and any(isinstance(each, BatchSizeFinder) for each in callbacks_of(trainer)):
        yield (
            "BatchSizeFinder: it tries larger and larger batches until memory runs out, and where that happens on one"
            " rank, the others wait for it. `cpipe plan` tells what each stage takes; `memory_limit` makes sure of it."
        )
    if num_stages > 1 and any(hasattr(each, _WATCHED_BY_WANDB) for each in module.modules()):
        yield (
            "`WandbLogger.watch(module)`: it looks at the weights and gradients of the whole module, of which each rank"
            " has one stage. Leave it out, and log what you need of them in `on_before_optimizer_step`; the norm of all"
            " gradients is `trainer.strategy.full_grad_norm()`."
        )
    if not trainer.training:
        return
    averaging = any(isinstance(each, StochasticWeightAveraging) for each in callbacks_of(trainer))
    if averaging and num_stages > 1 and StochasticWeightAveraging.pl_module_contains_batch_norm(module):
        yield (
            "StochasticWeightAveraging of a module with BatchNorm: its last epoch has forwards without backwards, to"
            " measure the statistics anew. Take `WeightAveraging`, which averages them with the weights."
        )
    pruning = [type(each).__name__ for each in callbacks_of(trainer) if isinstance(each, ModelPruning)]
    if pruning and num_stages > 1:
        yield (
            f"{pruning[0]}: it chooses among the weights of all stages, and gives those that it prunes other names,"
            " while the stages' parts are joined by name. Prune before `fit` and between fits, on every rank, with"
            " `torch.nn.utils.prune`."
        )
    if trainer.checkpoint_callbacks and num_stages > 1 and (names := _parts_among_hyperparameters(module)):
        yield (
            f"hyperparameters that are modules with weights ({', '.join(names)}): a checkpoint would hold them, too,"
            f" but of one stage only. Leave them out: `self.save_hyperparameters(ignore={names})`."
        )
    if not module.automatic_optimization:
        yield (
            "automatic_optimization=False: in a pipeline the forward and the backward of one step are about different"
            " mini-batches, which only automatic optimization can arrange. Let `training_step` return the loss."
        )


def reasons_in_accumulation(trainer: pl.Trainer, schedule: Schedule, num_stages: int) -> Iterator[str]:
    """Whether enough mini-batches share an update, at all times."""
    if not trainer.training:
        return
    numbers = [trainer.accumulate_grad_batches]
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            numbers = list(callback.scheduling.values())
    if why := schedule.too_few(num_stages, min(numbers)):
        yield (
            f"versions={schedule.versions.name!r} with accumulate_grad_batches={min(numbers)}: {why}. Set"
            f" accumulate_grad_batches={schedule.lag(0, num_stages)} or more, or versions='stash', which takes any"
            " number."
        )


def _parts_among_hyperparameters(module: pl.LightningModule) -> list[str]:
    """The hyperparameters that are parts of the module and hold weights, by name."""
    own = {id(parameter) for parameter in module.parameters()}
    return [
        name
        for name, value in module.hparams.items()
        if isinstance(value, nn.Module) and any(id(parameter) in own for parameter in value.parameters())
    ]


def reasons_in_optimizers(configured: object) -> Iterator[str]:
    """What only shows in what `configure_optimizers` returns."""
    optimizers = [each for each in flatten(configured)[0] if isinstance(each, torch.optim.Optimizer)]
    if configured is None:
        yield (
            "`configure_optimizers` returns no optimizer, and a pipeline is there to train. Return one; to run a module"
            " as it is, use `trainer.validate`, `trainer.test` or `trainer.predict`."
        )
    if len(optimizers) > 1:
        yield (
            f"{len(optimizers)} optimizers: use one with several parameter groups. Optimizers that alternate need"
            " manual optimization, which a pipeline can't have."
        )
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            yield (
                "LBFGS evaluates the loss several times per step, each after the weights moved; mini-batches in flight"
                " can't be evaluated again. Use a first-order optimizer."
            )
