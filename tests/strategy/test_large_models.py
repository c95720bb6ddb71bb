"""A module that is made in `configure_model` and too big to be compared as a whole is never whole on any rank."""

from __future__ import annotations

import itertools
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.strategy.checkpoints.mapped_file import can_be_mapped, read_mapped
from lightning_cpipe.transport.control import Control
from tests.helpers.fits import Seen, fit_alone, fit_in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.memory import forget_peak, peak
from tests.helpers.modules import Block, Chain, noise_loader
from tests.helpers.ranks import run_ranks

FILLS = {"check": "fills"}
"""Where gradients are not compared with the uncut module's, no module is too small to stay in parts."""


class MadeLate(Chain):
    """Makes its blocks in `configure_model`, and some of them with an initialiser of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(depth=1, **options)
        self.net = None
        self.made: list[str] = []

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = nn.Sequential(*(Block() for _ in range(5)))
        for block in self.net[2:]:
            nn.init.trunc_normal_(block.linear.weight, std=0.3, a=-0.3, b=0.3)
            nn.init.normal_(block.norm.weight, 1, 0.1)
        self.register_buffer("noise_in_the_data", torch.randn(8))
        self.made.append("net")

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss((batch[0] + self.noise_in_the_data, batch[1]))

    def on_fit_end(self) -> None:
        assert self.made == ["net"]


def joined(ranks: Sequence[Seen]) -> dict[str, Tensor]:
    """The parts of all ranks; each weight is on one."""
    parts = [seen.weights for seen in ranks]
    whole = {name: tensor for part in parts for name, tensor in part.items()}
    assert sum(map(len, parts)) == len(whole)
    assert all(parts)
    return whole


@pytest.mark.parametrize(("p", "precision"), [pytest.param(2, "bf16-true", marks=pytest.mark.full), (3, "32-true")])
def test_a_module_in_parts_trains_as_a_plain_one(p: int, precision: str) -> None:
    loader = partial(noise_loader, shuffle=True)
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000, "precision": precision}
    seen = fit_in_pipeline(p, MadeLate, loader, noise_loader, strategy=FILLS, **options)
    plain = fit_alone(MadeLate, loader, noise_loader, **options)
    assert seen[0].losses == plain.losses
    assert seen[0].metrics == plain.metrics
    require_same_bits(joined(seen), plain.weights)


def test_a_small_module_is_compared_uncut_and_whole_again() -> None:
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    seen = fit_in_pipeline(2, MadeLate, noise_loader, **options)
    plain = fit_alone(MadeLate, noise_loader, **options)
    assert seen[0].losses == plain.losses
    require_same_bits(seen[0].weights, plain.weights)


class MadeFromOthers(MadeLate):
    """The last block begins as a copy of the first one's weights, long after that was made."""

    def configure_model(self) -> None:
        super().configure_model()
        self.net[4].linear.weight.data.copy_(self.net[0].linear.weight)


def test_a_module_that_cannot_be_built_in_parts_is_built_as_a_whole() -> None:
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    seen = fit_in_pipeline(2, MadeFromOthers, noise_loader, strategy=FILLS, **options)
    plain = fit_alone(MadeFromOthers, noise_loader, **options)
    assert seen[0].losses == plain.losses
    require_same_bits(seen[0].weights, plain.weights)


def one_after_the_other(cuts: Sequence[list[str]], **options: Any) -> dict[str, Any]:
    """Fits, tests, fits once more and validates, each with a Trainer of its own."""
    pl.seed_everything(7, verbose=False)
    module = MadeLate()
    found: dict[str, Any] = {}
    for number, run in enumerate(("fit", "test", "fit", "validate")):
        if cuts:
            options["strategy"] = ContinuousPipeStrategy(check="fills", split_points=cuts[number])
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=1000, **options)
        getattr(trainer, run)(module, noise_loader(seed=number))
        found[f"{number} {run}"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    own = {n: p.detach().clone() for n, p in module.named_parameters() if not isinstance(p, AbsentParameter)}
    return {"metrics": found, "weights": own}


def test_runs_follow_one_another_while_the_module_stays_in_parts() -> None:
    """Each is cut elsewhere, so that weights move between ranks."""
    cuts = [["net.2", "net.3"], ["net.1", "net.4"], ["net.1", "net.2"], ["net.3", "net.4"]]
    ranks = run_ranks(lambda _: one_after_the_other(cuts, devices=3), 3)
    (plain,) = run_ranks(lambda _: one_after_the_other([], strategy="auto", devices=1), 1)
    assert ranks[0]["metrics"] == plain["metrics"]
    assert [sorted({name.split(".")[1] for name in each["weights"]}) for each in ranks] == [
        ["4"],
        ["3"],
        ["0", "1", "2"],
    ]
    require_same_bits({name: t for each in ranks for name, t in each["weights"].items()}, plain["weights"])


class Mistaken(MadeLate):
    """Its author made a mistake."""

    def configure_model(self) -> None:
        super().configure_model()
        raise ValueError("the width must be even")


class NeedsNumbers(MadeLate):
    """Fails where it is built in parts, with an error of its own."""

    def configure_model(self) -> None:
        super().configure_model()
        try:
            self.net[0].linear.weight.sum()
        except CutError:
            raise ValueError("it needs numbers") from None


class OneOfTwo(ContinuousPipeStrategy):
    """The only rank of what it takes for a pipeline of two."""

    num_stages = 2
    processes = SimpleNamespace(control=Control(1))

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__(check="full", parallel_devices=[torch.device("cpu")] * 2, cluster_environment=mock.Mock())
        self._lightning_module = module

    @property
    def local_rank(self) -> int:
        return 0

    def configure(self) -> None:
        with self.model_sharded_context():
            self.lightning_module.configure_model()


def test_a_mistake_in_configure_model_is_told_once_and_as_itself() -> None:
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match="must be even") as error:
        OneOfTwo(Mistaken()).configure()
    assert not caught
    told = "".join(traceback.format_exception(error.type, error.value, error.tb))
    assert told.count("ValueError: the width must be even") == 1


