"""What can't work, or not yet, is refused at set-up: all reasons at once, each with its numbers and a way out."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.flushed import GPipe
from lightning_cpipe.schedules.policies import TWO_BUFFERED
from lightning_cpipe.strategy.options import Options
from lightning_cpipe.strategy.setup.refusals import (
    LATER,
    reasons_in_accumulation,
    reasons_in_optimizers,
    reasons_in_options,
)
from tests.helpers.causes import cause
from tests.helpers.fits import quiet_trainer
from tests.helpers.modules import Chain, noise_loader

# What is refused; what the sentence says: the numbers, and what to do; whether a later version will do it.
OPTIONS = [
    ({"data_parallel_size": 0}, ["data_parallel_size=0", "the least is 1"], False),
    ({"data_parallel_size": 3}, ["data_parallel_size=3 with 2 devices", "`devices`", "a multiple of 3"], False),
    ({"data_parallel_size": 2}, ["data_parallel_size=2 with one stage", "strategy='ddp', or more devices"], False),
    ({"num_stages": 3}, ["num_stages=3 on 2 devices", "a multiple of 2", "`devices=1`"], False),
    ({"num_stages": 1}, ["num_stages=1 on 2 devices", "a divisor of it"], False),
    ({"num_stages": 0}, ["num_stages=0", "the least is 1"], False),
    ({"schedule": "own.csv"}, ["schedule='own.csv'", "the plan 'own.csv' can't be read: No such file"], False),
    ({"schedule": "zigzag"}, ["schedule='zigzag'", "there are: continuous, gpipe, 1f1b, inter"], False),
    ({"schedule": Continuous()}, ["schedule=Continuous(…)", "by name", "schedule='continuous'"], False),
    ({"schedule": GPipe}, ["schedule=<class", "give a name, the path of a plan", "an object of"], False),
    (
        {"num_microbatches": 4},
        ["num_microbatches=4", "whole mini-batches", "'1f1b', 'gpipe', 'interleaved' or 'zb'"],
        False,
    ),
    ({"schedule": "1f1b", "num_microbatches": "4"}, ["num_microbatches='4'", "a whole number"], False),
    ({"schedule": "1f1b", "num_microbatches": 2.5}, ["num_microbatches=2.5", "a whole number"], False),
    ({"schedule": Path("own.csv")}, ["schedule='own.csv'", "the plan 'own.csv' can't be read: No such file"], False),
    ({"schedule": "1f1b", "num_microbatches": 0}, ["num_microbatches=0", "the least is 1"], False),
    ({"schedule": "gpipe", "versions": "latest"}, ["versions='latest'", "'gpipe'", "Leave it out"], False),
    ({"schedule": "1f1b", "extra_in_flight": 1}, ["extra_in_flight=1", "'1f1b'", "Leave it out"], False),
    ({"schedule": "gpipe", "early_input_gradient": True}, ["early_input_gradient=True", "'gpipe'", "'zb'"], False),
    ({"versions": "newest"}, ["versions='newest'", "there are 'stash', 'latest', 'vertical', '2bw'"], False),
    ({"versions": TWO_BUFFERED}, ["versions=VersionPolicy(name='2bw')", "there are 'stash'"], False),
    ({"versions": "latest", "exact_resume": True}, ["exact_resume=True with versions='latest'", "'stash'"], False),
    ({"remedy": "spectrain"}, ["remedy='spectrain'"], True),
    ({"extra_in_flight": -1}, ["extra_in_flight=-1", "the least is 0"], False),
    ({"clip": "global"}, ["clip='global'", "there are 'stage', 'suffix', 'lagged'"], False),
    ({"schedule": "1f1b", "clip": "stage"}, ["clip='stage'", "'1f1b'", "Leave it out"], False),
    ({"split_points": "net.2"}, ["split_points='net.2'", "give 'auto', or a list of the modules"], False),
    ({"memory_limit": "much"}, ["memory_limit='much'", "no amount of memory", "write '16GB'"], False),
    ({"memory_limit": -1}, ["memory_limit=-1", "a number of bytes"], False),
    ({"check": "zigzag"}, ["check='zigzag'", "there are 'auto', 'full', 'fills'"], False),
    ({"timeout": 0}, ["timeout=0", "must be more than 0"], False),
]


class Normed(Chain):
    """Keeps statistics of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)


