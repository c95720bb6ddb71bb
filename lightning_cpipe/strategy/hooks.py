"""Which hooks run on which stage.

Hooks fire on every rank, each at its own local step. Those that need what a step returned or left behind run where
that is: on the last stage, which is rank 0. A hook that goes over the module's parameters sees those of its own stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, LambdaCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torchmetrics import Metric
from typing_extensions import override

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.view import View
from lightning_cpipe.strategy.lightning_private import (
    AVERAGING,
    callbacks_of,
    hide_advice_to_sync,
    instead_of,
    rate_pipelines,
)
from lightning_cpipe.strategy.ranks.processes import Processes
from lightning_cpipe.strategy.sharing.sharing import Sharing
from lightning_cpipe.strategy.step_names import STEPS
from lightning_cpipe.transport.counterparts import Counterparts

_OF_CALLBACKS = frozenset(
    name
    for name in vars(pl.Callback)
    if name.startswith("on_") and "checkpoint" not in name and name not in ("on_exception", "on_fit_end")
)

_OF_MODULE = (_OF_CALLBACKS & set(dir(pl.LightningModule))) | {
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_validation_model_zero_grad",
    "optimizer_step",
    "optimizer_zero_grad",
}


def view_of_hooks() -> View:
    """What hooks see of the module's parameters; rank 0 says once of each hook that it sees a part."""
    return View(
        lambda hook: rank_zero_info(
            f"{hook} goes over the module's parameters: on each rank, over those of its own stages. All ranks run it."
        )
    )


def arrange_hooks(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    cut: Cut,
    sharing: Sharing,
    view: View,
    processes: Processes,
    undo: list[Callable[[], None]],
) -> None:
    """Let each hook run where it belongs, and see what is there.

    - Only the last stage logs. What it logged, `Sharing` lets the others know.
    - Hooks that need what only the last stage has run there only, see `_of_last_stage`.
    - All others run on every stage.

    Args:
        trainer: has the callbacks.
        module: whole, for the user.
        cut: of it.
        sharing: this rank's share in the talk.
        view: what hooks see of the module's parameters.
        processes: this rank among the others.
        undo: gets functions that undo it.
    """
    for callback in callbacks_of(trainer):
        rate_pipelines(callback, processes.num_replicas, len(processes.held))
    undo.append(view.open())
    undo.extend(_show_own(trainer, module, view))
    undo.append(_keep_metrics_apart(sharing, processes.counterparts))
    if processes.counterparts is None:
        # Metrics are the same on all ranks here.
        undo.append(hide_advice_to_sync())
    here_alone = _of_last_stage(trainer, module, cut)
    if sharing.leads:
        for owner, hook in here_alone:
            # Nobody but rank 0 has a checkpoint to change.
            runs = hook != "on_save_checkpoint" or trainer.is_global_zero
            undo.append(instead_of(owner, hook, _unheard(getattr(owner, hook), sharing) if runs else _nothing))
        if of_module := [hook for owner, hook in here_alone if owner is module]:
            rank_zero_info(
                f"{type(module).__name__}: {', '.join(of_module)} run on the last stage only (rank 0), where what they"
                " need is; what they change on the module, the other stages do not see."
            )
    else:
        undo.append(instead_of(module, "log", _nothing))
        undo += [instead_of(owner, hook, _nothing) for owner, hook in here_alone]
    if "training_step" in cut.steps:
        undo += [_share_before_epoch_end(trainer, sharing), _share_after_epoch_end(module, sharing)]
        undo += [_refuse_to_skip(module)] if is_overridden("on_train_batch_start", module) else []
    # Lightning's summary and TensorBoard would run it through the whole module, which no rank has.
    undo.append(instead_of(module, "_example_input_array", None))


def _of_last_stage(trainer: pl.Trainer, module: pl.LightningModule, cut: Cut) -> list[tuple[Any, str]]:
    """The hooks that need what only the last stage has, with their owners.

    - Those at the end of an evaluation's batch, the module's and all callbacks', which get the step's output; and the
      one at the end of its epoch, of whoever has one for the batch, too.
    - The module's at the end of a batch of training, if its step returns more than the loss. Callbacks' run everywhere.
    - The module's at the end of an epoch, if the step leaves something behind on the last stage alone, such as a list
      of outputs.
    - Those that change a checkpoint, which rank 0 alone has the whole of.

    Of callbacks that average weights, every hook runs everywhere.
    """
    found: dict[tuple[int, str], Any] = {}
    for owner in (module, *(each for each in callbacks_of(trainer) if not isinstance(each, AVERAGING))):
        found[id(owner), "on_save_checkpoint"] = owner
        for step, names in STEPS.items():
            if step != "training_step" and is_overridden(names.batch_end, owner):
                found |= {(id(owner), hook): owner for hook in (names.batch_end, names.epoch_end)}
    for step, of_step in cut.steps.items():
        names = STEPS[step]
        found |= {(id(module), names.batch_end): module} if of_step.returns_more else {}
        found |= {(id(module), names.epoch_end): module} if of_step.leaves_behind else {}
    return [(owner, hook) for (_, hook), owner in found.items() if is_overridden(hook, owner)]


