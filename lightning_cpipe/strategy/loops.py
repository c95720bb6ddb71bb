"""Lightning's loops, with the few methods changed in which a pipeline differs.

Everything else is Lightning's. The loops take over the state of the ones they replace, and keep the names of their
attributes, so that checkpoints are interchangeable with those of any other strategy.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cpipe.strategy.data.data_place import DataPlace
from lightning_cpipe.strategy.data.drawn import Drawn, Released
from lightning_cpipe.strategy.data.fetcher import LookaheadFetcher
from lightning_cpipe.strategy.lightning_private import (
    AutomaticOptimization,
    DataFetcher,
    EvaluationLoop,
    FitLoop,
    PredictionLoop,
    TrainingEpochLoop,
    adopt,
    as_of,
    instead_of,
    loaders_as,
)


class Pipeline(Protocol):
    """What the loops ask of the strategy."""

    def make_fetcher(self) -> LookaheadFetcher:
        """A fetcher for this stage."""

    def read(self, loader: CombinedLoader, *, training: bool) -> CombinedLoader:
        """The loaders of a loop, as this rank reads them."""

    def begin_stream(self) -> None:
        """Training begins."""

    def end_stream(self) -> None:
        """Training ends: bring what is in flight to rest."""

    def after_step(self, output: dict[str, Any]) -> dict[str, Any]:
        """A local step's optimization is done: learn what the last stage logged, and the true loss.

        Returns:
            What the hooks get as the step's output.
        """

    def after_step_hooks(self) -> None:
        """A local step's hooks are done: agree on whether to stop."""

    def after_whole_step(self) -> None:
        """A local step and what follows it are done: do what signals asked for."""

    def obeying_signals(self) -> AbstractContextManager[None]:
        """A fit runs inside, which signals may end."""

    def before_epoch(self) -> None:
        """An epoch begins, and its first hooks were called."""

    def begin_epoch(self, resumed_at: int) -> None:
        """The loop goes on at batch `resumed_at` of its epoch, and no hook stands before it."""

    def after_epoch(self) -> None:
        """An epoch's hooks are done: agree on whether to stop."""

    def evaluating(self) -> AbstractContextManager[None]:
        """An evaluation runs inside."""

    def share_evaluation(self, outputs: list[dict[str, Any]]) -> None:
        """A loader of an evaluation is done: learn what the last stage logged for it."""

    def share_returned(self, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """An evaluation is over: what it returns is what it returns on the last stage."""

    def after_evaluation(self) -> None:
        """An evaluation is computed, its end's hooks not yet called: learn the metrics."""


@dataclass
class AsOf:
    """The place of a mini-batch that is forwarded in advance.

    Attributes:
        global_step: the optimizer steps before its own; None where the loop's own count holds.
    """

    global_step: int | None = None


class PipelineOptimization(AutomaticOptimization):
    """A step whose forward and backward are about different mini-batches."""

    pipeline: Pipeline

    @override
    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        return self.pipeline.after_step(super().run(optimizer, batch_idx, kwargs))


class PipelineEpochLoop(TrainingEpochLoop):
    """An epoch without collectives in every step."""

    pipeline: Pipeline
    as_of: AsOf

    @property
    @override
    def global_step(self) -> int:
        """The optimizer steps so far; inside a step that runs ahead, those before its mini-batch's own."""
        if self.as_of.global_step is not None:
            return self.as_of.global_step
        steps: int = super().global_step
        return steps

    @override
    def reset(self) -> None:
        loop = self.trainer.fit_loop
        assert isinstance(loop, PipelineFitLoop)
        with warnings.catch_warnings():
            if loop.saved_place is not None:
                # No sample is lost or comes twice, whether or not the loader knows its place.
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            super().reset()
        if loop.saved_place is not None and loop.saved_place.begins(self.trainer.current_epoch):
            # After an epoch of unknown length, Lightning would count on, and leave the next one out.
            self.begin_counting()

    @override
    def on_run_start(self, data_fetcher: DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        assert isinstance(data_fetcher, LookaheadFetcher)
        loop = self.trainer.fit_loop
        assert isinstance(loop, PipelineFitLoop)
        resumed_at = self.batch_progress.current.ready
        if resumed_at:
            # At an epoch's start, the places would be those at another one's end.
            loop.give_loaders_their_places()
        data_fetcher.begin_epoch(resumed_at, loop.take_saved_place(resumed_at))
        self.pipeline.begin_epoch(resumed_at)

    @override
    def on_advance_end(self, data_fetcher: DataFetcher) -> None:
        self.pipeline.after_step_hooks()
        super().on_advance_end(data_fetcher)
        self.pipeline.after_whole_step()


_PLACE = "place_of_pipeline"
"""What a checkpoint calls the place of the data, in the state of the fit loop."""


class PipelineFitLoop(FitLoop):
    """Epochs that the stages cross each in its own time."""

    pipeline: Pipeline
    place: DataPlace | None = None
    """Where the data was when that was last asked for."""
    saved_place: DataPlace | None = None
    """Where a checkpoint that was loaded says that it is."""

    @override
    def make_fetcher(self) -> LookaheadFetcher:
        # When the loaders are made anew between epochs, the numbers of the mini-batches go on.
        return self.fetcher if isinstance(self.fetcher, LookaheadFetcher) else self.pipeline.make_fetcher()

    @override
    def setup_data(self) -> None:
        with loaders_as(self, partial(self.pipeline.read, training=True), "max_size_cycle"):
            super().setup_data()

    @override
    def run(self) -> None:
        self.forget_loaders_of_another_epoch()
        self.place = None
        try:
            with self.pipeline.obeying_signals(), _not_transferred_twice(self.trainer):
                super().run()
        finally:
            self.saved_place = None

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        state: dict[str, Any] = super().on_save_checkpoint()
        fetcher = self.fetcher
        if isinstance(fetcher, LookaheadFetcher):
            if "combined_loader" in state and (places := fetcher.places_of_loaders()) is not None:
                # The loaders are ahead.
                state["combined_loader"] = places
            self.place = fetcher.place()
        if self.place is not None:
            state[_PLACE] = self.place.in_plain()
        return state

    @override
    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self.saved_place = DataPlace.from_plain(state_dict[_PLACE]) if _PLACE in state_dict else None

    def take_saved_place(self, resumed_at: int) -> DataPlace | None:
        """Where the checkpoint says that the data is, once, if the loop goes on there."""
        saved, self.saved_place = self.saved_place, None
        epoch = self.trainer.current_epoch
        if saved is None or (saved.epoch, saved.index) == (epoch, resumed_at) or saved.begins(epoch + 1):
            return saved
        rank_zero_warn(
            f"the checkpoint was saved before batch {saved.index} of epoch {saved.epoch}, and training goes on with"
            f" batch {resumed_at} of epoch {epoch}: the training loader starts anew."
        )
        return None

    @override
    def on_run_start(self) -> None:
        self.pipeline.begin_stream()
        super().on_run_start()

    @override
    def on_advance_start(self) -> None:
        super().on_advance_start()
        self.pipeline.before_epoch()
        if isinstance(self.fetcher, LookaheadFetcher):
            self.fetcher.keep_sampler_epoch()

    @override
    def on_advance_end(self) -> None:
        super().on_advance_end()
        self.pipeline.after_epoch()

    @override
    def on_run_end(self) -> None:
        self.pipeline.end_stream()
        if isinstance(self.fetcher, LookaheadFetcher):
            self.fetcher.end()
            # For a checkpoint that is saved when the fetcher is gone.
            self.place = self.fetcher.place()
        super().on_run_end()


class _ForwardOnly:
    """What an evaluation and a prediction have in common."""

    pipeline: Pipeline
    _is_set_up: bool = False

    def setup_data(self) -> None:
        # The strategy's set-up has asked for the loaders already, to look at their first batch.
        if not self._is_set_up:
            with loaders_as(self, partial(self.pipeline.read, training=False), "sequential"):
                super().setup_data()  # type: ignore[misc]

    def set_up_once(self) -> None:
        """Set the loaders up now; the next `run` uses them."""
        self.setup_data()
        self._is_set_up = True

    def run(self) -> Any:
        try:
            with self.pipeline.evaluating():
                return super().run()  # type: ignore[misc]
        finally:
            self._is_set_up = False


class PipelineEvaluationLoop(_ForwardOnly, EvaluationLoop):
    """An evaluation that streams forward only; what the last stage logs, all ranks learn."""

    def increment_progress_to_evaluation_end(self) -> None:
        """Count an evaluation that was made before the run was stopped, and begin its loaders, as Lightning does."""
        with self.pipeline.evaluating():
            super().increment_progress_to_evaluation_end()

    @override
    def run(self) -> list[dict[str, Any]]:
        return self.pipeline.share_returned(super().run())

    @override
    def on_loader_end(self, outputs: list[dict[str, Any]]) -> None:
        self.pipeline.share_evaluation(outputs)

    @override
    def before_end_hooks(self) -> None:
        self.pipeline.after_evaluation()


class PipelinePredictionLoop(_ForwardOnly, PredictionLoop):
    """Predictions that stream forward only; they are there on rank 0, which holds the last stage."""


def fetcher_of(trainer: pl.Trainer) -> LookaheadFetcher:
    """The fetcher of the training loop, once the loop has set its data up.

    Raises:
        MisconfigurationException: if there is no training.
    """
    loop = trainer.fit_loop
    assert isinstance(loop, PipelineFitLoop)
    if not isinstance(loop.fetcher, LookaheadFetcher):
        raise MisconfigurationException(
            "There is nothing to train: `limit_train_batches` is 0, or the module has no `training_step`."
        )
    return loop.fetcher


@contextmanager
def _not_transferred_twice(trainer: pl.Trainer) -> Iterator[None]:
    """Inside, the user's `on_before_batch_transfer` is not asked about a mini-batch that was prepared before."""
    hook = "on_before_batch_transfer"
    owners = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    undo = [
        instead_of(owner, hook, _but_not_released(getattr(owner, hook)))
        for owner in owners
        if owner is not None and is_overridden(hook, owner)
    ]
    try:
        yield
    finally:
        for each in undo:
            each()


def _but_not_released(users_hook: Callable[..., Any]) -> Callable[..., Any]:
    def on_before_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
        return batch if isinstance(batch, Released) else users_hook(batch, dataloader_idx)

    return on_before_batch_transfer


@contextmanager
def at_its_own_time(trainer: pl.Trainer, drawn: Drawn) -> Iterator[None]:
    """Inside, `global_step` and `current_epoch` read as they will when the loop comes to this mini-batch."""
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, PipelineEpochLoop)
    loop.as_of.global_step = drawn.updates_before
    try:
        with as_of(trainer, drawn.epoch):
            yield
    finally:
        loop.as_of.global_step = None


def evaluation_of(trainer: pl.Trainer) -> tuple[str, PipelineEvaluationLoop | PipelinePredictionLoop]:
    """The step and the loop of `trainer.validate`, `test` or `predict`."""
    step, loop = {
        TrainerFn.VALIDATING: ("validation_step", trainer.validate_loop),
        TrainerFn.TESTING: ("test_step", trainer.test_loop),
        TrainerFn.PREDICTING: ("predict_step", trainer.predict_loop),
    }[trainer.state.fn or TrainerFn.VALIDATING]
    assert isinstance(loop, (PipelineEvaluationLoop, PipelinePredictionLoop))
    return step, loop


def validation_of(trainer: pl.Trainer) -> PipelineEvaluationLoop:
    """The loop of the validations inside `trainer.fit`."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    assert isinstance(loop, PipelineEvaluationLoop)
    return loop


def install_loops(trainer: pl.Trainer, pipeline: Pipeline) -> None:
    """Replace the trainer's loops by ours; does nothing where they are ours already."""
    fit = adopt(PipelineFitLoop, trainer.fit_loop)
    fit.epoch_loop = adopt(PipelineEpochLoop, fit.epoch_loop)
    fit.epoch_loop.__dict__.setdefault("as_of", AsOf())
    fit.epoch_loop.automatic_optimization = adopt(PipelineOptimization, fit.epoch_loop.automatic_optimization)
    fit.epoch_loop.val_loop = adopt(PipelineEvaluationLoop, fit.epoch_loop.val_loop)
    trainer.fit_loop = fit
    trainer.validate_loop = adopt(PipelineEvaluationLoop, trainer.validate_loop)
    trainer.test_loop = adopt(PipelineEvaluationLoop, trainer.test_loop)
    trainer.predict_loop = adopt(PipelinePredictionLoop, trainer.predict_loop)
    for loop in (
        fit,
        fit.epoch_loop,
        fit.epoch_loop.automatic_optimization,
        fit.epoch_loop.val_loop,
        trainer.validate_loop,
        trainer.test_loop,
        trainer.predict_loop,
    ):
        loop.pipeline = pipeline
