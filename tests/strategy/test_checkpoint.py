"""A checkpoint is one plain file and a consistent cut, and costs nothing: it loads anywhere, and any file loads.

The file of "step i" holds version i of every stage, whatever is in flight then.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.engine.timeline import BACKWARD, EVALUATION, FORWARD, UPDATE
from lightning_cpipe.errors import AbsentWeightError, RankLostError
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.strategy.checkpoints.optimizer_states import GroupOrder, own_optimizer_state
from tests.helpers.fits import quiet_trainer, require_same_bits
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.probing import cut_of
from tests.helpers.ranks import run_ranks
from tests.helpers.reference import train_delayed

EPOCHS = 3
PER_EPOCH = 8
EVERY = 3
STEPS = list(range(EVERY, EPOCHS * PER_EPOCH + 1, EVERY))
MIDDLE, EPOCH_END = 9, 16

State = dict[str, Any]


class Grouped(Chain):
    """AdamW with a group of all weights, one of all else, and one of the first block alone, frozen in part."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].linear.bias.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        first, rest = list(self.net[0].parameters()), list(self.net[1:].parameters())
        groups = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
            {"params": first, "lr": 0.02},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, 0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Noting(pl.Callback):
    """Notes what a rank begins with, and every loss."""

    def __init__(self) -> None:
        self.start: State = {}
        self.batches: list[Any] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        own = {n: p for n, p in pl_module.named_parameters() if not isinstance(p, AbsentParameter)}
        (optimizer,) = trainer.optimizers
        self.start = {
            "weights": {name: parameter.detach().clone() for name, parameter in own.items()},
            "optimizer": {names[id(p)]: dict(state) for p, state in optimizer.state.items()},
            "options": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "rates": [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
            "place": (trainer.global_step, trainer.current_epoch),
        }
        self.start = _copied(self.start)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.batches.append((trainer.current_epoch, batch_idx, batch))


def _copied(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def fit(
    p: int | None,
    *,
    callbacks: Callable[[], list[pl.Callback]] = list,
    ckpt_path: Path | None = None,
    afterwards: Callable[[pl.Trainer], Any] = lambda trainer: None,
    module: Callable[[], pl.LightningModule] = Grouped,
    **options: Any,
) -> list[State]:
    """What each rank of a pipeline saw, or the one rank of plain Lightning where `p` is None."""

    def on_rank(rank: int) -> State:
        pl.seed_everything(7, verbose=False)
        noting = Noting()
        strategy: Any = "auto" if p is None else ContinuousPipeStrategy()
        trainer = quiet_trainer(
            strategy=strategy,
            devices=p or 1,
            callbacks=[noting, *callbacks()],
            **{"enable_checkpointing": True, "max_epochs": EPOCHS, **options},
        )
        made = module()
        loader = functools.partial(noise_loader, samples=3 * PER_EPOCH)
        trainer.fit(made, loader(), loader(seed=6), ckpt_path=ckpt_path)
        return {
            "start": noting.start,
            "batches": noting.batches,
            "losses": noting.losses,
            "end": (trainer.global_step, trainer.current_epoch),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "spans": [] if p is None else [(span.kind, span.batch) for span in trainer.strategy.timeline.spans],
            "weights": _copied(dict(made.state_dict())) if rank == 0 else {},
            "after": afterwards(trainer),
        }

    return run_ranks(on_rank, p or 1)


def saving(folder: Path) -> Callable[[], list[pl.Callback]]:
    """Saves every third step, after each validation, and at the end of each epoch."""
    return lambda: [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "validated-{step}", monitor="val_loss", save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(
            folder, "ended-{step}", save_on_train_epoch_end=True, save_top_k=-1, auto_insert_metric_name=False
        ),
        ModelCheckpoint(folder / "weights", "{step}", every_n_train_steps=12, save_weights_only=True, save_top_k=-1),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], tuple[Path, list[State]]]:
    """Runs that save while everything is in flight, by their number of stages: the folder, and what each rank saw."""

    @functools.cache
    def run(p: int | None) -> tuple[Path, list[State]]:
        folder = tmp_path_factory.mktemp(f"saved_by_{p}")
        return folder, fit(p, callbacks=saving(folder), val_check_interval=4)

    return run


def read(path: Path) -> State:
    """A file, as Lightning reads it by default: nothing in it is code."""
    return torch.load(path, weights_only=True)


def shape_of(tree: Any) -> Any:
    """A nested structure with types, shapes and keys in order, without numbers."""
    if isinstance(tree, Tensor):
        return tree.dtype, tuple(tree.shape), tree.device
    if isinstance(tree, dict):
        return [(key, shape_of(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return type(tree), [shape_of(value) for value in tree]
    return type(tree)


def require_same_numbers(a: Any, b: Any) -> None:
    """Equal to the bit, keys in the same order."""
    assert shape_of(a) == shape_of(b)
    leaves, others = (torch.utils._pytree.tree_flatten(each)[0] for each in (a, b))
    assert all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(leaves, others))


TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


# ---- the file ----


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_file_has_the_keys_of_a_plain_runs_file(runs: Any, p: int) -> None:
    (folder, _), (plain, _) = runs(p), runs(None)
    names = sorted(path.relative_to(plain) for path in plain.rglob("*.ckpt"))
    assert sorted(path.relative_to(folder) for path in folder.rglob("*.ckpt")) == names
    assert {f"{step}.ckpt" for step in STEPS} < set(map(str, names))
    for name in names:
        ours, theirs = read(folder / name), read(plain / name)
        for each in (ours, theirs):
            # They name their folder, and the optimizer tells apart what it counts.
            each.pop("callbacks", None)
        # Beside that, where the data is, which Lightning does not keep.
        assert (ours["loops"]["fit_loop"]["state_dict"].pop("place_of_pipeline", None) is None) == (p == 1)
        assert shape_of(ours) == shape_of(theirs)
        # Where it is, and what comes next.
        for key in ("epoch", "global_step", "loops", "lr_schedulers", "pytorch-lightning_version"):
            assert ours.get(key) == theirs.get(key)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_callbacks_save_what_they_save_in_a_plain_run(runs: Any, p: int) -> None:
    (folder, _), (plain, _) = runs(p), runs(None)
    for step in STEPS[1:]:
        ours, theirs = (read(each / f"{step}.ckpt")["callbacks"] for each in (folder, plain))
        assert {key: set(state) for key, state in ours.items()} == {key: set(state) for key, state in theirs.items()}
        best = [Path(state["best_model_path"]) for state in ours.values() if state["best_model_path"]]
        assert folder / f"{step - EVERY}.ckpt" in best or folder / f"{step}.ckpt" in best
        assert all(path.is_file() for path in best)


def test_one_stage_saves_the_numbers_of_plain_lightning(runs: Any) -> None:
    (folder, _), (plain, _) = runs(1), runs(None)
    for step in STEPS:
        ours, theirs = read(folder / f"{step}.ckpt"), read(plain / f"{step}.ckpt")
        for key in TRAINED:
            require_same_numbers(ours[key], theirs[key])


@pytest.mark.parametrize("step", [EVERY, MIDDLE, EPOCH_END - 1])
@pytest.mark.parametrize("p", [pytest.param(2, marks=pytest.mark.full), 3])
def test_a_file_is_the_cut_at_which_a_run_of_as_many_steps_ends(runs: Any, tmp_path: Path, p: int, step: int) -> None:
    """Weights, optimizer and scheduler, to the bit. So `save_checkpoint` after a fit is right, too."""
    folder, _ = runs(p)
    stopped = tmp_path / "stopped.ckpt"
    fit(p, max_steps=step, val_check_interval=4, afterwards=lambda trainer: trainer.save_checkpoint(stopped))
    ours, theirs = read(folder / f"{step}.ckpt"), read(stopped)
    for key in TRAINED:
        require_same_numbers(ours[key], theirs[key])


@pytest.mark.parametrize("p", [2, 3])
def test_each_file_is_another_version(runs: Any, p: int) -> None:
    """Else the test above could compare what never changes."""
    folder, _ = runs(p)
    files = [read(folder / f"{step}.ckpt")["state_dict"] for step in STEPS]
    for before, after in itertools.pairwise(files):
        still = {name for name in before if torch.equal(before[name], after[name])}
        assert still == {"net.0.linear.bias"}


@pytest.mark.parametrize("p", [2, 3])
def test_after_a_validation_the_same_version_is_saved(runs: Any, p: int) -> None:
    folder, _ = runs(p)
    ours, validated = read(folder / "12.ckpt"), read(folder / "validated-12.ckpt")
    for key in TRAINED:
        require_same_numbers(ours[key], validated[key])


@pytest.mark.parametrize("p", [2, 3])
def test_saves_cost_no_drain(runs: Any, p: int) -> None:
    """Each stage does what the plan says, saves or not."""
    _, ranks = runs(p)
    letters = {FORWARD: "F", BACKWARD: "B", UPDATE: "U"}
    plan = Continuous().plan(p, EPOCHS * PER_EPOCH)
    for stage, seen in enumerate(reversed(ranks)):
        trace = [f"{letters[kind]}{batch}" for kind, batch in seen["spans"] if kind in letters]
        assert trace == list(map(str, plan.actions(stage)))
        assert sum(kind == EVALUATION for kind, _ in seen["spans"]) >= 2 * EPOCHS * PER_EPOCH


def test_saves_change_no_number(runs: Any) -> None:
    _, ranks = runs(3)
    without = fit(3, enable_checkpointing=False, val_check_interval=4)
    assert ranks[0]["losses"] == without[0]["losses"]
    require_same_bits(ranks[0]["weights"], without[0]["weights"])


@pytest.mark.parametrize("p", [2, 3])
def test_only_weights_are_saved_if_asked(runs: Any, p: int) -> None:
    folder, _ = runs(p)
    weights, whole = read(folder / "weights" / "step=12.ckpt"), read(folder / "12.ckpt")
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & weights.keys()
    require_same_numbers(weights["state_dict"], whole["state_dict"])


class Counting(Chain):
    """Each block counts the mini-batches that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)))


def test_what_forwards_write_into_buffers_has_seen_the_mini_batches_in_flight(tmp_path: Path) -> None:
    fit(3, module=Counting, callbacks=saving(tmp_path))
    file = read(tmp_path / f"{MIDDLE}.ckpt")["state_dict"]
    counts = [int(file[f"net.{block}.1.num_batches_tracked"]) for block in range(4)]
    # Two blocks on the first stage or on the last, as they weigh; its forwards are two mini-batches ahead.
    assert counts[0] == MIDDLE + 2
    assert counts[3] == MIDDLE
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {MIDDLE, MIDDLE + 1, MIDDLE + 2}


# ---- a pipeline's file in plain Lightning ----


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("name", [f"{MIDDLE}.ckpt", "validated-8.ckpt", "weights/step=12.ckpt"])
def test_a_file_saved_in_mid_stream_loads_into_the_uncut_module(runs: Any, p: int, name: str) -> None:
    path = runs(p)[0] / name
    module = Grouped.load_from_checkpoint(path)
    require_same_bits(dict(module.state_dict()), read(path)["state_dict"])


def test_a_file_saved_in_mid_stream_resumes_on_one_device(runs: Any) -> None:
    path = runs(3)[0] / f"{MIDDLE}.ckpt"
    (seen,) = fit(None, ckpt_path=path)
    require_begun_with([seen], path)
    require_trained_to_the_end(seen, MIDDLE)


def test_a_file_gives_the_same_validation_in_a_pipeline_and_on_one_device(runs: Any) -> None:
    folder, ranks = runs(3)
    path = folder / "validated-24.ckpt"

    def validate(p: int | None) -> float:
        def on_rank(_: int) -> float:
            strategy: Any = "auto" if p is None else ContinuousPipeStrategy()
            trainer = quiet_trainer(strategy=strategy, devices=p or 1)
            (found,) = trainer.validate(Grouped(), noise_loader(3 * PER_EPOCH, seed=6), path, verbose=False)
            return found["val_loss"]

        everyones = run_ranks(on_rank, p or 1)
        assert len(set(everyones)) == 1
        return everyones[0]

    assert validate(None) == validate(2) == validate(3) == ranks[0]["metrics"]["val_loss"]


# ---- resuming ----


def require_begun_with(ranks: list[State], path: Path) -> None:
    """All stages together began with exactly what is in the file, each parameter on one stage."""
    file = read(path)
    weights = {name: weight for seen in ranks for name, weight in seen["start"]["weights"].items()}
    assert sum(len(seen["start"]["weights"]) for seen in ranks) == len(weights)
    require_same_bits(weights, file["state_dict"])
    states = {name: state for seen in ranks for name, state in seen["start"]["optimizer"].items()}
    names = group_names()
    saved = file["optimizer_states"][0]
    expected = {names[number]: state for number, state in saved["state"].items()}
    assert states.keys() == expected.keys()
    assert len(expected) == len(weights) - 1, "all but the frozen one"
    for name, state in states.items():
        require_same_numbers(state, expected[name])
    options = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
    for seen in ranks:
        assert seen["start"]["options"] == options
        assert seen["start"]["rates"] == file["lr_schedulers"]
        assert seen["start"]["place"] == (file["global_step"], file["global_step"] // PER_EPOCH)


def group_names() -> list[str]:
    """The names of a `Grouped`'s parameters in the order in which its optimizer numbers them."""
    module = Grouped()
    order = GroupOrder(module.configure_optimizers()["optimizer"], {id(p): n for n, p in module.named_parameters()})
    return [name for group in order.groups for name in group]


def require_trained_to_the_end(seen: State, begun: int) -> None:
    """Each remaining place was trained once, in order."""
    assert seen["end"] == (EPOCHS * PER_EPOCH, EPOCHS)
    places = [divmod(step, PER_EPOCH) for step in range(begun, EPOCHS * PER_EPOCH)]
    assert [(epoch, index) for epoch, index, _ in seen["batches"]] == places


AT_BY_DEFAULT = {None: EPOCH_END, 3: MIDDLE}
"""Steps of the files that two stages resume from by default, by the number of stages that saved them."""


@pytest.mark.parametrize(
    ("source", "step"),
    [
        pytest.param(*case, marks=() if AT_BY_DEFAULT.get(case[0]) == case[1] else pytest.mark.full)
        for case in itertools.product([None, 1, 2, 3], [MIDDLE, EPOCH_END])
    ],
)
def test_two_stages_resume_from_any_file(runs: Any, source: int | None, step: int) -> None:
    path = path_at(runs(source)[0], step)
    ranks = fit(2, ckpt_path=path)
    require_begun_with(ranks, path)
    for seen in ranks:
        require_trained_to_the_end(seen, step)


def path_at(folder: Path, step: int) -> Path:
    """The file of a step, at an epoch's end the one that knows that the epoch has ended."""
    return folder / (f"{step}.ckpt" if step % PER_EPOCH else f"ended-{step}.ckpt")


@pytest.mark.parametrize(
    ("p", "step"),
    [
        (2, EPOCH_END),
        (3, MIDDLE),
        *(pytest.param(*each, marks=pytest.mark.full) for each in ((2, MIDDLE), (3, EPOCH_END))),
    ],
)
def test_what_follows_a_resume_is_what_the_contract_says(runs: Any, p: int, step: int) -> None:
    """The pipeline is filled anew with the weights of the file: delayed gradients from there on, to the bit."""
    path = path_at(runs(3)[0], step)
    seen = fit(p, ckpt_path=path)[0]
    module = Grouped.load_from_checkpoint(path)
    cut = cut_of(module, seen["batches"][0][-1], p, run=Grouped.loss)
    losses = train_delayed(
        module,
        [[name for name, stages in cut.trained_on.items() if stages == (stage,)] for stage in range(p)],
        [(batch, True) for _, _, batch in seen["batches"]],
        lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1]),
        Resumed(module, read(path)),
    )
    assert losses == seen["losses"]
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    require_same_bits(seen["weights"], weights)


class Resumed:
    """Makes one stage's optimizer and scheduler with their states from a file."""

    def __init__(self, module: nn.Module, file: State) -> None:
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._saved = file["optimizer_states"][0]
        self._rates = file["lr_schedulers"][0]

    def __call__(self, parameters: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        numbers = {name: number for number, name in enumerate(group_names())}
        numbered = {numbers[self._names[id(parameter)]]: parameter for parameter in parameters}
        groups = [
            {**group, "params": [numbered[number] for number in group["params"] if number in numbered]}
            for group in self._saved["param_groups"]
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups)
        for number, parameter in numbered.items():
            optimizer.state[parameter] = _copied(self._saved["state"][number])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.7, last_epoch=1)
        scheduler.load_state_dict(self._rates)
        for group, saved in zip(optimizer.param_groups, groups):
            group["lr"] = saved["lr"]
        return optimizer, scheduler


# Each kind of moment at which Lightning saves: in an epoch, after a validation in it, at its last step, after the
# validation at its end, and at its end.
MOMENTS = ["9", "validated-12", "24", "validated-16", "ended-16"]

in_an_epoch_and_at_its_end = pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in ("9", "validated-16") else pytest.mark.full) for each in MOMENTS]
)


