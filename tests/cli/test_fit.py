"""``cpipe fit|validate|test|predict`` run the recipes, in a pipeline or not, and say where everything lies."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

# Imported when such a model is made: forked ranks would each do so.
from transformers.models.llama import modeling_llama as _  # noqa: F401

from lightning_cpipe.cli.main import main
from lightning_cpipe.demos.char_gpt import CharGPT
from lightning_cpipe.demos.digits import DigitsClassifier
from lightning_cpipe.demos.hf_causal_lm import HFCausalLM
from lightning_cpipe.equality import same_bits
from lightning_cpipe.tree import flatten
from tests.helpers.commands import ROOT, SMALL, Finished, cpipe

DIGITS = str(ROOT / "recipes" / "digits.yaml")
CHAR_GPT = str(ROOT / "recipes" / "char_gpt.yaml")
HF_CAUSAL_LM = str(ROOT / "recipes" / "hf_causal_lm.yaml")
TELL = "--trainer.callbacks+=tests.helpers.commands.Tell"
SHORT_TEXT = (
    "--data.length=16",
    "--data.batch_size=4",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false",
)
TINY_GPT = ("--model.layers=4", "--model.width=16", "--model.length=16", *SHORT_TEXT)
TINY_LLAMA = (
    "--model.config.hidden_size=16",
    "--model.config.intermediate_size=24",
    "--model.config.num_hidden_layers=2",
    "--model.config.num_attention_heads=2",
    "--model.config.num_key_value_heads=2",
    *SHORT_TEXT,
)


def in_folder(folder: Path, run: Callable[[], list[Finished]]) -> list[Finished]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Finished]]:
    """A small fit of the digits in a pipeline of two: the folder it ran in, and how each rank ended."""
    folder = tmp_path_factory.mktemp("digits")
    words = ("fit", "--config", DIGITS, *SMALL, "--trainer.devices=2", TELL)
    return folder, in_folder(folder, lambda: cpipe(*words, ranks=2))


def lines_of(out: str) -> dict[str, str]:
    """What was said after the fit, by the first word."""
    return dict(re.findall(r"^(logs|checkpoint|picture) +(\S+)", out, re.MULTILINE))


def test_a_recipe_trains_in_a_pipeline(digits: tuple[Path, list[Finished]]) -> None:
    for rank in digits[1]:
        assert (rank.status, rank.error) == (0, "")
        assert "ContinuousPipeStrategy runs DigitsClassifier on 2" in rank.out
        assert "after step 4" in rank.out


def test_afterwards_it_says_where_logs_checkpoint_and_picture_lie(digits: tuple[Path, list[Finished]]) -> None:
    folder, (first, second) = digits
    places = lines_of(first.out)
    assert set(places) == {"logs", "checkpoint", "picture"}
    for place in places.values():
        assert (folder / place).exists(), place
    assert list((folder / places["logs"]).glob("wandb/offline-run-*/*.wandb"))
    assert (folder / places["picture"]).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"\.ckpt \(val_accuracy 0\.\d{4}\)$", first.out, re.MULTILINE)
    assert not lines_of(second.out), "only rank 0 says so"


def test_the_checkpoint_is_the_whole_module(digits: tuple[Path, list[Finished]]) -> None:
    folder, ranks = digits
    path = folder / lines_of(ranks[0].out)["checkpoint"]
    module = DigitsClassifier.load_from_checkpoint(path, map_location="cpu")
    assert module.hparams["depth"] == 10
    assert module(torch.zeros(2, 64)).shape == (2, 10)


def test_the_configuration_is_saved_beside_the_logs_and_loads_again(digits: tuple[Path, list[Finished]]) -> None:
    folder, ranks = digits
    saved = folder / lines_of(ranks[0].out)["logs"] / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert int(config["trainer"]["devices"]) == 2
    assert config["trainer"]["strategy"]["class_path"] == "lightning_cpipe.ContinuousPipeStrategy"
    (again,) = cpipe("fit", "--config", str(saved), "--print_config")
    assert again.status == 0
    assert yaml.safe_load(again.out)["trainer"] == config["trainer"]


@pytest.mark.parametrize("command", ["validate", pytest.param("test", marks=pytest.mark.full), "predict"])
def test_a_checkpoint_is_evaluated_in_a_pipeline(digits: tuple[Path, list[Finished]], command: str) -> None:
    folder, ranks = digits
    path = folder / lines_of(ranks[0].out)["checkpoint"]
    limits = [f"--trainer.limit_{each}_batches=2" for each in ("val", "test", "predict")]
    words = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.devices=2", TELL)
    found = cpipe(command, "--config", DIGITS, f"--ckpt_path={path}", *limits, *words, ranks=2)
    for rank in found:
        assert (rank.status, rank.error) == (0, "")
        assert "ContinuousPipeStrategy runs DigitsClassifier on 2" in rank.out
        assert not lines_of(rank.out)
    if command != "predict":
        # The set for tests is the set for validations, so the accuracy is that of the fit's validation.
        (accuracy,) = re.findall(r"(?:val|test)_accuracy\D+(0\.\d+)", found[0].out)
        assert f"(val_accuracy {float(accuracy):.4f})" in ranks[0].out


def test_another_recipe_trains_with_pieces_laid_over_it() -> None:
    pieces = [str(ROOT / "configs" / name) for name in ("logger/csv.yaml", "callbacks/monitors.yaml")]
    configs = [word for piece in (CHAR_GPT, *pieces) for word in ("--config", piece)]
    words = (*TINY_GPT, "--trainer.strategy.num_stages=3", "--trainer.devices=3", TELL)
    first, *others = cpipe("fit", *configs, *words, ranks=3)
    for rank in (first, *others):
        assert (rank.status, rank.error) == (0, "")
        assert "ContinuousPipeStrategy runs CharGPT on 3" in rank.out
    places = lines_of(first.out)
    assert all(Path(place).exists() for place in places.values())
    assert (Path(places["logs"]) / "metrics.csv").is_file()
    assert (Path(places["logs"]) / "config.yaml").is_file()
    assert CharGPT.load_from_checkpoint(places["checkpoint"]).hparams["layers"] == 4


def test_the_recipe_of_a_foreign_model_trains_in_a_pipeline() -> None:
    csv = str(ROOT / "configs" / "logger" / "csv.yaml")
    words = ("--config", HF_CAUSAL_LM, "--config", csv, *TINY_LLAMA, "--trainer.devices=2", TELL)
    first, *others = cpipe("fit", *words, ranks=2)
    for rank in (first, *others):
        assert (rank.status, rank.error) == (0, "")
        assert "ContinuousPipeStrategy runs HFCausalLM on 2" in rank.out
        assert "after step 4" in rank.out
    places = lines_of(first.out)
    assert re.search(r"\.ckpt \(val_loss \d\.\d{4}\)$", first.out, re.MULTILINE)
    module = HFCausalLM.load_from_checkpoint(places["checkpoint"])
    assert module.model.config.num_hidden_layers == 2
    assert math.isfinite(module(torch.zeros(1, 16, dtype=torch.int64)).loss.item())


def test_without_transformers_its_recipe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, HFCausalLM.__module__)
    (found,) = cpipe("fit", "--config", HF_CAUSAL_LM)
    assert found.status == 2
    assert "HFCausalLM needs transformers: `pip install 'lightning-cpipe[hf]'`." in found.err


@pytest.mark.parametrize(
    ("recipe", "small", "module"),
    [
        (DIGITS, SMALL, "DigitsClassifier"),
        (CHAR_GPT, TINY_GPT, "CharGPT"),
        (HF_CAUSAL_LM, TINY_LLAMA, "HFCausalLM"),
    ],
)
def test_a_recipe_trains_in_plain_lightning(recipe: str, small: tuple[str, ...], module: str) -> None:
    """With all its callbacks."""
    pieces = [str(ROOT / "configs" / name) for name in ("strategy/none.yaml", "logger/csv.yaml")]
    configs = [word for piece in (recipe, *pieces) for word in ("--config", piece)]
    (found,) = cpipe("fit", *configs, *small, TELL)
    assert (found.status, found.error) == (0, "")
    assert f"SingleDeviceStrategy runs {module} on 1" in found.out
    assert "after step 4" in found.out
    assert {"logs", "checkpoint"} <= set(lines_of(found.out))
    assert all(Path(place).exists() for place in lines_of(found.out).values())


def test_optimizer_and_scheduler_of_the_command_line() -> None:
    """They replace the module's own; one update has no delay, so it is that of plain Lightning."""
    csv, plain = (str(ROOT / "configs" / name) for name in ("logger/csv.yaml", "strategy/none.yaml"))
    words = ["fit", "--config", DIGITS, "--config", csv, *SMALL, "--trainer.accumulate_grad_batches=4"]
    words += ["--model.depth=4", "--model.width=16", "--model.dropout=0"]
    words += ["--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint"]
    words += ["--optimizer=AdamW", "--optimizer.lr=0.02", "--optimizer.weight_decay=0.5"]
    words += ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]
    runs = [cpipe(*words, "--trainer.devices=2", ranks=2), cpipe(*words, "--config", plain)]
    for rank in itertools.chain(*runs):
        assert (rank.status, rank.error) == (0, "")
    ours, theirs = (torch.load(lines_of(run[0].out)["checkpoint"], weights_only=False) for run in runs)
    assert same_bits(flatten(ours["state_dict"])[0], flatten(theirs["state_dict"])[0])
    assert same_bits(flatten(ours["optimizer_states"])[0], flatten(theirs["optimizer_states"])[0])
    (group,) = ours["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["weight_decay"]) == (0.02, 0.5)
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    assert ours["lr_schedulers"][0]["gamma"] == 0.5


@pytest.mark.full
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("--trainer.strategy.num_stages=4",)),
        ("trainer: {strategy: {num_stages: 4}}", ()),
        ("trainer: {strategy: {class_path: lightning_cpipe.ContinuousPipeStrategy, init_args: {num_stages: 4}}}", ()),
        ("trainer: {strategy: continuous_pipe}", ()),
    ],
)
def test_every_way_to_set_the_strategy_trains(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    over = tmp_path / "over.yaml"
    over.write_text(text or "trainer: {}")
    small = (*SMALL, "--trainer.logger=false", "--trainer.callbacks=tests.helpers.commands.Tell")
    for rank in cpipe("fit", "--config", DIGITS, "--config", str(over), *small, *words, ranks=4):
        assert (rank.status, rank.error) == (0, "")
        assert "ContinuousPipeStrategy runs DigitsClassifier on 4" in rank.out


def test_where_everything_lies_is_said_by_forked_ranks_too(capfd: pytest.CaptureFixture[str]) -> None:
    """The process that forks them knows neither."""
    csv = str(ROOT / "configs" / "logger" / "csv.yaml")
    small = (*SMALL, "--trainer.devices=2", "--trainer.strategy.start_method=fork", "--model.depth=2")
    # What starts processes leaves an address there, and the seed.
    with mock.patch.dict(os.environ), mock.patch.object(sys, "argv", ["cpipe", "fit", "--config", DIGITS]):
        sys.argv += ["--config", csv, *small]
        main()
    said = capfd.readouterr().out
    places = lines_of(said)
    assert set(places) == {"logs", "checkpoint", "picture"}
    assert all(Path(place).exists() for place in places.values())
    assert said.count("\nlogs ") == 1


def test_after_the_first_thing_to_run_after_a_change_there_is_nothing_to_look_for() -> None:
    debug = str(ROOT / "configs" / "trainer" / "debug.yaml")
    found = cpipe("fit", "--config", DIGITS, "--config", debug, "--trainer.devices=2", TELL, ranks=2)
    for rank in found:
        assert (rank.status, rank.error) == (0, "")
        assert "after step 1" in rank.out
        assert not lines_of(rank.out)


def test_what_the_strategy_refuses_is_an_error() -> None:
    (found,) = cpipe("fit", "--config", DIGITS, *SMALL, "--trainer.strategy.num_stages=3", "--trainer.logger=false")
    assert found.status == 1
    assert "num_stages=3 on 4 devices" in found.error


# As a user starts it: in a fresh process, which starts the other ranks itself.


def started(*words: str) -> Finished:
    """How a command ended."""
    found = subprocess.run(words, capture_output=True, text=True, cwd=Path.cwd(), check=False)
    return Finished(found.returncode, found.stdout, found.stderr, "")


# Importing Lightning twice takes its time on a busy machine.
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "command",
    [
        pytest.param([sys.executable, "-m", "lightning_cpipe"], id="python -m"),
        pytest.param([str(Path(sys.executable).with_name("cpipe"))], id="cpipe", marks=pytest.mark.full),
    ],
)
def test_a_command_starts_its_ranks_itself(command: list[str]) -> None:
    csv = str(ROOT / "configs" / "logger" / "csv.yaml")
    words = ("fit", "--config", CHAR_GPT, "--config", csv, *TINY_GPT, "--trainer.devices=2")
    found = started(*command, *words, "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint")
    assert found.status == 0, found.err
    places = lines_of(found.out)
    assert set(places) == {"logs", "checkpoint"}
    assert all(Path(place).exists() for place in places.values())
    assert found.out.count("\nlogs ") == 1, "one rank says so"


@pytest.mark.full
@pytest.mark.timeout(240)
def test_after_the_import_a_trainer_knows_the_strategy_by_its_names() -> None:
    script = """
import lightning.pytorch as pl
import lightning_cpipe

lightning_cpipe.register()
for name in ("continuous_pipe", "continuous_pipe_spawn", "continuous_pipe_fork", "continuous_pipe_notebook"):
    trainer = pl.Trainer(strategy=name, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, lightning_cpipe.ContinuousPipeStrategy)
    print(name, trainer.strategy._options.start_method, trainer.world_size)
"""
    found = started(sys.executable, "-c", script)
    assert found.status == 0, found.err
    assert found.out.split("\n")[:-1] == [
        "continuous_pipe popen 2",
        "continuous_pipe_spawn spawn 2",
        "continuous_pipe_fork fork 2",
        "continuous_pipe_notebook fork 2",
    ]
