"""Every private name of Lightning that this package touches, in one place.

Lightning has no public way to change its loops since version 2.0. What is used here exists in 2.4 to 2.6; a test
compares the names and their behaviour with what is written below, and fails by name when Lightning changes one.
"""

from __future__ import annotations

import importlib
import math
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _auto_add_worker_init_fn as seed_workers
from lightning.fabric.utilities.data import _set_sampler_epoch as set_sampler_epoch
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available as all_gather_stacked
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device as default_backend_for,
)
from lightning.fabric.utilities.distributed import _init_dist_connection as init_dist_connection
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed as set_num_threads_if_needed
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    StochasticWeightAveraging,
    ThroughputMonitor,
)
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization as AutomaticOptimization
from lightning.pytorch.loops.prediction_loop import _PredictionLoop as PredictionLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,
)
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import _TunerExitException as TunerExit
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

__all__ = [
    "AVERAGING",
    "AutomaticOptimization",
    "Average",
    "DataFetcher",
    "EvaluationLoop",
    "FitLoop",
    "MultiProcessingLauncher",
    "PredictionLoop",
    "SubprocessScriptLauncher",
    "TrainingEpochLoop",
    "TunerExit",
    "adopt",
    "after_loading_average",
    "all_gather_stacked",
    "as_of",
    "attach_for_training",
    "averages_of",
    "callbacks_of",
    "combined_loader_of",
    "default_backend_for",
    "end_open_records",
    "evaluation_arguments",
    "follow_plan",
    "give_states",
    "has_transfer_hooks",
    "hide_advice_to_sync",
    "init_dist_connection",
    "instead_of",
    "known_metrics",
    "learn_metrics",
    "loaders_as",
    "logging_for",
    "optimizers_to_device",
    "overrule_metrics",
    "parts_of_saving",
    "plan_timed_validation",
    "prepare_batch",
    "put_back_epoch_so_far",
    "rate_pipelines",
    "reduction_of",
    "reloads_loaders_at",
    "save_and_requeue",
    "seed_workers",
    "set_num_threads_if_needed",
    "set_received_sigterm",
    "set_sampler_epoch",
    "set_step_values",
    "start_children",
    "states_of_epoch_so_far",
    "states_of_loaders",
    "take_over_signals",
    "take_step_values",
    "training_arguments",
    "updates_after_this_batch",
    "with_column",
]

Loop = TypeVar("Loop")

AVERAGING: tuple[type[Any], ...] = (
    StochasticWeightAveraging,
    # There is none before Lightning 2.6.
    getattr(pl.callbacks, "WeightAveraging", StochasticWeightAveraging),
)
"""The callbacks that average weights."""


def adopt(cls: type[Loop], original: Any) -> Loop:
    """A loop of class `cls` with the whole state of Lightning's own loop."""
    if isinstance(original, cls):
        return original
    loop = cls.__new__(cls)
    loop.__dict__.update(original.__dict__)
    return loop


class FitLoop(_FitLoop):
    """Lightning's fit loop, with a fetcher of our choice."""

    fetcher: DataFetcher | None = None

    def make_fetcher(self) -> DataFetcher:
        """The fetcher that is used instead of the one that Lightning selected."""
        raise NotImplementedError

    @property
    def _data_fetcher(self) -> DataFetcher | None:
        return self.fetcher

    @_data_fetcher.setter
    def _data_fetcher(self, fetcher: DataFetcher | None) -> None:
        self.fetcher = None if fetcher is None else self.make_fetcher()

    def give_loaders_their_places(self) -> None:
        """Tell the loaders where they were when the checkpoint was saved; they were made before it was loaded."""
        self._load_combined_loader_states()

    def forget_loaders_of_another_epoch(self) -> None:
        """Let the loaders be made anew if they are to be now and then, and were made before the epoch was known.

        The set-up asks for them, to look at the first batch, before a checkpoint tells the epoch.
        """
        every = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if every and self.trainer.current_epoch != self._last_train_dl_reload_epoch:
            self._last_train_dl_reload_epoch = -math.inf


