"""The user's optimizer is made of the whole module's parameters; each rank's groups then hold its own, in order."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch

from lightning_cpipe.equality import same_bits
from lightning_cpipe.tree import flatten
from tests.helpers.fits import (
    Seen,
    alone,
    fit_alone,
    fit_in_pipeline,
    in_pipeline,
    quiet_trainer,
    require_plain_results,
    require_same_bits,
)
from tests.helpers.modules import Chain, noise_loader


class Groups(Chain):
    """Four groups by name: matrices, biases, the second block's norm, and a frozen norm.

    Args:
        make: makes the optimizer out of groups; AdamW by default.
        named: whether it is given the names, too.
    """

    def __init__(self, make: Any = None, named: bool = False) -> None:
        super().__init__(depth=4)
        self.make = make or partial(torch.optim.AdamW, lr=0.01)
        self.named = named
        self.net[2].norm.requires_grad_(False)
        self.seen: list[str] = []

    def configure_optimizers(self) -> Any:
        self.seen = [name for name, _ in self.named_parameters()]
        groups = []
        for number, (kind, decay) in enumerate(KINDS.items()):
            named = [(name, parameter) for name, parameter in self.named_parameters() if kind_of(name) == kind][::-1]
            params = named if self.named else [parameter for _, parameter in named]
            groups.append({"params": params, "weight_decay": decay, "number": number})
        return self.make(groups)


KINDS = {"matrix": 0.1, "bias": 0.0, "of block 1": 0.2, "of block 2": 0.3}


def kind_of(name: str) -> str:
    if "norm" in name and name.split(".")[1] in "12":
        return f"of block {name.split('.')[1]}"
    return "matrix" if name.endswith("linear.weight") else "bias"


NAMES = [
    f"net.{block}.{rest}" for block in range(4) for rest in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
]
IN_ORDER = [[name for name in NAMES[::-1] if kind_of(name) == kind] for kind in KINDS]


class Noted(NamedTuple):
    """What a rank noted: the names that `configure_optimizers` saw, and its groups' names and options."""

    seen: list[str]
    names: list[list[str]]
    given: list[list[str] | None]
    others: list[dict[str, Any]]


class NotesGroups(pl.Callback):
    """The names in the groups while training runs, and what else is in them."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []
        self.given: list[list[str] | None] = []
        self.others: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        name_of = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        (optimizer,) = trainer.optimizers
        assert {id(each) for each in optimizer.state} <= name_of.keys()
        groups = optimizer.param_groups
        self.names = [[name_of[id(parameter)] for parameter in group["params"]] for group in groups]
        self.given = [group.get("param_names") for group in groups]
        self.others = [{key: group[key] for key in ("weight_decay", "number", "lr")} for group in groups]


def fit(p: int, **options: Any) -> list[Seen]:
    def callbacks() -> list[pl.Callback]:
        made.append(NotesGroups())
        return [made[-1]]

    made: list[NotesGroups] = []
    return fit_in_pipeline(
        p,
        partial(Groups, **options),
        noise_loader,
        callbacks=callbacks,
        look=lambda _, module: Noted(module.seen, made[-1].names, made[-1].given, made[-1].others),
        max_epochs=1,
    )


@pytest.mark.parametrize("p", [2, 3])
def test_each_rank_keeps_its_own_in_their_order_and_all_groups(p: int) -> None:
    ranks = [rank.found for rank in fit(p)]
    held: list[str] = []
    for noted in ranks:
        assert noted.seen == NAMES, "`configure_optimizers` sees the whole module"
        assert [each["weight_decay"] for each in noted.others] == list(KINDS.values())
        assert [each["number"] for each in noted.others] == [0, 1, 2, 3]
        for names, whole in zip(noted.names, IN_ORDER, strict=True):
            assert names == [name for name in whole if name in names]
            held += names
    assert sorted(held) == sorted(NAMES), "each on one rank"
    assert any(not names for noted in ranks for names in noted.names), "a group is empty on a rank"


def test_names_that_the_optimizer_was_given_go_with_the_parameters() -> None:
    for rank in fit(2, named=True):
        assert rank.found.given == rank.found.names


def fit_and_save(path: Path, epochs: int, resume: Path | None = None, **options: Any) -> None:
    trainer = quiet_trainer(max_epochs=epochs, **options)
    trainer.fit(Groups(named=True), noise_loader(), ckpt_path=resume)
    trainer.save_checkpoint(path)


def test_files_hold_the_names_that_the_optimizer_was_given(tmp_path: Path) -> None:
    """That of a plain run, resumed in a pipeline, and the pipeline's, resumed in a plain run."""
    files = [tmp_path / f"{name}.ckpt" for name in ("plain", "pipeline", "back")]
    alone(partial(fit_and_save, files[0], 1))
    in_pipeline(2, partial(fit_and_save, files[1], 2, files[0]))
    alone(partial(fit_and_save, files[2], 3, files[1]))
    for file in files:
        (state,) = torch.load(file, weights_only=False)["optimizer_states"]
        assert [group["param_names"] for group in state["param_groups"]] == IN_ORDER
        assert len(state["state"]) == len(NAMES) - 2, "two are frozen"


OPTIMIZERS = {
    "foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "fused sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "tensor": partial(torch.optim.AdamW, lr=torch.tensor(0.01), foreach=False),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "state from the beginning": partial(torch.optim.Adagrad, lr=0.01),
}


def state_of(trainer: pl.Trainer, module: pl.LightningModule) -> list[Any]:
    """What a checkpoint would hold of the optimizer, as leaves."""
    return flatten(trainer.strategy.optimizer_state(trainer.optimizers[0]))[0]


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=() if number < 2 else pytest.mark.full) for number, each in enumerate(OPTIMIZERS)]
)
def test_groups_train_as_in_plain_lightning(kind: str) -> None:
    """Some of them are empty on some ranks. What the optimizer keeps is that of plain Lightning, too."""
    # One update at the end: there is no delay.
    options = {"max_epochs": 1, "accumulate_grad_batches": 1000, "look": state_of}
    ours = fit_in_pipeline(3, partial(Groups, OPTIMIZERS[kind]), noise_loader, **options)[0]
    plain = fit_alone(partial(Groups, OPTIMIZERS[kind]), noise_loader, **options)
    require_same_bits(ours.weights, plain.weights)
    assert same_bits(ours.found, plain.found)
    assert len(ours.found) > len(NAMES)


class Matrices(Chain):
    """Trains its matrices with Muon, and nothing else."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Muon([each for each in self.parameters() if each.ndim == 2], lr=0.02)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon() -> None:
    seen = require_plain_results(3, Matrices, noise_loader)
    start = dict(Matrices().named_parameters())
    assert {name for name in NAMES if not torch.equal(seen.weights[name], start[name])} == set(IN_ORDER[0])