@in_an_epoch_and_at_its_end
def test_one_stage_resumes_as_plain_lightning_does(runs: Any, name: str) -> None:
    path = runs(None)[0] / f"{name}.ckpt"
    (ours,), (plain,) = (fit(p, ckpt_path=path, max_epochs=EPOCHS + 1) for p in (1, None))
    assert ours["losses"] == plain["losses"]
    assert ours["metrics"] == plain["metrics"]
    require_same_bits(ours["weights"], plain["weights"])


@pytest.mark.parametrize("name", MOMENTS)
def test_two_stages_go_on_where_plain_lightning_does(runs: Any, name: str) -> None:
    path = runs(2)[0] / f"{name}.ckpt"
    (plain,) = fit(None, ckpt_path=path, max_epochs=EPOCHS + 1)
    assert plain["batches"]
    for seen in fit(2, ckpt_path=path, max_epochs=EPOCHS + 1):
        assert seen["end"] == plain["end"] == ((EPOCHS + 1) * PER_EPOCH, EPOCHS + 1)
        assert [place for *place, _ in seen["batches"]] == [place for *place, _ in plain["batches"]]
        every = list(noise_loader(samples=3 * PER_EPOCH))
        # In the middle of an epoch, plain Lightning begins with its first batch again.
        assert all(torch.equal(batch[0], every[index][0]) for _, index, batch in seen["batches"])