class Manual(Normed):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TakesIterator(Chain):
    """Draws its batches itself."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> torch.Tensor:  # type: ignore[override]
        return self.loss(next(dataloader_iter)[0])


class ValidatesIterator(Chain):
    def validation_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        next(dataloader_iter)


class Watched(Chain):
    """As W&B leaves a module that it watches."""

    def __init__(self) -> None:
        super().__init__()
        self._wandb_hook_names = ["parameters/"]


TRAINERS: list[Any] = [
    (Manual, dict, ["automatic_optimization=False", "Let `training_step` return the loss"], False),
    (
        Watched,
        dict,
        ["`WandbLogger.watch(module)`", "Leave it out", "`trainer.strategy.full_grad_norm()`"],
        False,
    ),
    (TakesIterator, dict, ["dataloader_iter", "take `batch` and `batch_idx`"], False),
    (ValidatesIterator, dict, ["`validation_step(self, dataloader_iter)`", "take `batch` and `batch_idx`"], False),
    (
        Chain,
        lambda: {"callbacks": [ModelPruning("l1_unstructured")]},
        ["ModelPruning", "other names", "torch.nn.utils.prune"],
        False,
    ),
    (Chain, lambda: {"callbacks": [BatchSizeFinder()]}, ["BatchSizeFinder", "runs out", "`cpipe plan`"], False),
    (Chain, lambda: {"sync_batchnorm": True}, ["sync_batchnorm=True", "nothing to synchronise", "Leave it out"], False),
    (
        Normed,
        lambda: {"callbacks": [StochasticWeightAveraging(0.01)]},
        ["StochasticWeightAveraging of a module with BatchNorm", "forwards without backwards", "`WeightAveraging`"],
        False,
    ),
]


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting one is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


def refused(module: pl.LightningModule, strategy: dict[str, Any], **options: Any) -> list[str]:
    """The reasons that a fit on two devices is refused for."""
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(**strategy), devices=2, max_epochs=1, **options)
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(module, noise_loader())
    head, *reasons = str(caught.value).split("\n  - ")
    assert head == "strategy='continuous_pipe' can't run this:"
    return reasons


def require_said(reason: str, parts: list[str], later: bool) -> None:
    assert not [part for part in parts if part not in reason], reason
    assert reason.endswith(LATER) == later
    assert reason.endswith((".", "…"))


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("start_method", ["popen", "fork", "spawn"])
@pytest.mark.parametrize(("options", "parts", "later"), OPTIONS, ids=lambda each: str(each) if each else "")
def test_an_option_is_refused_before_any_process_is_started(
    options: dict[str, Any], parts: list[str], later: bool, start_method: str
) -> None:
    (reason,) = refused(Chain(), {**options, "start_method": start_method})
    require_said(reason, parts, later)


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(("module", "options", "parts", "later"), TRAINERS)
def test_a_module_or_a_flag_is_refused_before_any_process_is_started(
    module: type[Chain], options: Callable[[], dict[str, Any]], parts: list[str], later: bool
) -> None:
    (reason,) = refused(module(), {}, **options())
    require_said(reason, parts, later)


TOO_FEW = [
    ({"accumulate_grad_batches": 1}, 1),
    ({"callbacks": [GradientAccumulationScheduler({0: 4, 2: 2})]}, 2),
]


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(("options", "number"), TOO_FEW)
def test_2bw_is_refused_where_too_few_mini_batches_share_an_update(options: dict[str, Any], number: int) -> None:
    (reason,) = refused(Chain(), {"versions": "2bw", "extra_in_flight": 2}, **options)
    parts = [f"versions='2bw' with accumulate_grad_batches={number}", "at least 3", "stage 0 of 2"]
    require_said(reason, [*parts, "Set accumulate_grad_batches=3 or more"], later=False)


@pytest.mark.parametrize(("number", "p"), [(3, 4), (1, 2), (1, 1)])
def test_2bw_runs_from_as_many_on_as_stage_0_is_ahead(number: int, p: int) -> None:
    trainer = quiet_trainer(accumulate_grad_batches=number)
    trainer.training = True
    schedule = Continuous(versions=TWO_BUFFERED)
    assert list(reasons_in_accumulation(trainer, schedule, p)) == []
    assert len(list(reasons_in_accumulation(trainer, schedule, number + 2))) == 1


class OfParts(Chain):
    """Is given its parts, and counts them among its hyperparameters."""

    def __init__(self, net: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net, self.criterion = net, criterion


@pytest.mark.usefixtures("no_processes")
@pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`:UserWarning")
def test_parts_among_the_hyperparameters_are_refused_before_any_process_is_started() -> None:
    """A checkpoint would hold them without the weights of other stages: the run ended at its first one."""
    module = OfParts(Chain().net, torch.nn.MSELoss())
    (reason,) = refused(module, {}, enable_checkpointing=True)
    require_said(reason, ["modules with weights (net)", "`self.save_hyperparameters(ignore=['net'])`"], later=False)


@pytest.mark.usefixtures("no_processes")
def test_all_reasons_are_listed_at_once() -> None:
    together: dict[str, Any] = {}
    said: list[list[str]] = []
    for options, parts, _ in OPTIONS:
        if options.keys().isdisjoint(together):
            together |= options
            said.append(parts)
    flags: dict[str, Any] = {"callbacks": []}
    for _, options, _, _ in TRAINERS:
        flags["callbacks"] += options().get("callbacks", [])
        flags |= {key: value for key, value in options().items() if key != "callbacks"}
    others = TakesIterator, ValidatesIterator, Watched
    said += [parts for module, _, parts, _ in TRAINERS if module not in others]
    reasons = refused(Manual(), together, **flags)
    assert len(reasons) == len(said) == 17
    assert all(any(all(part in reason for part in parts) for reason in reasons) for parts in said)


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_options_are_refused_without_training_too_but_not_what_only_training_needs(entry: str) -> None:
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(schedule="zigzag"), devices=2)
    with pytest.raises(MisconfigurationException) as caught:
        getattr(trainer, entry)(Manual(), noise_loader())
    assert "zigzag" in str(caught.value)
    assert "automatic_optimization" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "backend", "refused"),
    [
        ("cuda", "gloo", True),
        ("cuda", "nccl", False),
        ("cuda", None, False),
        ("cpu", "gloo", False),
        ("cpu", None, False),
    ],
)
def test_gloo_is_refused_for_gpus(device: str, backend: str | None, refused: bool) -> None:
    """Its sends and receives would hold up the process until the GPU is done."""
    asked = Options(process_group_backend=backend)
    reasons = list(reasons_in_options(asked, 2, torch.device(device)))
    assert [reason.partition(":")[0] for reason in reasons] == ["process_group_backend='gloo'"] * refused


def test_16_mixed_by_its_name_is_bf16_mixed_on_a_cpu() -> None:
    """So says Lightning, which is why tests of it need an instance."""
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(), devices=2, precision="16-mixed")
    assert trainer.precision_plugin.precision == "bf16-mixed"


# The rest is known only once the ranks have met: data, optimizers and the module itself.


class Lbfgs(Chain):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


class SeveralOptimizers(Chain):
    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [SGD(block.parameters(), 0.1) for block in self.net]


class BuiltByRank(Chain):
    """Each rank makes blocks of its own."""

    def configure_model(self) -> None:
        self.net.extend(Chain(1).net[0] for _ in range(self.trainer.global_rank))


class Differing(pl.LightningDataModule):
    """Each rank has data of its own."""

    def train_dataloader(self) -> Any:
        return noise_loader(seed=int(os.environ["LOCAL_RANK"]))


@pytest.mark.parametrize(
    ("devices", "module", "strategy", "parts"),
    [
        (5, Chain, {}, ["CutError", "5 stages", "Chain has 4", "net.0, net.1, net.2, net.3", "Lower `devices`"]),
        (2, Chain, {"split_points": ["net.9"]}, ["CutError", "does not have: net.9", "could begin: net.0, net.1"]),
        (3, Chain, {"split_points": ["net.2"]}, ["CutError", "3 stages", "2 split points", "has 1"]),
        (3, Chain, {"split_points": ["net.3", "net.1"]}, ["CutError", "net.3, net.1", "Reorder `split_points`"]),
        (2, BuiltByRank, {}, ["CutError", "`configure_model`", "built another module", "on another rank"]),
        (2, Lbfgs, {}, ["MisconfigurationException", "LBFGS", "Use a first-order optimizer"]),
    ],
)  # fmt: skip
def test_what_only_the_ranks_can_find_out_is_refused_at_set_up(
    devices: int, module: type[Chain], strategy: dict[str, Any], parts: list[str]
) -> None:
    said = cause(devices, module(), **strategy)
    assert not [part for part in parts if part not in said], said


def test_a_loader_that_differs_between_ranks_is_refused_before_the_first_step() -> None:
    said = cause(2, Chain(), Differing())
    for part in ("DataMismatchError", "rank 0 and rank 1 drew different first batches", "seed_everything"):
        assert part in said


class BeginsLater(Chain):
    """From its fourth step on, the first block's output counts once more."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        first = self.net[0](x)
        out = self.net[3](self.net[2](self.net[1](first)))
        if batch_idx >= 3:
            out = out + first
        return torch.nn.functional.mse_loss(out, y)


