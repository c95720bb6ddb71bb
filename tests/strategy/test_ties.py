"""Parameters that several stages train: one owner, whose versions all others hold."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.stage.absent import AbsentParameter
from tests.helpers.fits import fit_alone, fit_in_pipeline, in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.modules import WIDTH, Chain, Tied, TiedThrice, make_optimizer, noise_loader
from tests.helpers.reference import train_delayed

DEPTH = 4
EPOCHS = 3


STARTS = {2: ["net.2"], 3: ["net.1", "net.2"], 4: ["net.1", "net.2", "net.3"]}


def stages_of(module: Chain, p: int) -> list[list[str]]:
    """The parameters of each stage, those that are tied under the name that it uses."""
    starts = [int(start.rpartition(".")[2]) for start in STARTS[p]]
    bounds = [*itertools.pairwise([0, *starts, DEPTH])]
    found = []
    for stage, (begin, end) in enumerate(bounds):
        places = [f"net.{number}." for number in range(begin, end)]
        places += ["first."] * (stage == 0) + ["head."] * (stage == p - 1)
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        found.append([name for name in names if any(name.startswith(place) for place in places)])
    return found


def require_equal_to_reference(
    kind: type[Tied],
    p: int,
    optimizer: str,
    accumulate: int = 1,
    extra_in_flight: int = 0,
    versions: str = "stash",
    devices: int | None = None,
) -> None:
    module = partial(kind, optimizer)
    seen = fit_in_pipeline(
        p,
        module,
        partial(noise_loader, shuffle=True),
        devices=devices,
        strategy={"split_points": STARTS[p], "extra_in_flight": extra_in_flight, "versions": versions},
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
    )[0]
    reference = module()
    per_epoch = len(seen.batches) // EPOCHS
    places = [i % per_epoch + 1 for i in range(len(seen.batches))]
    updates = [place % accumulate == 0 or place == per_epoch for place in places]
    losses = train_delayed(
        reference,
        stages_of(reference, p),
        list(zip(seen.batches, updates)),
        lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1]),
        make_optimizer(optimizer, None),
        accumulate,
        extra_in_flight,
        policy=versions,
    )
    assert [float(torch.tensor(loss) / accumulate) * accumulate for loss in losses] == seen.losses
    require_same_bits(seen.weights, dict(reference.named_parameters()))


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("p", "optimizer"),
    [(2, "adamw"), (4, "sgd"), *(pytest.param(*each, marks=FULL) for each in ((2, "sgd"), (3, "sgd"), (4, "adamw")))],
)
def test_ties_equal_the_reference(p: int, optimizer: str) -> None:
    """The first stage's gradient comes so many rows later, and its copy is the owner's version of the same number."""
    require_equal_to_reference(Tied, p, optimizer)


@pytest.mark.parametrize(
    ("accumulate", "extra"), [(3, 0), (1, 2), *(pytest.param(*each, marks=FULL) for each in ((1, 1), (2, 2)))]
)
def test_accumulated_and_further_ahead(accumulate: int, extra: int) -> None:
    require_equal_to_reference(Tied, 3, "sgd", accumulate, extra)


@pytest.mark.parametrize(
    ("versions", "accumulate"),
    [("latest", 1), ("vertical", 1), *(pytest.param(*each, marks=FULL) for each in (("vertical", 3), ("2bw", 3)))],
)
def test_a_copy_and_its_owner_follow_the_same_policy(versions: str, accumulate: int) -> None:
    require_equal_to_reference(TiedThrice, 3, "sgd", accumulate, versions=versions)


@pytest.mark.parametrize("p", [3, pytest.param(4, marks=FULL)])
def test_ties_between_all_pairs(p: int) -> None:
    """Where all stages wait for each other at the end, too."""
    require_equal_to_reference(TiedThrice, p, "adamw")


@pytest.mark.parametrize(
    ("kind", "devices", "accumulate", "extra", "versions"),
    [
        (TiedThrice, 1, 1, 0, "stash"),
        (TiedThrice, 2, 1, 0, "stash"),
        (TiedThrice, 1, 3, 0, "stash"),
        (Tied, 1, 1, 2, "stash"),
        (TiedThrice, 1, 1, 0, "latest"),
        (TiedThrice, 1, 1, 0, "vertical"),
    ],
)
def test_stages_of_one_process_are_tied_as_those_of_several(
    kind: type[Tied], devices: int, accumulate: int, extra: int, versions: str
) -> None:
    """On two, some ties are within a process and some between both."""
    require_equal_to_reference(kind, 4, "sgd", accumulate, extra, versions, devices)


class Copies(pl.Callback):
    """Keeps what this rank holds of the tied weight after each of its updates."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        weight = pl_module.first.weight
        if not isinstance(weight, AbsentParameter):
            self.seen.append(weight.detach().clone())


def copies(trainer: pl.Trainer, *_: Any) -> list[Tensor]:
    return next(each.seen for each in trainer.callbacks if isinstance(each, Copies))


def test_a_copy_is_the_owner_s_version_of_the_same_number_after_every_step() -> None:
    seen = fit_in_pipeline(
        3,
        partial(Tied, "adamw"),
        noise_loader,
        strategy={"split_points": STARTS[3]},
        callbacks=lambda: [Copies()],
        look=copies,
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    owners, none, others = (of_rank.found for of_rank in seen)
    assert not none
    assert len(owners) == len(others) == 2 * 8
    assert all(torch.equal(a, b) for a, b in zip(owners, others))
    assert len({float(each.sum()) for each in owners}) == 1 + 2 * 4, "it moved with every update"


def test_a_fit_that_stops_early_leaves_nothing_on_its_way_for_the_next_and_is_saved_under_both_names(
    tmp_path: Path,
) -> None:
    """Gradients of the last steps, and the receive of weights that never come, were under way."""

    def fits(**options: Any) -> dict[str, Any]:
        pl.seed_everything(7, verbose=False)
        module, path = Tied("adamw"), tmp_path / "tied.ckpt"
        trainer = quiet_trainer(max_steps=2, **options)
        trainer.fit(module, noise_loader())
        trainer.save_checkpoint(path)
        trainer.fit_loop.epoch_loop.max_steps = 5
        trainer.fit(module, noise_loader(), ckpt_path=path)
        if not trainer.is_global_zero:
            return {}
        assert torch.equal(module.first.weight, module.head.weight)
        assert module.first.weight is module.head.weight
        return {"saved": torch.load(path)["state_dict"], "at_end": module.state_dict()}

    found = in_pipeline(4, fits)[0]
    for state in found.values():
        assert torch.equal(state["first.weight"], state["head.weight"])
    assert not torch.equal(found["saved"]["head.weight"], found["at_end"]["head.weight"])


class CalledTwice(Chain):
    """Ends with the norm that it begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.net(self.norm(x)))


def test_a_module_may_be_called_on_several_stages() -> None:
    """One that trains as fast as delay lets it."""
    seen = fit_in_pipeline(3, CalledTwice, noise_loader, max_epochs=4)[0]
    plain = fit_alone(CalledTwice, noise_loader, max_epochs=4)
    assert seen.losses[0] == plain.losses[0]
    assert sum(seen.losses[-8:]) < sum(seen.losses[:8])