class TrainingEpochLoop(_TrainingEpochLoop):
    """Lightning's epoch, without a collective in every step."""

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing: it would make all stages wait for each other. A SIGTERM travels with other messages instead."""

    told_to_validate: bool | None = None
    """Whether a validation follows the step at hand, where rank 0's clock says so; None where the own one does."""

    @override
    def _should_check_val_fx(self, data_fetcher: DataFetcher) -> bool:
        told = self.told_to_validate
        return bool(super()._should_check_val_fx(data_fetcher)) if told is None else told

    def begin_counting(self) -> None:
        """Count batches from 0, as in a new epoch."""
        self.batch_progress.reset_on_run()
        self.scheduler_progress.reset_on_run()
        self.automatic_optimization.optim_progress.reset_on_run()
        self.val_loop.batch_progress.total.reset()


class EvaluationLoop(_EvaluationLoop):
    """Lightning's evaluation, with two of its moments made hooks."""

    def on_loader_end(self, outputs: list[dict[str, Any]]) -> None:
        """A loader is done; the last of `outputs` is what was logged for it."""

    def before_end_hooks(self) -> None:
        """Everything is computed, and no hook of the evaluation's end was called."""

    @override
    def _store_dataloader_outputs(self) -> None:
        super()._store_dataloader_outputs()
        self.on_loader_end(self._logged_outputs)

    @override
    def _on_evaluation_end(self, *args: Any, **kwargs: Any) -> None:
        self.before_end_hooks()
        super()._on_evaluation_end(*args, **kwargs)


class MultiProcessingLauncher(_MultiProcessingLauncher):
    """Lightning's launcher of processes, which tells of an exception in a child, too."""

    def on_exception(self, error: BaseException) -> None:
        """A rank raised; called in its process."""

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._wrapping_function(*args, **kwargs)
        except BaseException as error:
            self.on_exception(error)
            raise


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The trainer's callbacks, an attribute that it has without declaring it."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


class Average(NamedTuple):
    """A callback that averages weights.

    Attributes:
        callback: which.
        copy: of the whole module; its weights are the averages.
        saves: the method that gives the copy's state to a checkpoint.
        loads: the method that takes it from one.
        exchanges: the hooks that write into the module's weights while it trains.
    """

    callback: pl.Callback
    copy: nn.Module
    saves: str
    loads: str
    exchanges: tuple[str, ...]


def averages_of(callbacks: Iterable[pl.Callback]) -> list[Average]:
    """Those of the callbacks that hold an average."""
    found = []
    for callback in callbacks:
        if isinstance(callback, AVERAGING) and (average := callback._average_model) is not None:
            if isinstance(callback, StochasticWeightAveraging):
                found.append(Average(callback, average, "state_dict", "load_state_dict", ()))
            else:
                exchanges = ("on_validation_epoch_start", "on_validation_epoch_end")
                found.append(Average(callback, average.module, "on_save_checkpoint", "on_load_checkpoint", exchanges))
    return found


def after_loading_average(trainer: pl.Trainer, average: Average) -> None:
    """Do what Lightning would have done when the fit started, had the average been loaded before that.

    From its start on, the scheduler of `StochasticWeightAveraging` is in the place of the user's, and in a checkpoint.
    """
    callback = average.callback
    if isinstance(callback, StochasticWeightAveraging) and callback._scheduler_state is not None:
        callback._clear_schedulers(trainer)


def rate_pipelines(callback: pl.Callback, pipelines: int, ranks: int) -> None:
    """Let Lightning's own `ThroughputMonitor` count each sample once, if this is one.

    It multiplies what rank 0 counts by the number of ranks, and compares with what one device can do.

    Args:
        callback: any, after its `setup`.
        pipelines: that run side by side on samples of their own; what it calls a device is one of them.
        ranks: of each pipeline.
    """
    if isinstance(callback, ThroughputMonitor):
        for throughput in callback._throughputs.values():
            throughput.world_size = pipelines
            if callback.available_flops is not None:
                throughput.available_flops = callback.available_flops * ranks


def attach_for_training(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let the module be the trainer's as in the first step of a fit, without running one."""
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module)
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True


def combined_loader_of(loop: Any) -> Any:
    """The loop's `CombinedLoader`, once `setup_data` has made it."""
    return loop._combined_loader