def _show_own(trainer: pl.Trainer, module: pl.LightningModule, view: View) -> Iterator[Callable[[], None]]:
    """Let hooks see the parameters that are here; Lightning's own callbacks only where they average them.

    Those that freeze and unfreeze mean all parameters, on every rank.
    """
    for owner, hooks in ((module, _OF_MODULE), *((each, _OF_CALLBACKS) for each in callbacks_of(trainer))):
        of_lightning = type(owner).__module__.startswith("lightning.")
        if isinstance(owner, BaseFinetuning) or (of_lightning and not isinstance(owner, (AVERAGING, LambdaCallback))):
            continue
        for hook in sorted(hooks):
            if is_overridden(hook, owner):
                name = "" if isinstance(owner, AVERAGING) else f"{type(owner).__name__}.{hook}"
                yield instead_of(owner, hook, _seeing_own(getattr(owner, hook), view, name))


def _seeing_own(users_hook: Callable[..., Any], view: View, name: str) -> Callable[..., Any]:
    def hook(*args: Any, **kwargs: Any) -> Any:
        with view.of_own(name):
            return users_hook(*args, **kwargs)

    return hook


def _unheard(users_hook: Callable[..., Any], sharing: Sharing) -> Callable[..., Any]:
    def hook(*args: Any, **kwargs: Any) -> Any:
        with sharing.unheard():
            return users_hook(*args, **kwargs)

    return hook


class _ShareFirst(pl.Callback):
    """Comes before all other callbacks, which may read the metrics of the epoch."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sharing.metrics("epoch's steps")


def _share_before_epoch_end(trainer: pl.Trainer, sharing: Sharing) -> Callable[[], None]:
    callbacks, ours = callbacks_of(trainer), _ShareFirst(sharing)
    callbacks.insert(0, ours)
    return lambda: callbacks.remove(ours)


def _share_after_epoch_end(module: pl.LightningModule, sharing: Sharing) -> Callable[[], None]:
    """The monitoring callbacks come right after this hook, and decide by what it logged."""
    users_hook = module.on_train_epoch_end

    def on_train_epoch_end() -> None:
        users_hook()
        sharing.metrics("epoch")

    return instead_of(module, "on_train_epoch_end", on_train_epoch_end)


def _keep_metrics_apart(sharing: Sharing, counterparts: Counterparts | None) -> Callable[[], None]:
    """A torchmetrics metric computes over all ranks by default, but only the last stage of each pipeline calls it.

    That holds for any metric, wherever it hangs and whenever it is made.
    """
    sync, group = Metric.sync, None if counterparts is None else counterparts.group
    is_open = True

    def over_pipelines(
        metric: Metric,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        if not is_open:
            # Somebody else has put itself around it meanwhile.
            sync(metric, dist_sync_fn, process_group, should_sync, distributed_available)
            return
        among = process_group or metric.process_group or group
        exchanges = should_sync and group is not None
        if exchanges:
            sharing.before_exchange()
        sync(metric, dist_sync_fn, among, should_sync, lambda: exchanges)

    def undo() -> None:
        nonlocal is_open
        is_open = False
        if Metric.sync is over_pipelines:
            Metric.sync = sync  # type: ignore[method-assign]

    Metric.sync = over_pipelines  # type: ignore[method-assign, assignment]
    return undo


def _refuse_to_skip(module: pl.LightningModule) -> Callable[[], None]:
    users_hook = module.on_train_batch_start

    def on_train_batch_start(*args: Any) -> Any:
        if users_hook(*args) == -1:
            raise MisconfigurationException(
                "`on_train_batch_start` returned -1 to end the epoch, but earlier stages have forwarded some of its"
                " mini-batches already. Shorten the epoch with `Trainer(limit_train_batches=...)`, or stop training"
                " with `trainer.should_stop = True`."
            )

    return instead_of(module, "on_train_batch_start", on_train_batch_start)


def _nothing(*_: Any, **__: Any) -> None:
    return None