def stop_on_rank_0(at: int) -> Callable[[], list[pl.Callback]]:
    """Rank 0 alone asks for the end, in a hook of the step that ends at `at`."""

    def stop(trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.is_global_zero and trainer.global_step == at

    return lambda: [LambdaCallback(on_train_batch_end=stop)]


@in_an_epoch_and_at_its_end
def test_after_a_resume_every_rank_hears_the_word_of_its_own_step(runs: Any, name: str) -> None:
    """Lightning comes by the end of a step without a step when it resumes at a validation's end.

    The last stage said a word there that nobody heard, and all others heard each later one a step too late: losses were
    those of the mini-batch before, and a stop never came.
    """
    path = runs(3)[0] / f"{name}.ckpt"
    begun = read(path)["global_step"]
    ranks = fit(3, ckpt_path=path, max_epochs=EPOCHS + 1, callbacks=stop_on_rank_0(begun + 3))
    assert [seen["end"][0] for seen in ranks] == [begun + 3] * 3
    assert len(ranks[0]["losses"]) == 3
    assert all(seen["losses"] == ranks[0]["losses"] for seen in ranks)
    assert all(seen["metrics"] == ranks[0]["metrics"] for seen in ranks)


def test_a_resumed_pipeline_resumes_again(runs: Any, tmp_path: Path) -> None:
    path = runs(2)[0] / f"{MIDDLE}.ckpt"
    fit(3, ckpt_path=path, callbacks=saving(tmp_path), max_steps=20)
    again = tmp_path / "18.ckpt"
    ranks = fit(2, ckpt_path=again)
    require_begun_with(ranks, again)
    require_trained_to_the_end(ranks[0], 18)


class TiedWithinAStage(Chain):
    """The first two blocks share a weight; with two stages, both lie on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1].linear.weight = self.net[0].linear.weight


def test_what_is_tied_within_a_stage_is_saved_under_both_names_and_resumes(tmp_path: Path) -> None:
    """The second name's entry was the last stage's: a stand-in without numbers, and no resume came past it."""
    at_end = lambda: [ModelCheckpoint(tmp_path, "{step}", save_last=True, auto_insert_metric_name=False)]  # noqa: E731
    ranks = fit(2, module=TiedWithinAStage, callbacks=at_end, max_epochs=1)
    found = read(tmp_path / "last.ckpt")["state_dict"]
    assert torch.equal(found["net.0.linear.weight"], found["net.1.linear.weight"])
    require_same_bits(found, ranks[0]["weights"])
    TiedWithinAStage.load_from_checkpoint(tmp_path / "last.ckpt")
    ranks = fit(2, module=TiedWithinAStage, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    begun = {name: weight for seen in ranks for name, weight in seen["start"]["weights"].items()}
    require_same_bits(begun, {name: weight for name, weight in found.items() if name in begun})
    assert found.keys() - begun.keys() == {"net.1.linear.weight"}


def test_weights_alone_can_be_loaded_before_a_fit(runs: Any) -> None:
    path = runs(3)[0] / "weights" / "step=12.ckpt"
    ranks = fit(2, module=lambda: Grouped.load_from_checkpoint(path), max_epochs=1)
    weights = {name: weight for seen in ranks for name, weight in seen["start"]["weights"].items()}
    require_same_bits(weights, read(path)["state_dict"])
    assert ranks[0]["start"]["place"] == (0, 0)


# ---- hooks that change the file ----


class RenamesInTheFile(Counting):
    """Leaves out a prefix where it saves, and puts it back where it loads; keeps a copy besides."""

    def on_save_checkpoint(self, checkpoint: State) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.removeprefix("net."): value for key, value in state.items()}
        checkpoint["halves"] = {key: value / 2 for key, value in state.items()}

    def on_load_checkpoint(self, checkpoint: State) -> None:
        checkpoint["state_dict"] = {f"net.{key}": value for key, value in checkpoint["state_dict"].items()}


class RenamesInItsState(Counting):
    """The same, with hooks of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self.rename)
        self.register_load_state_dict_pre_hook(self.rename_back)

    @staticmethod
    def rename(module: nn.Module, state: State, *_: Any) -> None:
        for key in list(state):
            state[key.removeprefix("net.")] = state.pop(key)

    @staticmethod
    def rename_back(module: nn.Module, state: State, *_: Any) -> None:
        for key in list(state):
            state[f"net.{key}"] = state.pop(key)


