"""A checkpoint may be a folder into which each rank writes its own part; Lightning's own tool makes one file of it."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.errors import SaveError
from lightning_cpipe.strategy.checkpoints.optimizer_states import GroupOrder, whole_optimizer_state
from lightning_cpipe.strategy.checkpoints.sharded import is_sharded, write_shard
from lightning_cpipe.strategy.options import Options
from lightning_cpipe.strategy.setup.refusals import reasons_in_saving
from tests.helpers.fits import quiet_trainer, require_same_bits
from tests.helpers.modules import noise_loader
from tests.helpers.ranks import run_ranks
from tests.strategy.test_checkpoint import Counting, Grouped, Noting, read, require_same_numbers

SAVED = 3


def fit(p: int | None, folder: str, made: Any = Grouped, ckpt_path: Any = None, **options: Any) -> list[Any]:
    def on_rank(rank: int) -> Any:
        pl.seed_everything(7, verbose=False)
        noting = Noting()
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_last=True)
        strategy = "auto" if p is None else ContinuousPipeStrategy(**options)
        callbacks = [noting, keep]
        trainer = quiet_trainer(
            strategy=strategy, devices=p or 1, callbacks=callbacks, enable_checkpointing=True, max_steps=7
        )
        trainer.fit(made(), noise_loader(), ckpt_path=ckpt_path)
        return noting.start, sorted(path.name for path in Path(folder).iterdir())

    return run_ranks(on_rank, p or 1)


def consolidated(folder: Path) -> dict[str, Any]:
    file = folder.with_suffix(".one")
    command = ["consolidate_checkpoint", str(folder), "--output_file", str(file)]
    with mock.patch.object(sys, "argv", command):
        runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")
    return read(file)


@pytest.mark.parametrize("made", [Grouped, pytest.param(Counting, marks=pytest.mark.full)])
def test_lightnings_tool_makes_the_plain_file_of_it(tmp_path: Path, made: Any) -> None:
    fit(3, "plain", made)
    kept = fit(3, "sharded", made, save_distributed_checkpoint=True)
    assert {tuple(names) for _, names in kept} == {("last.ckpt", "step=6.ckpt")}
    shards = tmp_path / "sharded" / "step=6.ckpt"
    assert is_sharded(shards)
    assert {path.name for path in shards.iterdir()} == {".metadata", "meta.pt", *(f"__{r}_0.distcp" for r in range(3))}
    found, plain = consolidated(shards), read(tmp_path / "plain" / "step=6.ckpt")
    require_same_bits(found["state_dict"], plain["state_dict"])
    names = [name for group in found["optimizer_states"][0]["param_groups"] for name in group["params"]]
    for key, state in plain["optimizer_states"][0]["state"].items():
        require_same_numbers(
            dict(sorted(state.items())), dict(sorted(found["optimizer_states"][0]["state"][names[key]].items()))
        )
    for key in ("epoch", "global_step", "loops", "lr_schedulers"):
        require_same_numbers(found[key], plain[key])


def begun(seen: list[Any], what: str) -> dict[str, Any]:
    return {name: value for start, _ in seen for name, value in start[what].items()}


def test_it_resumes_with_another_number_of_stages_and_the_one_file_in_plain_lightning(tmp_path: Path) -> None:
    fit(2, "plain")
    fit(2, "sharded", save_distributed_checkpoint=True, async_save=True)
    name = "step=6.ckpt"
    expected = fit(None, "of_plain", ckpt_path=tmp_path / "plain" / name)
    found = consolidated(tmp_path / "sharded" / name)
    torch.save(found, tmp_path / "one.ckpt")
    resumed = [
        fit(3, "three", ckpt_path=tmp_path / "sharded" / name),
        fit(1, "alone", ckpt_path=tmp_path / "sharded" / name, num_stages=2, save_distributed_checkpoint=True),
        fit(None, "of_one", ckpt_path=tmp_path / "one.ckpt"),
    ]
    for seen in resumed:
        assert {start["place"] for start, _ in seen} == {(6, 0)}
        require_same_bits(begun(seen, "weights"), begun(expected, "weights"))
        theirs, ours = begun(expected, "optimizer"), begun(seen, "optimizer")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key][part], theirs[key][part]) for key in ours for part in ("step", "exp_avg_sq"))
        assert all(start["options"] == expected[0][0]["options"] for start, _ in seen)
        assert all(start["rates"] == expected[0][0]["rates"] for start, _ in seen)


@pytest.mark.full
def test_pipelines_side_by_side_write_one_folder(tmp_path: Path) -> None:
    """The first one's ranks write it, and the ranks of all read it."""
    beside = {"data_parallel_size": 2}
    fit(4, "plain", **beside)
    fit(4, "sharded", save_distributed_checkpoint=True, **beside)
    shards = tmp_path / "sharded" / "step=6.ckpt"
    assert {path.name for path in shards.iterdir()} == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}
    plain = tmp_path / "plain" / "step=6.ckpt"
    require_same_bits(consolidated(shards)["state_dict"], read(plain)["state_dict"])
    expected = fit(4, "of_plain", ckpt_path=plain, **beside)
    for options in ({}, {"save_distributed_checkpoint": True}):
        for seen, theirs in zip(fit(4, "again", ckpt_path=shards, **beside, **options), expected):
            require_same_numbers(seen[0]["weights"], theirs[0]["weights"])
            require_same_numbers(seen[0]["optimizer"], theirs[0]["optimizer"])
            assert seen[0]["place"] == theirs[0]["place"] == (6, 1)


def test_the_older_folder_is_whole_until_the_new_one_is(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def write(value: float) -> None:
        write_shard({"model": {"weight": torch.full((2,), value)}}, {"epoch": value}, path, None)

    def weight() -> Tensor:
        return consolidated(path)["state_dict"]["weight"]

    write(1.0)
    with mock.patch("torch.save", side_effect=OSError("full")), pytest.raises(SaveError, match="rank 0: OSError: full"):
        write(2.0)
    assert weight().tolist() == [1, 1]
    os.remove(path.with_suffix(".one"))
    write(3.0)
    assert weight().tolist() == [3, 3]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["last.ckpt", "last.one"]


def test_an_average_as_a_whole_is_refused() -> None:
    trainer = quiet_trainer(callbacks=[StochasticWeightAveraging(0.01)])
    (reason,) = reasons_in_saving(Options(save_distributed_checkpoint=True), trainer)
    assert "save_distributed_checkpoint=True with StochasticWeightAveraging" in reason
    assert not list(reasons_in_saving(Options(), trainer))


def test_a_learning_rate_that_is_a_tensor_is_written_as_it_was() -> None:
    """The file is written while training goes on: it held the rate of a later step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=torch.tensor(0.25))
    order = GroupOrder(optimizer, {id(parameter): "weight"})
    state = whole_optimizer_state(optimizer.state_dict(), {}, order, {"weight": "weight"})
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert float(state["param_groups"][0]["lr"]) == 0.25