@contextmanager
def loaders_as(loop: Any, read: Callable[[CombinedLoader], CombinedLoader], mode: Any) -> Iterator[None]:
    """Inside, the loop gets what `read` makes of its loaders, put together by `mode` unless they are already."""
    source = loop._data_source
    ask = source.dataloader

    def dataloader() -> CombinedLoader:
        found = ask()
        return read(found if isinstance(found, CombinedLoader) else CombinedLoader(found, mode))

    undo = instead_of(source, "dataloader", dataloader)
    try:
        yield
    finally:
        undo()


def training_arguments(trainer: pl.Trainer, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What Lightning would give to `training_step`: it leaves out `batch_idx` if the step does not take it."""
    return tuple(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx).values())


def evaluation_arguments(loop: Any, step: str, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What Lightning would give to the first loader's evaluation step."""
    several = loop.num_dataloaders > 1 and getattr(loop, "_is_sequential", True)
    kwargs = loop._build_kwargs(batch, batch_idx, 0 if several else None)
    arguments: tuple[Any, ...] = loop._build_step_args_from_hook_kwargs(kwargs, step)
    return arguments


def prepare_batch(module: pl.LightningModule, batch: Any, device: torch.device) -> Any:
    """What Lightning does with a batch before it gives it to a step."""
    batch = module.trainer.precision_plugin.convert_input(batch)
    batch = type(module)._on_before_batch_transfer(module, batch, dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)


def has_transfer_hooks(trainer: pl.Trainer) -> bool:
    """Whether the module or the data module changes batches on their way to the device."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    owners = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    return any(is_overridden(hook, owner) for hook in hooks for owner in owners if owner is not None)


def states_of_loaders(loader: CombinedLoader) -> list[Any]:
    """The places of those loaders that know theirs."""
    states: list[Any] = loader._state_dicts()
    return states


def give_states(loader: CombinedLoader, states: list[Any]) -> None:
    """Let those loaders that know their places go on from these."""
    if states:
        loader._load_state_dicts(states)


def updates_after_this_batch(trainer: pl.Trainer) -> bool:
    """Whether the optimizer steps with the batch at hand."""
    return not trainer.fit_loop._should_accumulate()


def known_metrics(trainer: pl.Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The metrics that callbacks and loggers see: (callback_metrics, logged_metrics), without computing any."""
    connector = trainer._logger_connector
    return connector._callback_metrics, connector._logged_metrics


def learn_metrics(trainer: pl.Trainer, callback: Mapping[str, Tensor], logged: Mapping[str, Tensor]) -> None:
    """Let callbacks see metrics that were computed on another rank."""
    known_callback, known_logged = known_metrics(trainer)
    known_callback.update(callback)
    known_logged.update(logged)


def overrule_metrics(trainer: pl.Trainer, values: Mapping[str, Tensor]) -> None:
    """Let what this process has logged be these values, by the names that callbacks and loggers see."""
    results = trainer._results
    if results is None:
        return
    of_step = trainer._logger_connector._first_loop_iter is not None
    for _, metric in results.valid_items():
        value = values.get(results._forked_name(metric, of_step)[1])
        if value is None:
            continue
        if of_step and metric.meta.on_step:
            metric._forward_cache = value
        elif not of_step and metric.meta.on_epoch:
            metric._computed = value


@contextmanager
def logging_for(trainer: pl.Trainer, batch: Any, batch_size: float | None = None) -> Iterator[None]:
    """Inside, what the module logs is logged by `training_step`, for this batch instead of the loop's.

    In an epoch's means it counts for `batch_size` samples; by default for those that are in it.
    """
    module, results = trainer.lightning_module, _training_results(trainer)
    before = module._current_fx_name, results.batch, results.batch_size
    module._current_fx_name, results.batch, results.batch_size = "training_step", batch, batch_size
    try:
        yield
    finally:
        module._current_fx_name, results.batch, results.batch_size = before


def take_step_values(trainer: pl.Trainer) -> dict[str, Tensor]:
    """The values of the step that `training_step` logged with ``on_step=True``, by key; they are taken away."""
    taken = {}
    for key, metric in _training_results(trainer).items():
        if metric.meta.fx == "training_step" and isinstance(metric._forward_cache, Tensor):
            taken[key] = metric._forward_cache
            metric._forward_cache = None
    return taken


def set_step_values(trainer: pl.Trainer, values: Mapping[str, Tensor]) -> None:
    """Let these be the values of the step, by the keys of `take_step_values`."""
    for key, value in values.items():
        _training_results(trainer)[key]._forward_cache = value


def reduction_of(trainer: pl.Trainer, key: str) -> str:
    """How the values under a key are put together over an epoch: ``mean``, ``max``, ``min`` or ``sum``."""
    metric = _training_results(trainer)[key]
    return metric.meta.reduce_fx.__name__ if metric.is_tensor else "mean"


def _training_results(trainer: pl.Trainer) -> Any:
    return trainer.fit_loop.epoch_loop._results


_OF_META = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip


def states_of_epoch_so_far(trainer: pl.Trainer) -> dict[str, Any]:
    """What `self.log` has put together of the epoch's training, and the states of the module's metrics."""
    logged = {}
    for key, found in _training_results(trainer).items():
        if found.is_tensor and not found.has_reset:
            meta, sync = found.meta, found.meta.sync
            logged[key] = {
                "meta": {name: getattr(meta, name) for name in _OF_META},
                "reduce_fx": meta.reduce_fx.__name__,
                "sync": [sync.should, sync.rank_zero_only],
                "states": _states_of(found),
            }
    return {"logged": logged, "metrics": {name: _states_of(each) for name, each in _metrics_of(trainer)}}


def put_back_epoch_so_far(trainer: pl.Trainer, states: dict[str, Any]) -> None:
    """Let the epoch's values go on from `states_of_epoch_so_far`, before its next batch."""
    results = _training_results(trainer)
    for key, saved in states["logged"].items():
        meta = result._Metadata(**saved["meta"], reduce_fx=saved["reduce_fx"])
        should, rank_zero_only = saved["sync"]
        meta.sync = result._Sync(fn=trainer.strategy.reduce, _should=should, rank_zero_only=rank_zero_only)
        results[key] = made = result._ResultMetric(meta, is_tensor=True)
        _put_back(made, saved["states"])
    for name, each in _metrics_of(trainer):
        if name in states["metrics"]:
            _put_back(each, states["metrics"][name])
    # Else the first value would be taken for the epoch's first.
    trainer._logger_connector._first_loop_iter = True


def _metrics_of(trainer: pl.Trainer) -> list[tuple[str, Metric]]:
    """The metrics in the module, by their names."""
    return [(name, each) for name, each in trainer.lightning_module.named_modules() if isinstance(each, Metric)]


def _states_of(metric: Metric) -> dict[str, Any]:
    return {"updates": metric._update_count, "values": {name: getattr(metric, name) for name in metric._defaults}}


def _put_back(metric: Metric, states: dict[str, Any]) -> None:
    metric._update_count, metric._computed = states["updates"], None
    for name, value in states["values"].items():
        is_list = isinstance(value, list)
        moved = [each.to(metric.device) for each in value] if is_list else value.to(metric.device)
        setattr(metric, name, moved)


def plan_timed_validation(trainer: pl.Trainer) -> bool | None:
    """Whether a validation follows the step at hand by this process's clock; None where validations are not timed."""
    if getattr(trainer, "_val_check_time_interval", None) is None or not trainer.training:
        return None
    loop = trainer.fit_loop.epoch_loop
    follow_plan(trainer, None)
    due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
    follow_plan(trainer, due)
    return due


def follow_plan(trainer: pl.Trainer, due: bool | None) -> None:
    """Let rank 0's clock say whether a validation follows the step at hand; None where validations are not timed."""
    trainer.fit_loop.epoch_loop.told_to_validate = due  # type: ignore[attr-defined]


def take_over_signals(trainer: pl.Trainer, on_sigterm: Callable[[], None], on_requeue: Callable[[], None]) -> None:
    """Call `on_sigterm`, and hand the signal on to the processes that this one launched; on SLURM's, `on_requeue`.

    Lightning's own handler broadcasts to all ranks from inside the signal handler, and hangs where a rank waits for a
    message. So does its handler of SLURM's requeue signal, which saves a checkpoint wherever each rank happens to be.
    """

    def notify(signum: int, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)
        on_sigterm()

    connector = trainer._signal_connector
    connector._sigterm_notifier_fn = notify  # type: ignore[method-assign, assignment]
    connector._slurm_sigusr_handler_fn = lambda *_: on_requeue()  # type: ignore[method-assign]


def save_and_requeue(trainer: pl.Trainer) -> None:
    """Save a checkpoint for SLURM, and on rank 0 ask it to requeue the job; all ranks must call it."""
    connector = trainer._signal_connector
    type(connector)._slurm_sigusr_handler_fn(connector, signal.SIGUSR1, None)  # type: ignore[arg-type]


def set_received_sigterm(trainer: pl.Trainer, received: bool) -> None:
    """Let Lightning's loop act as if this process had received a SIGTERM, or had not."""
    trainer._signal_connector.received_sigterm = received


@contextmanager
def as_of(trainer: pl.Trainer, epoch: int) -> Iterator[None]:
    """Inside, `trainer.current_epoch` reads `epoch`."""
    progress = trainer.fit_loop.epoch_progress.current
    now, progress.completed = progress.completed, epoch
    try:
        yield
    finally:
        progress.completed = now


def reloads_loaders_at(trainer: pl.Trainer, epoch: int) -> bool:
    """Whether Lightning asks for new training loaders when it begins `epoch`."""
    every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    return bool(every) and epoch - trainer.fit_loop._last_train_dl_reload_epoch >= every


def end_open_records(trainer: pl.Trainer) -> None:
    """Let torch's profiler take the modules that have begun for ended, after a step that was left in the middle."""
    register = getattr(trainer.profiler, "_register", None)  # type: ignore[attr-defined]
    if register is not None:
        for record in reversed(register._records.values()):
            record.__exit__(None, None, None)
        register._records.clear()


def start_children(launcher: SubprocessScriptLauncher) -> None:
    """Start the script once more for each further rank of this machine."""
    launcher._call_children_scripts()


def with_column(
    callback: ModelSummary, header: str, cells: Callable[[list[str]], list[str]]
) -> list[Callable[[], None]]:
    """Put one more column into the tables of a summary.

    Args:
        callback: prints the summary.
        header: of the column, which comes after that of the numbers of parameters.
        cells: makes them for the names in the table.

    Returns:
        Functions that undo it.
    """
    makes_summary, prints = callback._summary, callback.summarize

    def summary(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        made = makes_summary(trainer, pl_module)
        makes_columns = made._get_summary_data

        def columns() -> list[tuple[str, list[str]]]:
            found = makes_columns()
            known = dict(found)
            found.insert(list(known).index(_PARAMETERS) + 1, (header, cells(known["Name"])))
            return found

        instead_of(made, "_get_summary_data", columns)
        return made

    def summarize(*args: Any, **kwargs: Any) -> None:
        # Rich's table gets the columns that are known to Lightning, whatever is in the rows.
        rich: Any = importlib.import_module("rich.table")
        adds_column = rich.Table.add_column

        def add_column(table: Any, name: Any = "", *args: Any, **kwargs: Any) -> None:
            adds_column(table, name, *args, **kwargs)
            if name == _PARAMETERS:
                adds_column(table, header)

        undo = instead_of(rich, "Table", type("Table", (rich.Table,), {"add_column": add_column}))
        try:
            prints(*args, **kwargs)
        finally:
            undo()

    undo = [instead_of(callback, "_summary", summary)]
    if isinstance(callback, RichModelSummary):
        undo.append(instead_of(callback, "summarize", summarize))
    return undo


def hide_advice_to_sync() -> Callable[[], None]:
    """No advice to log with `sync_dist=True`, until the returned function is called."""
    # What it looks at, and nothing else there does. A filter of warnings would not spare it for a later run: Lightning
    # gives each advice once.
    return instead_of(result, "_distributed_is_initialized", lambda: False)


def parts_of_saving(callback: ModelCheckpoint) -> tuple[Callable[..., None], Callable[..., None]]:
    """How a `ModelCheckpoint` saves a file and tells loggers of it, and how it links another name to a file."""
    return callback._save_checkpoint, callback._link_checkpoint


def instead_of(owner: Any, name: str, function: Callable[..., Any] | None) -> Callable[[], None]:
    """Call `function` instead of the owner's method `name`, until the returned function is called."""
    before = owner.__dict__.get(name, _NOT_THERE)
    owner.__dict__[name] = function

    def undo() -> None:
        if before is _NOT_THERE:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = before

    return undo


_NOT_THERE = object()

_PARAMETERS = "Params"
"""The header of the numbers of parameters in a summary."""