class Sums(pl.Callback):
    """Looks at the numbers that are about to be saved."""

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        checkpoint["sum"] = sum(float(value.sum()) for value in checkpoint["state_dict"].values())
        (state,) = checkpoint["optimizer_states"]
        checkpoint["in_optimizer"] = len(state["state"])


@pytest.mark.parametrize("module", [RenamesInTheFile, RenamesInItsState])
def test_hooks_see_the_whole_state_and_may_rename_what_is_in_it(tmp_path: Path, module: type[Counting]) -> None:
    """An entry of another name had no home: its weights were missing in the file, and its buffers another stage's."""
    callbacks = lambda: [ModelCheckpoint(tmp_path, save_last=True), Sums()]  # noqa: E731
    ranks = fit(2, module=module, callbacks=callbacks, max_epochs=1)
    file = read(tmp_path / "last.ckpt")
    require_same_bits(
        file["state_dict"], {key.removeprefix("net."): value for key, value in ranks[0]["weights"].items()}
    )
    assert file["sum"] == pytest.approx(sum(float(value.sum()) for value in file["state_dict"].values()))
    assert file["in_optimizer"] == len(dict(module().named_parameters()))
    if module is RenamesInTheFile:
        assert file["halves"]["net.0.0.weight"].equal(file["state_dict"]["0.0.weight"] / 2)

    resumed = fit(2, module=module, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    begun = {name: weight for seen in resumed for name, weight in seen["start"]["weights"].items()}
    assert begun.keys() == dict(module().named_parameters()).keys()
    assert all(weight.equal(file["state_dict"][name.removeprefix("net.")]) for name, weight in begun.items())


def test_a_file_is_not_overwritten_by_one_without_its_weights(tmp_path: Path) -> None:
    """As when a hook adds the module's own state to the checkpoint."""
    path = tmp_path / "last.ckpt"
    TorchCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(2)}}, path)
    absent = AbsentParameter.of(torch.ones(2), "weight", home=0, here=1)
    with pytest.raises(AbsentWeightError, match=r"'weight'.*live on stage 0"):
        TorchCheckpointIO().save_checkpoint({"state_dict": {"weight": absent}}, path)
    assert read(path)["state_dict"]["weight"].tolist() == [1, 1]
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