def test_what_counts_only_in_a_later_step_is_refused_there() -> None:
    """It trained on with zeros in place of what was not sent, and nobody was told."""
    said = cause(2, BeginsLater(), where="at mini-batch 3", split_points=["net.2"])
    for part in ("CutError", "the output of 'net.0' gets a gradient on a later stage", "multiplied by a weight"):
        assert part in said


class UnfreezesLater(Chain):
    """Freezes its first block, and lets it go in the second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)


def test_what_was_frozen_when_the_module_was_cut_stays_so() -> None:
    """Earlier stages would get no gradient, and nothing would say so."""
    said = cause(2, UnfreezesLater(), epochs=2, where="at mini-batch")
    for part in ("`requires_grad` of 4 parameters changed", "'net.0.norm.weight'", "`BaseFinetuning`", "fit again"):
        assert part in said


class Broadcasts(Chain):
    """From a certain mini-batch on; the set-up looks at the first one only."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first = first

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx >= self.first:
            self.trainer.strategy.broadcast("anything")
        return loss


def test_a_broadcast_in_a_step_is_refused() -> None:
    """It waited for ever."""
    for part in ("`broadcast` inside a step", "Broadcast in a hook", "on_train_batch_start"):
        assert part in cause(2, Broadcasts())
        assert part in cause(2, Broadcasts(first=5), where="at mini-batch 5")