@pytest.mark.parametrize(
    ("module", "why"), [(NeedsNumbers, "ValueError: it needs numbers"), (MadeFromOthers, "LostNumbersError: ")]
)
def test_why_a_module_is_built_as_a_whole_is_told_once(module: type[MadeLate], why: str) -> None:
    with pytest.warns(UserWarning, match=f"{module.__name__} is built as a whole.*: {why}") as caught:
        OneOfTwo(module()).configure()
    assert len(caught) == 1


def warnings_of_later_check(check: Any) -> list[str]:
    """What a second run of a module that stayed in parts warns of on this rank."""
    module = MadeLate()
    for each in ("fills", check):
        trainer = quiet_trainer(strategy=ContinuousPipeStrategy(check=each), devices=2, max_steps=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, noise_loader())
    return [str(each.message) for each in caught if "check='full'" in str(each.message)]


def test_a_later_run_in_parts_says_that_it_compares_no_gradients() -> None:
    of_last, of_first = run_ranks(lambda _: warnings_of_later_check("full"), 2)
    (warning,) = of_last
    assert "the gradients of MadeLate are not compared" in warning
    assert "An earlier run left the module in parts" in warning
    assert "let the first run of a new MadeLate have check='full'" in warning
    assert of_first == []


class Tied(MadeLate):
    """The first block and the last one share a weight."""

    def configure_model(self) -> None:
        super().configure_model()
        self.net[4].linear.weight = self.net[0].linear.weight


@pytest.mark.full
def test_a_tied_weight_is_made_on_each_of_its_stages() -> None:
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    seen = fit_in_pipeline(3, Tied, noise_loader, strategy=FILLS, **options)
    whole = fit_in_pipeline(3, Tied, noise_loader, **options)
    assert seen[0].losses == whole[0].losses
    require_same_bits(joined(seen), whole[0].weights)


# ---- checkpoints ----


def saving_into(folder: Path) -> list[pl.Callback]:
    return [ModelCheckpoint(folder, "saved", save_on_train_epoch_end=True)]


def test_a_checkpoint_is_one_file_of_all_parts_and_each_rank_reads_its_own(tmp_path: Path) -> None:
    module = partial(MadeLate, optimizer="adam")
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000, "enable_checkpointing": True}
    first = fit_in_pipeline(
        3, module, noise_loader, strategy=FILLS, callbacks=partial(saving_into, tmp_path), **options
    )
    file = tmp_path / "saved.ckpt"
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert saved.pop("noise_in_the_data").shape == (8,)
    require_same_bits(joined(first), saved)

    options |= {"max_epochs": 2, "ckpt_path": file}
    resumed = fit_in_pipeline(2, module, noise_loader, strategy=FILLS, seed=8, **options)
    plain = fit_alone(module, noise_loader, seed=9, **options)
    assert resumed[0].losses == plain.losses
    require_same_bits(joined(resumed), plain.weights)


def test_a_file_is_mapped_only_if_it_is_a_plain_one(tmp_path: Path) -> None:
    new, old = tmp_path / "new.ckpt", tmp_path / "old.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(3)}, "other": torch.ones(2)}, new)
    torch.save({}, old, _use_new_zipfile_serialization=False)
    assert can_be_mapped(new, TorchCheckpointIO())
    assert not can_be_mapped(old, TorchCheckpointIO())
    assert not can_be_mapped("https://example.com/new.ckpt", TorchCheckpointIO())
    assert not can_be_mapped(new, AsyncCheckpointIO())
    content, reading = read_mapped(new)
    with reading():
        assert content["state_dict"]["weight"].clone().tolist() == [1, 1, 1]
    # What is not read by parts may be kept while the file is written anew.
    new.write_bytes(b"")
    assert content["other"].tolist() == [1, 1]


# ---- memory ----


