"""Lightning's door to the pipeline: translates hooks into calls of the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_cpipe.engine.decisions import Decisions
from lightning_cpipe.engine.evaluation import EvaluationStream
from lightning_cpipe.engine.mini_batch import MiniBatch
from lightning_cpipe.engine.timeline import CudaTimeline, Timeline
from lightning_cpipe.engine.training import STEP, Neighbours, TrainingStream
from lightning_cpipe.errors import CutError, DataMismatchError, RankLostError
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.transfers import POSTED_AHEAD
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.stage.probe import Check
from lightning_cpipe.stage.randomness import Stream, derived_seed, get_state, seeded, set_state
from lightning_cpipe.stage.replay import Replay
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.stage.weights import fill, held_by, keep_only, make_room
from lightning_cpipe.strategy.fetcher import Drawn, LookaheadFetcher, Released
from lightning_cpipe.strategy.lightning_private import (
    MultiProcessingLauncher,
    SubprocessScriptLauncher,
    as_of,
    default_backend_for,
    init_dist_connection,
    instead_of,
    optimizers_to_device,
    prepare_batch,
    training_arguments,
    updates_after_this_batch,
)
from lightning_cpipe.strategy.loops import PipelineEvaluationLoop, install_loops
from lightning_cpipe.strategy.probing import evaluation_probe_step, find_cut, training_probe_step
from lightning_cpipe.strategy.refusals import clips_by_norm, reasons_before_set_up, reasons_in_optimizers, refuse
from lightning_cpipe.strategy.sharing import Sharing
from lightning_cpipe.transport.records import Records
from lightning_cpipe.transport.wiring import Lanes, Wiring

Content = TypeVar("Content")


class ContinuousPipeStrategy(ParallelStrategy):
    """prototype"""

    strategy_name = "continuous_pipe"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        num_stages: int | Literal["auto"] = "auto",
        data_parallel_size: int = 1,
        schedule: str = "continuous",
        split_points: Literal["auto"] | list[str] = "auto",
        versions: Literal["stash"] = "stash",
        extra_in_flight: int = 0,
        cross_epoch: bool = True,
        check: Check = "auto",
        timeout: float = 60.0,
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        self._num_stages_asked = num_stages
        self._split_points = split_points
        self._extra = extra_in_flight
        self._cross_epoch = cross_epoch
        self._check: Check = check
        self._backend = process_group_backend
        self._start_method = start_method
        self._num_nodes = 1
        self._streaming = False
        self._wiring: Wiring | None = None
        self.timeline = Timeline()
        self.training: TrainingStream | None = None
        self.sharing: Sharing | None = None
        self._undo: list[Callable[[], None]] = []
        self._evaluations = 0
        self.is_distributed = False

    # topology
    @property
    def num_stages(self) -> int:
        return self.world_size

    @property
    def stage(self) -> int:
        return self.num_stages - 1 - self.global_rank

    @property
    @override
    def root_device(self) -> torch.device:
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, n: int) -> None:
        self._num_nodes = n

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices or [])

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}

    def set_world_ranks(self) -> None:
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank
        from lightning.fabric.utilities.rank_zero import rank_zero_only as f

        f.rank = self.global_rank

    @override
    def _configure_launcher(self) -> None:
        if self._start_method == "popen":
            self._launcher = SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = MultiProcessingLauncher(self, start_method=self._start_method)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        self._backend = self._backend or default_backend_for(self.root_device)
        init_dist_connection(self.cluster_environment, self._backend)
        if self._wiring is None:
            self._control = dist.new_group(backend="gloo")
            ranks = [self.num_stages - 1 - s for s in range(self.num_stages)]
            self._wiring = Wiring(ranks, self.stage, self.root_device, self._backend)
        # everyone starts from rank 0's generators
        state = [get_state()]
        dist.broadcast_object_list(state, 0, group=self._control)
        set_state(state[0])

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        install_loops(model.trainer, self)

    def make_fetcher(self) -> LookaheadFetcher:
        lag = self.schedule.lag(self.stage, self.num_stages)
        several = self.num_stages > 1
        return LookaheadFetcher(
            self.lightning_module.trainer, lag, POSTED_AHEAD if several else 0, self.seed,
            self._stream if several else nullcontext, self.timeline, self._cross_epoch,
        )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self.accelerator.setup(trainer)
        module = self.lightning_module
        fitting = trainer.state.fn == TrainerFn.FITTING
        self.schedule = Continuous(extra_in_flight=self._extra)
        seed = [int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))]
        dist.broadcast_object_list(seed, 0, group=self._control)
        self.seed = seed[0]
        self._stream = Stream(get_state())
        self.precision_plugin.convert_module(module)
        make_room(module)
        for t in [*module.parameters(), *module.buffers()]:
            dist.broadcast(t.data, 0, group=self._control)
        if self.is_global_zero:
            self.model_to_device()
        drawn = None
        steps = []
        if fitting:
            trainer.fit_loop.setup_data()
            drawn = trainer.fit_loop._data_fetcher.peek()
            prints = [None] * self.num_stages
            dist.all_gather_object(prints, None if drawn is None else drawn.fingerprint, group=self._control)
            if len(set(prints)) > 1:
                raise DataMismatchError(f"loaders differ {prints}")
            steps.append(training_probe_step(module, drawn, self.root_device, self.seed))
            val = None if not trainer.enable_validation else evaluation_probe_step(module, trainer.fit_loop.epoch_loop.val_loop, "validation_step", self.root_device, self.seed)
            if val:
                steps.append(val)
        else:
            name = {TrainerFn.VALIDATING: "validation_step", TrainerFn.TESTING: "test_step", TrainerFn.PREDICTING: "predict_step"}[trainer.state.fn]
            loop = {TrainerFn.VALIDATING: trainer.validate_loop, TrainerFn.TESTING: trainer.test_loop, TrainerFn.PREDICTING: trainer.predict_loop}[trainer.state.fn]
            steps.append(evaluation_probe_step(module, loop, name, self.root_device, self.seed))
        cut: list[Any] = [None]
        if self.is_global_zero:
            cut = [find_cut(module, steps, self.num_stages, self._split_points, self.root_device, self._check)]
        dist.broadcast_object_list(cut, 0, group=self._control)
        self.cut: Cut = cut[0]
        if fitting:
            self.setup_optimizers(trainer)
        keep_only(module, self.cut, self.stage)
        own = {id(p) for p in module.parameters() if not p.is_meta}
        for opt in self.optimizers:
            for g in opt.param_groups:
                g["params"] = [p for p in g["params"] if id(p) in own]
        self.model_to_device()
        self.setup_precision_plugin()
        if fitting:
            optimizers_to_device(self.optimizers, self.root_device)
        passages = {n: c.passages[self.stage] for n, c in self.cut.steps.items()}
        later = {s for c in self.cut.steps.values() for p in c.passages[self.stage + 1 :] for s in p.stubs}
        self.replay = Replay(module, passages, self.root_device, later)
        self.isolation = Isolation(module, self.cut.draws)
        self.lanes: Lanes = self._wiring.lanes(in_flight=self.schedule.lag(self.stage, self.num_stages) + 6)
        i, o = self.lanes.incoming, self.lanes.outgoing

        def rec(lane, d, receives):
            return Records(d[lane], receives=receives) if lane in d else None

        self.decisions = Decisions(rec("decisions", i, True), rec("decisions", o, False))
        self.sharing = Sharing(trainer, self.decisions)
        self._eval_in, self._eval_out = rec("eval_records", i, True), rec("eval_records", o, False)
        self.evaluations = {
            n: EvaluationStream(n, self.stage, c, self.replay, self.isolation, i.get("eval_activations"), o.get("eval_activations"), self._eval_in, self._eval_out, self.timeline)
            for n, c in self.cut.steps.items() if n != STEP
        }
        if not self.sharing.leads:
            self._undo.append(instead_of(module, "log", lambda *a, **k: None))
        for m in module.modules():
            if isinstance(m, Metric):
                m.distributed_available_fn = lambda: False
        if fitting:
            self.versions = Versions(p for p in module.parameters() if p.requires_grad and not p.is_meta)
            self.training = TrainingStream(
                self.stage, self.num_stages, self.schedule, self.cut.steps[STEP], self.replay, self.isolation, self.versions,
                Neighbours(i.get("activations"), o.get("activations"), i.get("gradients"), o.get("gradients"), rec("records", i, True), rec("records", o, False)),
                self.timeline, trainer.fit_loop._data_fetcher, self._run_training_step,
            )

    @override
    def model_to_device(self) -> None:
        self.lightning_module.to(self.root_device)

    # loops' questions
    def begin_stream(self) -> None:
        self._streaming = True

    def end_stream(self) -> None:
        self._streaming = False

    def after_step(self, output: dict[str, Any]) -> None:
        if self.num_stages > 1:
            self.sharing.after_step(output)

    def after_step_hooks(self) -> None:
        if self.num_stages > 1:
            self.sharing.after_step_hooks()

    def after_epoch(self) -> None:
        if self.num_stages > 1:
            self.sharing.metrics("epoch")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._evaluations += 1
        self._eval_count = 0
        with seeded(derived_seed(self.seed, "evaluation", self._evaluations)) if self.num_stages > 1 else nullcontext():
            yield

    def share_evaluation(self, outputs: list[dict[str, Any]]) -> None:
        pass

    def after_evaluation(self) -> None:
        if self.num_stages > 1:
            self.sharing.metrics("evaluation")

    # steps
    def _run_training_step(self, mini_batch: MiniBatch) -> Any:
        drawn: Drawn = mini_batch
        module = self.lightning_module
        trainer = module.trainer
        batch = self._prepared(drawn)
        loop_as_of = trainer.fit_loop.epoch_loop.as_of
        before, loop_as_of.global_step = loop_as_of.global_step, drawn.global_step
        try:
            with as_of(trainer, drawn.epoch), self.precision_plugin.train_step_context():
                return module.training_step(*training_arguments(trainer, batch, drawn.index))
        finally:
            loop_as_of.global_step = before

    def _prepared(self, drawn: Drawn) -> Any:
        if not drawn.prepared:
            drawn.prepared.append(prepare_batch(self.lightning_module, drawn.batch, self.root_device))
        return drawn.prepared[0]

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, Released):
            return self._prepared(batch.drawn)
        return super().batch_to_device(batch, device, dataloader_idx)

    @property
    def _at(self) -> Drawn:
        return self.lightning_module.trainer.fit_loop._data_fetcher.released

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        work = self.training.forward_until(self._at.number)
        if self.training.is_last:
            return work.returned
        return torch.zeros((), device=self.root_device, requires_grad=True)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        module = self.lightning_module
        number = self._at.number
        loss = self.precision_plugin.pre_backward(closure_loss, module)
        run = (lambda: self.precision_plugin.backward(loss, module, optimizer, *args, **kwargs)) if self.training.is_last else None
        self.training.backward(number, run)
        loss = self.precision_plugin.post_backward(loss, module)
        if updates_after_this_batch(module.trainer):
            self.training.begin_update(number)
        return loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        with self.versions.updating():
            out = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.training.end_update()
        return out

    def _evaluate(self, name: str, *args: Any) -> Any:
        module = self.lightning_module
        n = self._eval_count
        self._eval_count += 1
        step = getattr(module, name)
        return self.evaluations[name].run(args[0], n, derived_seed(self.seed, name, n), lambda: step(*args))

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._evaluate("validation_step", *args)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._evaluate("test_step", *args)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._evaluate("predict_step", *args)

    # collectives
    @override
    def barrier(self, name: str | None = None) -> None:
        if not self._streaming:
            dist.barrier(group=self._control)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._streaming:
            return self.sharing.agree("broadcast", obj)
        box = [obj]
        dist.broadcast_object_list(box, src, group=self._control)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return self.broadcast(decision)

    @override
    def teardown(self) -> None:
        for u in self._undo:
            u()
        self._undo.clear()
        if hasattr(self, 'replay') and self.lightning_module.trainer.state.status != TrainerStatus.INTERRUPTED:
            self.replay.remove()
            self.isolation.remove()
            module = self.lightning_module
            mine = {n: t.detach().cpu() for n, t in held_by(module, self.cut, self.stage).items()}
            box = [None] * self.num_stages if self.is_global_zero else None
            dist.gather_object(mine, box, 0, group=self._control)
            module.cpu()
            if self.is_global_zero:
                make_room(module, self.cut, self.stage)
                for part in box:
                    fill(module, part)
            dist.barrier(group=self._control)
        optimizers_to_device(self.optimizers, torch.device("cpu"))
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
        self.cluster_environment.teardown()