def test_several_optimizers_are_refused_with_our_words() -> None:
    said = cause(2, SeveralOptimizers())
    assert "4 optimizers: use one with several parameter groups" in said


def test_all_reasons_in_optimizers_are_listed() -> None:
    parameters = list(Chain().parameters())
    optimizers = [torch.optim.LBFGS(parameters), SGD(parameters, 0.1)]
    several, second_order = reasons_in_optimizers(optimizers)
    require_said(several, ["2 optimizers", "use one with several parameter groups"], later=False)
    require_said(second_order, ["LBFGS", "Use a first-order optimizer"], later=False)
    assert not list(reasons_in_optimizers(optimizers[1:]))
    assert not list(reasons_in_optimizers({"optimizer": optimizers[1], "lr_scheduler": None}))
    (none,) = reasons_in_optimizers(None)
    require_said(none, ["no optimizer", "use `trainer.validate`"], later=False)


class TrainsAStranger(Chain):
    """Its optimizer has a parameter that hangs on nothing."""

    def configure_optimizers(self) -> Any:
        return SGD([*self.parameters(), nn.Parameter(torch.zeros(3))], 0.1)


def test_a_parameter_that_is_not_the_modules_is_refused() -> None:
    """It ended in a KeyError of a number."""
    assert "SGD has 1 parameters that are not the module's, the first of shape (3,)" in cause(2, TrainsAStranger())