# ---- files that do not fit ----


def failing(path: Path) -> str:
    """The sentence that a resume ends with."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(start_method="fork"), devices=2, max_epochs=EPOCHS)
    # Lightning leaves the port there.
    with mock.patch.dict(os.environ), pytest.raises(RankLostError) as caught:
        trainer.fit(Grouped(), noise_loader(), ckpt_path=path)
    return str(caught.value)


def changed(path: Path, to: Path, change: Callable[[State], object]) -> Path:
    file = read(path)
    change(file)
    torch.save(file, to)
    return to


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda file: file["state_dict"].pop("net.3.linear.weight"),
            ["RuntimeError", "Error(s) in loading state_dict for Grouped", "Missing key(s)", "net.3.linear.weight"],
        ),
        (
            lambda file: file["state_dict"].update(extra=torch.zeros(1)),
            ["RuntimeError", "Error(s) in loading state_dict for Grouped", "Unexpected key(s)", "extra"],
        ),
    ],
    ids=["missing", "unexpected"],
)
def test_keys_that_are_not_the_whole_modules_are_named(
    runs: Any, tmp_path: Path, change: Callable[[State], object], parts: list[str]
) -> None:
    path = changed(runs(2)[0] / f"{MIDDLE}.ckpt", tmp_path / "changed.ckpt", change)
    said = failing(path)
    assert not [part for part in parts if part not in said], said


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups.pop(),
        lambda groups: groups.append({**groups[0], "params": [99]}),
        lambda groups: groups[1]["params"].pop(),
        lambda groups: groups[0]["params"].append(99),
    ],
    ids=["a group less", "a group more", "a parameter less", "a parameter more"],
)
def test_groups_that_are_not_the_optimizers_are_refused_as_torch_does(runs: Any, change: Any) -> None:
    """And not cut to what is common."""
    saved = read(runs(2)[0] / f"{MIDDLE}.ckpt")["optimizer_states"][0]
    change(saved["param_groups"])
    module = Grouped()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizer = module.configure_optimizers()["optimizer"]
    with pytest.raises(ValueError, match="parameter group") as torchs:
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="parameter group") as ours:
        own_optimizer_state(saved, optimizer, GroupOrder(optimizer, names), names)
    assert str(ours.value) == str(torchs.value)