class Wide(pl.LightningModule):
    """A chain of square layers, all of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.net: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.depth)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Peaks(pl.Callback):
    """The most bytes that this process took in the set-up, and in training, above those that it took before."""

    def __init__(self) -> None:
        self._before = forget_peak()
        self.setup = self.training = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.setup = peak() - self._before
        forget_peak()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.training = peak() - self._before


def peaks_of_fit(width: int, depths: Sequence[int], ckpt_path: Path | None = None) -> dict[str, Any]:
    """The peaks of this rank, and its share in the weights."""
    # What is imported late, and connections, are no share of a model.
    strategy = ContinuousPipeStrategy()
    quiet_trainer(strategy=strategy, devices=len(depths), max_steps=3).fit(Chain(), noise_loader())
    starts = [f"net.{depth}" for depth in itertools.accumulate(depths[:-1])]
    strategy = ContinuousPipeStrategy(split_points=starts, check="fills")
    module, peaks = Wide(width, sum(depths)), Peaks()
    trainer = quiet_trainer(strategy=strategy, devices=len(depths), max_steps=6, callbacks=[peaks])
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(24, width)), 2), ckpt_path=ckpt_path)
    share = sum(p.nbytes for p in module.parameters() if not isinstance(p, AbsentParameter))
    versions = strategy.promised_delay(strategy.stage) + 1
    return {
        "whole": sum(p.numel() * p.element_size() for p in module.parameters()),
        "share": share,
        "setup": peaks.setup,
        # Each version, the gradients and what the optimizer keeps.
        "share in training": (versions + 2) * share,
        "training": peaks.training,
    }


# What does not grow with the module weighs more in a small one.
UNEVEN = [
    pytest.param(512, (24, 20, 40), 1.35, id="88 MB"),
    pytest.param(1024, (30, 20, 55), 1.2, id="440 MB", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("width", "depths", "most"), UNEVEN)
def test_a_rank_takes_the_memory_of_its_own_share(width: int, depths: tuple[int, ...], most: float) -> None:
    ranks = run_ranks(lambda _: peaks_of_fit(width, depths), len(depths))
    whole = sum(depths) * (width + 1) * width * 4
    assert [found["whole"] for found in ranks] == [whole] * len(depths)
    assert [found["share"] for found in ranks] == [whole // sum(depths) * depth for depth in reversed(depths)]
    for found in ranks:
        assert 1 <= found["setup"] / found["share"] <= most
        assert 0.9 <= found["training"] / found["share in training"] <= most


def save_after_two_steps(width: int, depth: int, path: Path) -> int:
    """In plain Lightning; returns the size of the file."""
    trainer = quiet_trainer(strategy="auto", devices=1, max_steps=2)
    trainer.fit(Wide(width, depth), DataLoader(TensorDataset(torch.randn(24, width)), 2))
    trainer.save_checkpoint(path)
    return path.stat().st_size


@pytest.mark.parametrize(("width", "depths", "most"), UNEVEN)
def test_a_rank_loads_its_own_part_of_a_checkpoint(
    width: int, depths: tuple[int, ...], most: float, tmp_path: Path
) -> None:
    path = tmp_path / "whole.ckpt"
    (size,) = run_ranks(lambda _: save_after_two_steps(width, sum(depths), path), 1)
    ranks = run_ranks(lambda _: peaks_of_fit(width, depths, path), len(depths))
    whole = ranks[0]["whole"]
    # Weights, and what the optimizer keeps.
    assert size == pytest.approx(2 * whole, rel=0.01)
    for found in ranks:
        assert 1 <= found["setup"] / (2 * found["share"]) <= most


# ---- modules that others wrote ----

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


class Language(pl.LightningModule):
    """A model of `transformers`.

    Args:
        kind: of model.
        path: where weights are read from; None for new ones.
    """

    def __init__(self, kind: str, path: Path | None = None) -> None:
        super().__init__()
        self.kind, self.path = kind, path
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        model, options = transformers.AutoModelForCausalLM, SIZES if self.kind == "mamba" else {**SIZES, **HEADS}
        config = transformers.AutoConfig.for_model(self.kind, tie_word_embeddings=False, **options)
        self.model = model.from_config(config) if self.path is None else model.from_pretrained(self.path)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def tokens() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randint(0, 64, (6, 8), generator=generator)), 2)


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(each, marks=pytest.mark.full) for each in ("mixtral", "mamba"))]
)
def test_a_model_of_transformers_in_parts_trains_as_a_plain_one(kind: str) -> None:
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    seen = fit_in_pipeline(2, partial(Language, kind), tokens, strategy=FILLS, **options)
    plain = fit_alone(partial(Language, kind), tokens, **options)
    assert seen[0].losses == plain.losses
    require_same_bits(joined(seen), plain.weights)


@pytest.mark.full
def test_a_model_that_is_read_from_a_file_of_transformers_is_in_parts_too(tmp_path: Path) -> None:
    first = Language("llama")
    first.configure_model()
    first.model.save_pretrained(tmp_path)
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    seen = fit_in_pipeline(2, partial(Language, "llama", tmp_path), tokens, strategy=FILLS, **options)
    plain = fit_alone(partial(Language, "llama", tmp_path), tokens, **options)
    assert seen[0].losses == plain.losses
    require_same_bits(joined(seen), plain.weights)
