"""Lightning's door to the pipeline: translates hooks into calls of the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cpipe.engine.figures import StageFigures
from lightning_cpipe.engine.timeline import ACTIONS, CudaTimeline, Span, Timeline
from lightning_cpipe.engine.training import room_on_lanes
from lightning_cpipe.errors import PlanError
from lightning_cpipe.probe.probe import Check
from lightning_cpipe.schedules.action import Action
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.given import Given
from lightning_cpipe.schedules.placement import stages_of
from lightning_cpipe.schedules.plan import Held
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.transfers import POSTED_AHEAD
from lightning_cpipe.stage.pages import keep_tensors_out_of_the_heap
from lightning_cpipe.stage.randomness import Stream, derived_seed, get_state, seeded, set_state
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.strategy.checkpoints.averages import Averages
from lightning_cpipe.strategy.checkpoints.exact_resume import ExactResume
from lightning_cpipe.strategy.checkpoints.one_file import write_file
from lightning_cpipe.strategy.checkpoints.optimizer_states import State
from lightning_cpipe.strategy.checkpoints.reader import Reader
from lightning_cpipe.strategy.checkpoints.unhurried import save_unhurried
from lightning_cpipe.strategy.checkpoints.whole import Whole
from lightning_cpipe.strategy.checkpoints.writer import Writer
from lightning_cpipe.strategy.data.fetcher import LookaheadFetcher
from lightning_cpipe.strategy.data.hearsay import Hearsay, Unread
from lightning_cpipe.strategy.finetuning import as_if_unfrozen, let_unfreeze
from lightning_cpipe.strategy.hooks import arrange_hooks, view_of_hooks
from lightning_cpipe.strategy.lightning_private import (
    callbacks_of,
    instead_of,
    optimizers_to_device,
    seed_workers,
    take_over_signals,
)
from lightning_cpipe.strategy.loops import install_loops
from lightning_cpipe.strategy.options import Clip, LoadOn, Options, StartMethod
from lightning_cpipe.strategy.ranks.launchers import ProcessLauncher, ScriptLauncher
from lightning_cpipe.strategy.ranks.processes import Processes, named_stages
from lightning_cpipe.strategy.ranks.replicas import gathered, reduced, seed_of_replica
from lightning_cpipe.strategy.run_at_hand import RunAtHand
from lightning_cpipe.strategy.setup.blueprint import Blueprint
from lightning_cpipe.strategy.setup.cutting import accumulating, agree_on_blueprint, agree_on_cut
from lightning_cpipe.strategy.setup.refusals import (
    reasons_in_accumulation,
    reasons_in_optimizers,
    reasons_in_options,
    reasons_in_plan,
    reasons_in_replicas,
    reasons_in_saving,
    reasons_in_trainer,
    refuse,
    refuse_broadcast,
)
from lightning_cpipe.strategy.setup.scheduling import schedule_of, sized
from lightning_cpipe.strategy.sharing.relaying import share
from lightning_cpipe.strategy.sharing.signals import Request, Signals
from lightning_cpipe.strategy.steps.stage_run import StageRun
from lightning_cpipe.strategy.steps.steps import Steps
from lightning_cpipe.strategy.summaries import show_stages
from lightning_cpipe.strategy.updates.agreeing import agree_in_updates, links_beside, sums_of
from lightning_cpipe.strategy.updates.clipping import Norms, OfOneStage

_CHANGES_AT_EPOCHS = (BaseFinetuning, GradientAccumulationScheduler)
"""Callbacks that change the plan, or what is trained, when an epoch begins."""


class ContinuousPipeStrategy(ParallelStrategy):
    """Trains a LightningModule, cut into stages, in a pipeline that is never flushed.

    Runs on CPUs with gloo. The path for GPUs with NCCL is written and the order of its operations is tested, but it has
    not run on a GPU yet.

    One process per stage, or for several. Whole mini-batches stream through the stages, one optimizer update per
    mini-batch, across epochs, validations and checkpoints. The price is delay: the gradient at stage s of p is
    p - 1 - s updates old.
    The flush schedules, which pay in idle time instead, run here too.

    Example:
        >>> import lightning.pytorch as pl
        >>> import lightning_cpipe  # registers the strategy
        >>> trainer = pl.Trainer(strategy="continuous_pipe", devices=4)  # doctest: +SKIP

    Args:
        num_stages: stages of the pipeline; ``auto`` for one per device, two for ``interleaved``, or as many as a given
            plan has. A multiple of the devices lets each hold several, with the same numbers; with ``devices=1`` that
            is a rehearsal of the whole pipeline.
        data_parallel_size: pipelines side by side, each with its share of the devices and of the data; they average
            their gradients before every update.
        schedule: who does what, when. ``continuous``: whole mini-batches, and no flush. ``gpipe``, ``1f1b``,
            ``interleaved`` and ``zb``: the micro-batches of one mini-batch, then one update of all stages, as plain
            Lightning makes it; ``interleaved`` puts stages on a device that are not neighbours, and ``zb`` splits
            backwards. Or the path of a plan of your own, as a ``.csv`` file, or an object of a subclass of
            `lightning_cpipe.schedules.flushed.Flushed`: either is checked first.
        num_microbatches: slices of a mini-batch in flush schedules, fewer where it has fewer samples; a plan in a file
            says itself for how many it is. A batch is sliced along the first dimension of its tensors, or by the
            module's own `split_batch(batch, num_microbatches)`, which returns the slices. The loss of each counts by
            its samples, as in a mean over samples; for other losses, the module's `loss_weights(micro_batches)` returns
            what each counts for.
        split_points: names of the modules that begin stages 1, 2, …; or ``auto`` to balance the stages.
        memory_limit: what each stage may take while it trains: weights, gradients, optimizer, weight versions and the
            activations of all mini-batches in flight. ``16GB`` (10^9 bytes each), ``16GiB`` (2^30), or a number of
            bytes. None for as much as it takes. A device that holds several stages may need as much for each.
        versions: which weights a mini-batch uses on a stage. ``stash``: the newest at its forward, in the backward
            too. ``latest``: the newest at each, so no copies, and biased gradients. ``vertical``: on all stages those
            that stage 0 had at its forward. ``2bw``: those before the newest, on all stages; it takes
            `accumulate_grad_batches` of (p - 1) (1 + `extra_in_flight`) or more.
        remedy: a rule against delay; none for now.
        extra_in_flight: how much further forwards run ahead, in multiples of the least lag. Hides the time of the
            transfers and absorbs jitter, at up to twice the delay.
        early_input_gradient: whether a backward is split, so that the gradient for the stage before leaves before the
            gradients of the weights are made. Every number stays the same.
        clip: by which norm `gradient_clip_val` clips the gradient of a stage. ``stage``: its own. ``suffix``: that of
            this stage and those after it. ``lagged``: that of all stages, with the newest known numbers of those before
            it, which are a few updates old. With flush schedules it is the norm of all stages.
        cross_epoch: whether the stream goes on across epochs. If not, the pipeline is refilled at each; it switches
            itself off with a `GradientAccumulationScheduler` and with callbacks that unfreeze weights.
        exact_resume: whether checkpoints also hold what is in flight (older weights and buffers), so
            that a run that is stopped and resumed with as many stages gives the numbers of one that is not, bit for
            bit. Without, the pipeline is filled anew: the first mini-batches after a resume use the newest weights.
        check: what the set-up proves about the cut: ``fills`` tries what the stages depend on, and compares two steps
            with the uncut module's, gradients aside; ``full`` compares all gradients too; ``auto`` is ``full`` below
            50 million parameters. Where gradients are not compared, a module that `configure_model` builds is
            never whole on any rank.
        load_on: which ranks iterate the loaders. ``all``; or ``ends``: those with the first and the last stage. The
            others get zeros for the numbers in a batch, and the set-up proves that their stages do not need more. A
            data module may ask `loads_data`, and spare a rank what is never read.
        looks: whether each stage looks again, before mini-batches 0, 1, 2, 4, 8, …, if the step begins to use what it
            does not receive. Without, what the first mini-batch shows is trusted.
        async_save: whether nobody waits for the disk either: checkpoints are written in the background, and
            `trainer.save_checkpoint` returns before the file is there. Without, rank 0 writes between two of its steps.
        save_distributed_checkpoint: whether a checkpoint is a folder into which each rank writes its own part, rather
            than one plain file. With one stage it is one file.
        timeout: seconds without a sign of life after which a rank counts as dead.
        process_group_backend: of the messages between stages; by default the device's own, gloo or nccl.
        start_method: how ranks are started: ``popen`` for scripts, ``spawn`` or ``fork`` elsewhere.
        accelerator: see Lightning.
        parallel_devices: see Lightning.
        cluster_environment: see Lightning.
        checkpoint_io: see Lightning.
        precision_plugin: see Lightning.
    """

    strategy_name = "continuous_pipe"

    def __init__(
        self,
        num_stages: int | Literal["auto"] = "auto",
        data_parallel_size: int = 1,
        # A `Schedule`, too; were that written here, LightningCLI would hand over what is in a file, not its path.
        schedule: str | Any = "continuous",
        num_microbatches: int = 1,
        split_points: list[str] | Literal["auto"] = "auto",
        memory_limit: str | int | None = None,
        versions: Literal["stash", "latest", "vertical", "2bw"] = "stash",
        remedy: str | None = None,
        extra_in_flight: int = 0,
        early_input_gradient: bool = False,
        clip: Clip = "lagged",
        cross_epoch: bool = True,
        exact_resume: bool = False,
        check: Check = "auto",
        looks: bool = True,
        load_on: LoadOn = "all",
        async_save: bool = False,
        save_distributed_checkpoint: bool = False,
        timeout: float = 60.0,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.words_folder: Path | None = None
        """Where a launcher looks for the last words of the ranks it started."""
        self.timeline = Timeline()
        """What this rank did when, in the run at hand or the last one; of further stages that it holds, see
        `timelines`."""
        self.timelines: dict[int, Timeline] = {}
        """By stage. What is the rank's, such as waiting for data and for decisions, is with its last stage."""
        self._options = Options(
            num_stages=num_stages,
            data_parallel_size=data_parallel_size,
            schedule=os.fspath(schedule) if isinstance(schedule, os.PathLike) else schedule,
            num_microbatches=num_microbatches,
            split_points=split_points,
            memory_limit=memory_limit,
            versions=versions,
            remedy=remedy,
            extra_in_flight=extra_in_flight,
            early_input_gradient=early_input_gradient,
            clip=clip,
            cross_epoch=cross_epoch,
            exact_resume=exact_resume,
            check=check,
            looks=looks,
            load_on=load_on,
            async_save=async_save,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )
        self._num_nodes = 1
        try:
            self._schedule = schedule_of(self._options)
        except PlanError:
            # It is refused when a run begins, with whatever else is.
            self._schedule = Continuous()
        self._options = sized(self._options, self._schedule)
        self._seed = 0
        self._stream: Stream | None = None
        self._evaluation_stream: Stream | None = None
        self._processes: Processes | None = None
        self._hearsay = self._hearsay_of_evaluations = Hearsay()
        self._at_hand: RunAtHand | None = None
        self._blueprint: Blueprint | None = None
        self._reader = Reader()
        self._undo: list[Callable[[], None]] = []
        """Leaves Lightning's objects as they were; called in reverse, each once."""
        self._stage_now = 0
        self._streaming = False
        self._signals: Signals | None = None
        self._whole_optimizer_states: list[State] = []
        self._norms: Norms = OfOneStage()

    # ---- who is who ----

    @property
    def num_ranks(self) -> int:
        """Processes of a pipeline."""
        return max(1, self.num_processes * self.num_nodes // max(1, self.num_replicas))

    @property
    def num_replicas(self) -> int:
        """Pipelines side by side."""
        return self._options.data_parallel_size

    @property
    def replica(self) -> int:
        """The pipeline that this rank belongs to; code that splits data itself goes by it."""
        return self.global_rank // self.num_ranks

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline; a rank holds one, or several."""
        if self._options.num_stages == "auto":
            return self.num_ranks * self._schedule.stages_per_rank
        return self._options.num_stages

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that this rank holds, in order."""
        return stages_of(self.global_rank, self._held)

    @property
    def stage(self) -> int:
        """The last stage that this rank holds."""
        return self.stages[-1]

    def named_stages_of(self, rank: int) -> str:
        """The stages that a rank holds, in words; rank 0 holds the last one."""
        return named_stages(rank, self._held, self.num_replicas)

    @property
    def _held(self) -> Held:
        return self.schedule.held(self.num_stages)

    @property
    def schedule(self) -> Schedule:
        """Who does what, when."""
        return self._schedule.on(self.num_stages, self.num_ranks)

    @property
    def at_hand(self) -> RunAtHand:
        """This rank's part of the run at hand."""
        if self._at_hand is None:
            raise RuntimeError("there is no run at hand: the strategy is set up by `trainer.fit` and the like.")
        return self._at_hand

    @property
    def stage_run(self) -> StageRun:
        """The stage, lanes and streams of this rank in the run at hand."""
        return self.at_hand.stage_run

    @property
    def processes(self) -> Processes:
        """This rank among the others."""
        if self._processes is None:
            raise RuntimeError("the ranks have not met yet: `trainer.fit` and the like bring them together.")
        return self._processes

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Ranks on this machine."""
        return len(self.parallel_devices or [])

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning should split the data between ranks: the stages of one pipeline all see the same."""
        return self.num_replicas > 1

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.num_replicas, "rank": self.replica}

    def set_world_ranks(self) -> None:
        """Tell Lightning which rank this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    # ---- from the Trainer's start to the first batch ----

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._options.start_method == "popen":
            self._launcher = ScriptLauncher(self, self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = ProcessLauncher(self, self._options.start_method)

    def refuse_early(self, trainer: pl.Trainer) -> None:
        """Refuse what can't run before any process is started.

        Raises:
            MisconfigurationException: with all reasons.
        """
        self._refuse(trainer, self.num_ranks, self.num_stages)
        most = self._schedule.given.num_ranks if isinstance(self._schedule, Given) else self.num_stages
        if self.num_ranks < most:
            rank_zero_info(
                f"{self.num_stages} stages on {self.num_ranks} devices: each holds {len(self._held[0])}."
                f" Set `devices={most * self.num_replicas}` to spread them; the numbers are the same."
            )

    def _refuse(self, trainer: pl.Trainer, num_ranks: int, num_stages: int) -> None:
        reasons = [
            *reasons_in_options(self._options, num_ranks, self.root_device),
            *reasons_in_replicas(self._options, self.num_processes * self.num_nodes, trainer.lightning_module),
            *reasons_in_plan(self._options, self.schedule, num_ranks, num_stages),
            *reasons_in_trainer(trainer, trainer.lightning_module, self._layer_sync, num_stages),
            *reasons_in_saving(self._options, trainer),
            *reasons_in_accumulation(trainer, self._schedule, num_stages),
        ]
        refuse(reasons)

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        install_loops(model.trainer, self)
        signals = self._signals = Signals(model.trainer)
        take_over_signals(
            model.trainer,
            on_sigterm=lambda: signals.ask(Request.TERMINATE, at_once=self.world_size == 1 or not self._streaming),
            on_requeue=lambda: signals.ask(Request.REQUEUE, at_once=False),
        )

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        if self._processes is None:
            self._processes = Processes(
                self.cluster_environment,
                self._held,
                self.root_device,
                self._options.process_group_backend,
                self.num_replicas,
                all_save=self._options.exact_resume,
            )
            if self._options.load_on == "ends":
                self._hearsay = Hearsay(*self._processes.batch_lane("batches"))
                self._hearsay_of_evaluations = Hearsay(*self._processes.batch_lane("eval_batches"))
        if self._shards:
            self._processes.connect_shards()
        self._processes.begin(self._options.timeout, self.words_folder)
        # What is drawn while data and module are set up is the same on all ranks, seeded or not.
        set_state(self._processes.control.share(get_state()))
        seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        self._seed = seed_of_replica(self._processes.control.share(seed), self.replica)

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        """`configure_model` runs inside; a module too big to be compared uncut has no weights yet afterwards."""
        if self.num_ranks == 1:
            yield
            return
        control, module = self.processes.control, self._module
        set_state(control.share(get_state()))
        kept_out = self.root_device.type == "cpu" and self._options.check != "full"
        if kept_out:
            # Before anything is made: how much that is will be known too late.
            keep_tensors_out_of_the_heap()
        blueprint = Blueprint(module, self._configure_model, self.root_device)
        failed: Exception | None = None
        try:
            with blueprint.drawn():
                yield
        except Exception as error:
            failed = error
        self._blueprint = agree_on_blueprint(module, blueprint, failed, control, self._options.check, kept_out)

    def _configure_model(self) -> None:
        """As Lightning does, with no thought of other ranks."""
        with self.tensor_init_context(), self.precision_plugin.module_init_context():
            self._module.configure_model()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._module
        fitting = trainer.state.fn == TrainerFn.FITTING
        make = CudaTimeline if self.root_device.type == "cuda" else Timeline
        schedule = self.schedule
        self.timelines = {
            stage: make(tell=partial(self._begin_span, stage), flows_on=schedule.streams) for stage in self.stages
        }
        self.timeline = self.timelines[self.stage]
        self._stream = Stream(get_state())
        if self.num_stages > 1:
            with seeded(derived_seed(self._seed, "data of evaluations")):
                self._evaluation_stream = Stream(get_state())
        if fitting:
            self._whole_optimizer_states = []
        self.precision_plugin.convert_module(module)
        blueprint, self._blueprint = self._blueprint, None
        with as_if_unfrozen(trainer):
            cut, in_parts = agree_on_cut(
                trainer, self.processes, self._options, schedule, self.root_device, self._seed, blueprint
            )
        if blueprint is not None:
            self.precision_plugin.convert_module(module)
        if fitting:
            self.setup_optimizers(trainer)
        whole: Whole | None = None
        if cut.num_stages > 1:
            # An evaluation has none; those of a fit before may still be here.
            optimizers = self.optimizers if fitting else []
            averages = Averages(trainer, module, cut, self.processes)
            whole = Whole(module, optimizers, cut, self.processes, averages, stays_in_parts=in_parts)
            whole.take_apart()
        self.model_to_device()
        self.setup_precision_plugin()
        if fitting:
            optimizers_to_device(self.optimizers, self.root_device)
        sums = sums_of(schedule, cut, self.precision_plugin) if fitting else {}
        ahead = self._lag if schedule.streams else self._options.num_microbatches
        lanes = self.processes.lanes(room_on_lanes(ahead), links_beside(schedule, cut, sums))
        modules = StageModule.of_rank(module, cut, self.stages, self.root_device)
        # What is decided goes from each rank's last stages to those of the next one, until all have heard.
        hands_on = self.global_rank % self.num_ranks < self.num_ranks - 1
        stage_run = StageRun(
            modules,
            lanes,
            self.timelines,
            self.root_device,
            hands_on=hands_on,
            counterparts=self.processes.counterparts,
        )
        steps = Steps(trainer, stage_run, self._seed, self.root_device, self.loads_data)
        assert self._signals is not None
        sharing = share(trainer, stage_run.decisions, self._signals, self.timeline, stage_run.pipelines)
        view, undo = view_of_hooks(), self._undo
        if whole is not None:
            undo += let_unfreeze(trainer, whole.in_groups) if fitting else []
            arrange_hooks(trainer, module, cut, sharing, view, self.processes, undo)
            undo += show_stages(trainer, module, cut, self.stages)
            undo += whole.averages.arrange(view, sharing, stage_run.follow)
        keeps = self._options.exact_resume and fitting
        pipeline = self.replica, self.num_replicas
        exact = ExactResume(trainer, stage_run, steps, schedule, self._evaluation_stream, *pipeline) if keeps else None
        writer = Writer(
            self.processes,
            whole,
            exact,
            partial(write_file, self.checkpoint_io),
            ahead=schedule.lag(0, self.num_stages) - schedule.lag(self.stage, self.num_stages),
            in_shards=self._shards,
            in_background=self._options.async_save,
        )
        if fitting and self.is_global_zero:
            undo += save_unhurried(trainer, writer.saves)
        self._at_hand = RunAtHand(stage_run, steps, sharing, whole, view, writer, undo, exact)
        if fitting:
            micro_batches = None if schedule.streams else self._options.num_microbatches
            with as_if_unfrozen(trainer):
                training = steps.begin_training(schedule, micro_batches, self._options.looks, sums, keep=keeps)
            precision, clip, device = self.precision_plugin, self._options.clip, self.root_device
            self._norms, further = agree_in_updates(
                module, whole, stage_run, self.processes, schedule, precision, clip, device
            )
            undo += further
            self._signals.heard_through(training.last.news)
            if stage_run.pipelines is not None:
                self._signals.heard_beyond(stage_run.pipelines)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        users_hook = self._module.configure_optimizers

        def configure_optimizers() -> Any:
            # Lightning would advise manual optimization for several of them.
            configured = users_hook()
            refuse(reasons_in_optimizers(configured))
            return configured

        undo = instead_of(self._module, "configure_optimizers", configure_optimizers)
        try:
            super().setup_optimizers(trainer)
        finally:
            undo()

    @override
    def model_to_device(self) -> None:
        self._module.to(self.root_device)

    # ---- what the loops ask ----

    @property
    def _lag(self) -> int:
        """How many mini-batches this rank forwards before its first backward: its first stage's."""
        return self._schedule.lag(self.stages[0], self.num_stages)

    def make_fetcher(self) -> LookaheadFetcher:
        """A fetcher for this rank."""
        trainer = self._module.trainer
        changes = any(isinstance(each, _CHANGES_AT_EPOCHS) for each in callbacks_of(trainer))
        # With one stage there is nothing to agree on: data is drawn as Lightning draws it, unless it must come again.
        several = self.num_stages > 1
        ahead = several and self._schedule.streams
        return LookaheadFetcher(
            trainer,
            lag=self._lag if ahead else 0,
            ahead=POSTED_AHEAD if ahead else 0,
            seed=self._seed,
            stream=self._stream if several or self._options.exact_resume else None,
            timeline=self.timeline,
            crosses_epochs=self._options.cross_epoch and ahead and not changes,
            loads=self.loads_data,
        )

    def begin_stream(self) -> None:
        """Training begins: from here on no rank waits for another one but for its messages."""
        self._streaming = True
        self.stage_run.follow()
        with as_if_unfrozen(self._module.trainer):
            self.stage_run.training.begin()
        if (exact := self.at_hand.exact) is not None:
            exact.begin_stream()

    def end_stream(self) -> None:
        """Training ends: bring what is in flight to rest, and let hooks at the end find all checkpoints."""
        self.stage_run.settle()
        self._hearsay.settle()
        self.at_hand.saves.finish()
        self.processes.control.barrier()
        self._streaming = False

    def after_step(self, output: dict[str, Any]) -> dict[str, Any]:
        """A local step's optimization is done: learn what the last stage logged, and the true loss."""
        return self.at_hand.sharing.after_step(self.at_hand.steps.output(output))

    def after_step_hooks(self) -> None:
        """A local step's hooks are done: agree on whether to stop."""
        self.at_hand.sharing.after_step_hooks()
        self.at_hand.saves.proceed()

    def after_whole_step(self) -> None:
        """A local step and what follows it are done: do what signals asked for."""
        assert self._signals is not None
        # What is saved for a job that is requeued must be there before it is.
        with self.at_hand.saves.hurried():
            self._signals.act()

    def obeying_signals(self) -> AbstractContextManager[None]:
        """A fit runs inside, which signals may end."""
        assert self._signals is not None
        return self._signals.obeyed(several=self.world_size > 1)

    def before_epoch(self) -> None:
        """An epoch begins, and its first hooks were called: the weights that are trained must be those of the cut."""
        self.at_hand.steps.require_same_trainable()
        self.stage_run.follow_freezing()

    def begin_epoch(self, resumed_at: int) -> None:
        """The loop goes on at batch `resumed_at` of its epoch, and no hook stands before it."""
        if (exact := self.at_hand.exact) is not None:
            exact.begin_epoch(resumed_at)

    def after_epoch(self) -> None:
        """An epoch's hooks are done: agree on whether to stop."""
        self.at_hand.sharing.metrics("end of epoch")

    def evaluating(self) -> AbstractContextManager[None]:
        """An evaluation runs inside."""
        return self.at_hand.steps.evaluating()

    def share_evaluation(self, outputs: list[dict[str, Any]]) -> None:
        """A loader of an evaluation is done: learn what the last stage logged for it."""
        self.at_hand.sharing.evaluation_of_loader(outputs)

    def share_returned(self, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """An evaluation is over: what it returns is what it returns on the last stage."""
        # Nobody gets what a validation inside a fit returns.
        inside_fit = self._module.trainer.state.fn == TrainerFn.FITTING
        return outputs if inside_fit else self.at_hand.sharing.returned(outputs)

    def after_evaluation(self) -> None:
        """An evaluation is computed, its end's hooks not yet called: learn the metrics."""
        self.at_hand.sharing.metrics("evaluation")

    # ---- data ----

    @property
    def loads_data(self) -> bool:
        """Whether this rank iterates the loaders; see `load_on`. Known from the first hook on."""
        return self._hearsay.loads

    def read(self, loader: CombinedLoader, *, training: bool) -> CombinedLoader:
        """The loaders of a loop, as this rank reads them."""
        if training:
            return self._hearsay.read(loader, nullcontext)
        return self._hearsay_of_evaluations.read(loader, self._evaluation_stream or nullcontext)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if not self.loads_data:
            return Unread(dataloader)
        # Lightning would seed the workers by the rank next, unless they are seeded already.
        seed_workers(dataloader, rank=self.replica)
        return super().process_dataloader(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        as_usual = super().batch_to_device
        return self.at_hand.steps.prepare(batch, lambda batch: as_usual(batch, device, dataloader_idx))

    # ---- steps ----

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.at_hand.steps.train()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        precision, steps = self.precision_plugin, self.at_hand.steps
        if self._has_no_gradient:
            # As in Lightning, without the hooks around a backward.
            steps.backward(closure_loss, lambda loss: None)
            steps.begin_update_if_due()
            return closure_loss
        loss = precision.pre_backward(closure_loss, self._module)
        steps.backward(loss, lambda loss: precision.backward(loss, self._module, optimizer, *args, **kwargs))
        loss = precision.post_backward(loss, self._module)
        steps.begin_update_if_due()
        return loss

    @property
    def _has_no_gradient(self) -> bool:
        """Whether the mini-batch at hand is left out; with pipelines side by side, another one may have a gradient."""
        return self.at_hand.steps.left_out and self.num_replicas == 1

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        steps = self.at_hand.steps

        def unless_left_out() -> Any:
            loss = closure()
            return None if self._has_no_gradient else loss

        # It runs inside a hook, and the closure inside of it.
        with self.at_hand.view.of_all(), steps.updating():
            return super().optimizer_step(optimizer, unless_left_out, model, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self.at_hand.steps.evaluate("validation_step", args)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self.at_hand.steps.evaluate("test_step", args)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self.at_hand.steps.evaluate("predict_step", args)

    # ---- what Lightning asks of all ranks ----

    @override
    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks; nothing while training streams, where each rank is in its own time."""
        self._require_heard()
        if not self._streaming and self._processes is not None:
            self._processes.control.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What rank 0 has, on every rank. While training streams, rank 0 does not wait for the others."""
        if src != 0:
            raise ValueError(f"broadcast(src={src}): in a pipeline, only rank 0 is ahead of all others.")
        self._require_heard()
        if self._streaming:
            if self.at_hand.steps.running and self.num_stages > 1:
                refuse_broadcast()
            return self.at_hand.sharing.agree("broadcast", obj)
        return obj if self._processes is None else self._processes.control.share(obj)

    def _require_heard(self) -> None:
        if self._at_hand is not None:
            self._at_hand.sharing.require_heard()

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Rank 0 decides: what the others see of metrics and files they have from there."""
        return bool(self.broadcast(decision))

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the ranks with the same stages of other pipelines; those of one pipeline hold parts of the same work."""
        self._before_exchange()
        return reduced(tensor, reduce_op, self.processes.counterparts)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """From the ranks with the same stages of other pipelines; those of one pipeline hold parts of the same work."""
        self._before_exchange()
        return gathered(tensor, self.processes.counterparts, sync_grads=sync_grads)

    def _before_exchange(self) -> None:
        if self._at_hand is not None:
            self._at_hand.sharing.before_exchange()

    # ---- checkpoints ----

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def _shards(self) -> bool:
        return self._options.save_distributed_checkpoint

    @property
    def _taken_apart(self) -> Whole | None:
        """This rank's share in the whole, where the whole is in parts that can be put together."""
        return None if self._at_hand is None or self._is_broken else self._at_hand.whole

    @override
    def lightning_module_state_dict(self) -> State:
        """On rank 0, that of the whole module, some of it promised; all ranks must call it, as Lightning does."""
        if (whole := self._taken_apart) is None:
            return super().lightning_module_state_dict()
        self.at_hand.sharing.before_collective()
        # A hook may save.
        with self.at_hand.view.of_all():
            return whole.own_state_dict() if self._shards else whole.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> State:
        """On rank 0, that of the whole module's optimizer, promised; all ranks must call it, as Lightning does."""
        if (whole := self._taken_apart) is not None and whole.has(optimizer):
            self.at_hand.sharing.before_collective()
            return whole.own_optimizer_state(optimizer) if self._shards else whole.optimizer_state(optimizer)
        if self._whole_optimizer_states and optimizer in self.optimizers:
            return self._whole_optimizer_states[self.optimizers.index(optimizer)]
        return super().optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: State, filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write one plain file of the whole module. What is in flight stays in flight, and no other rank waits."""
        if self._at_hand is not None and self._at_hand.whole is not None and self._is_broken:
            rank_zero_warn(
                f"no checkpoint at {filepath}, even where a callback says so next: the pipeline is broken, and each"
                " rank holds only its part. Files of earlier saves are as they were."
            )
            return
        if self._at_hand is not None:
            self._at_hand.writer.write(checkpoint, filepath, storage_options, at_once=not self._streaming)
        elif self.is_global_zero:
            write_file(self.checkpoint_io, checkpoint, filepath, storage_options)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Once the checkpoints that were saved before are written."""
        remove = partial(super().remove_checkpoint, filepath)
        if self._at_hand is None:
            remove()
        else:
            self.at_hand.saves.then(remove, filepath)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, *args: Any, **kwargs: Any) -> State:
        """What the file holds; of a module in parts, numbers are read where they are used."""
        as_usual = super().load_checkpoint
        return self._reader.read(checkpoint_path, self._taken_apart, self.checkpoint_io, as_usual, *args, **kwargs)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if (whole := self.at_hand.whole) is None:
            super().load_model_state_dict(checkpoint, strict)
        else:
            with self._reader.copying():
                whole.load_module(checkpoint["state_dict"], strict)
            self.stage_run.follow()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        whole = self.at_hand.whole
        with self._reader.copying():
            own = states if whole is None else whole.own_optimizer_states(states)
        super().load_optimizer_state_dict({"optimizer_states": own})
        if self.at_hand.exact is not None:
            self.at_hand.exact.hear(checkpoint)

    # ---- what callbacks show ----

    def full_grad_norm(self) -> Tensor:
        """The norm of the gradients of all stages, accumulated and not clipped, as far as it is known without waiting.

        With flush schedules, and with one stage, it is exact. With the continuous schedule it is of this update for
        this rank's last stage and those after it, and for a stage before them of an earlier update, further back for
        each stage on the way; at first, of those that are known. So on rank 0 all but its own are older.

        All ranks must ask in the same updates. The answer is kept until the next one, clipped or not.

        Returns:
            A scalar on the rank's device.

        Raises:
            RuntimeError: if the gradients are not complete, which they are from `on_before_optimizer_step` on.
        """
        self._require_heard()
        self.at_hand.steps.require_complete_gradients()
        (optimizer,) = self.optimizers
        return self._norms.full(optimizer)

    def tell_figures(self, every_n_steps: int) -> None:
        """Let rank 0 know the figures of all stages, once in `every_n_steps` of the trainer's steps.

        All ranks must call it, after a checkpoint was restored and before the first step, as in `on_train_start`.
        """
        begun = self._module.trainer.fit_loop.total_batch_idx + 1
        # Micro-batches are counted through the run; the first one of a mini-batch tells.
        most = self._options.num_microbatches
        for stage in self.stage_run.training.stages.values():
            stage.news.tells_figures = lambda number: (
                number % most == 0 and (begun + number // most + 1) % every_n_steps == 0
            )

    def stage_figures(self) -> dict[int, StageFigures]:
        """The figures of all stages on rank 0, as last told (see `tell_figures`); elsewhere, of the stages so far."""
        training = self.stage_run.training
        told = {stage: each for own in training.stages.values() for stage, each in own.news.figures.items()}
        return {**told, **{stage: each.news.books.figures() for stage, each in training.stages.items()}}

    def promised_delay(self, stage: int) -> int:
        """How many updates old a stage's gradient is in the steady state, by the plan.

        With ``versions="latest"``, that of its forward.
        """
        schedule = accumulating(self._schedule, self._module.trainer.accumulate_grad_batches)
        return schedule.most_delay(stage, self.num_stages)

    def promised_idle_ratio(self, num_batches: int, *, drained: bool) -> float:
        """Share of the slots that the plan leaves idle.

        Args:
            num_batches: mini-batches that the last stage has backwarded; of a flush schedule each is alike.
            drained: whether the run has ended.
        """
        schedule = self.schedule
        if isinstance(schedule, Continuous):
            return schedule.idle_ratio(self.num_stages, num_batches, drained=drained)
        return schedule.slot_exact_ratio(self.num_stages, self._options.num_microbatches)

    @property
    def promised_evaluation_idle_slots(self) -> int | None:
        """Slots that an evaluation makes each rank wait, by the plan; None for flush schedules, which wait anyway.

        The first rank comes to it p - 1 slots after the last one, which gets its first mini-batch p - 1 slots later
        still; a rank that waits less for that waits the more for the next gradient.
        """
        return 2 * (self.num_ranks - 1) if self.schedule.streams else None

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one forward of the first batch, all stages together, as counted at set-up.

        Counted on the first micro-batch, where there are some.
        """
        return self.stage_run.cut.forward_flops * self._options.num_microbatches

    def collect_timelines(self) -> dict[int, tuple[list[Span], StageFigures]]:
        """On rank 0, spans and figures of all stages, of several pipelines the first one's.

        All ranks must call it, and training must have ended.
        """
        mine: dict[int, tuple[list[Span], StageFigures]] = {}
        for stage, timeline in self.timelines.items():
            timeline.settle()
            mine[stage] = timeline.spans, self.stage_run.training.stages[stage].news.books.figures()
        return {stage: each for theirs in self.processes.collect(lambda: mine) for stage, each in theirs.items()}

    # ---- the end ----

    @property
    def _interrupted(self) -> bool:
        module = self.lightning_module
        return module is not None and module.trainer.state.status == TrainerStatus.INTERRUPTED

    @property
    def _has_ended_together(self) -> bool:
        """Whether a signal has ended the run, on all ranks after the same step."""
        return self._signals is not None and self._signals.ended_together

    @property
    def _is_broken(self) -> bool:
        """Whether the other ranks can't be counted on any more."""
        return self._interrupted and not self._has_ended_together

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Agree with the other ranks on the first cause, and say it."""
        if self._has_ended_together and self._at_hand is not None:
            # Callbacks have saved, and loggers end next.
            self._at_hand.saves.finish()
        if self._has_ended_together and isinstance(self._launcher, ScriptLauncher):
            return
        if self._processes is not None:
            children = self._launcher.procs if isinstance(self._launcher, ScriptLauncher) else []
            self._processes.fail(exception, self._where, children)

    def _begin_span(self, stage: int, batch: int) -> None:
        self._stage_now = stage
        self.processes.at(batch)

    @property
    def _where(self) -> str:
        """What this rank is doing."""
        timeline = self.timelines.get(self._stage_now, self.timeline)
        if timeline.now_at is None:
            return "during set-up"
        kind, batch = timeline.now_at
        action = f", in {Action(ACTIONS[kind], batch, self._stage_now)}" if kind in ACTIONS else ""
        return f"at {self._schedule.unit} {batch}{action}"

    @override
    def teardown(self) -> None:
        """Make the module whole again, unless it is too big for that, and let go of the other ranks."""
        if self._at_hand is not None:
            self._at_hand.saves.break_off() if self._is_broken else self._at_hand.saves.finish()
        if self._at_hand is not None and self._is_broken:
            self._at_hand.break_off()
        elif self._at_hand is not None and self._interrupted:
            self.end_stream()
            self._at_hand.stop()
        elif self._at_hand is not None and (states := self._at_hand.end()) is not None:
            self._whole_optimizer_states = states
        self._at_hand = None
        while self._undo:
            # A set-up failed.
            self._undo.pop()()
        self._streaming = False
        if self._processes is not None and not self._is_broken:
            self._processes.end()
            if isinstance(self._launcher, ScriptLauncher):
                self._launcher.run_is_over()
        optimizers_to_device(self.optimizers, torch.device("cpu"))
        if self.lightning_module is not None:
            self.lightning_module.cpu()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, start_method in (
            ("continuous_pipe", "popen"),
            ("continuous_pipe_spawn", "spawn"),
            ("continuous_pipe_fork", "fork"),
            ("continuous_pipe_notebook", "fork"),
        ):
            if name not in strategy_registry:
                strategy_registry.register(
                    name,
                    cls,
                    description=f"ContinuousPipe: a pipeline that is never flushed, `start_method` {start_method!r}",
                    start_method=start_method,
                )
