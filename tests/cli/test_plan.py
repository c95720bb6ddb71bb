"""``cpipe plan`` says what a fit would do, from the fit's own config, in one process; it trains and writes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_cpipe.balance.costs import BlockCost, Costs
from lightning_cpipe.cli import plan as planning
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.strategy.setup import probing
from tests.helpers.commands import ROOT, cpipe
from tests.helpers.modules import WIDTH, Chain, noise_loader

DIGITS = str(ROOT / "recipes" / "digits.yaml")
SMALL = (
    "--model=lightning_cpipe.demos.digits.DigitsClassifier",
    "--model.depth=5",
    "--data=lightning_cpipe.demos.digits.DigitsData",
    "--trainer.accelerator=cpu",
    "--trainer.devices=4",
    "--trainer.max_epochs=20",
)
"""The recipe with eight blocks and nothing that takes its time to be read."""

MEASURED = [
    BlockCost(f"model.{i}", 100.0, 0.01, 0.02, {f"model.{i}.w": 1000}, {f"model.{i}.b": 10}, {str(i): 500}, output=64)
    for i in range(8)
]


def plan(*words: str) -> str:
    """What the command printed."""
    (ended,) = cpipe("plan", *words)
    assert (ended.status, ended.error) == (0, ""), ended.err
    return ended.out


def failed(*words: str, status: int = 1) -> str:
    """What the command complained of."""
    (ended,) = cpipe("plan", *words)
    assert (ended.status, ended.error) == (status, ""), ended.err
    assert not ended.out
    assert "Traceback" not in ended.err
    return ended.err


def test_a_recipe_as_text(tmp_path: Path) -> None:
    said = plan("--config", DIGITS, "--devices", "4")
    assert said.startswith(
        "DigitsClassifier on cpu, precision 32-true, mini-batches of 32: 4 stages, continuous schedule\n"
    )
    for i in range(13):
        assert re.search(rf"^model\.{i} .* kB$", said, re.MULTILINE)
    assert "\nstage  begins at " in said
    assert re.search(r"^memory  weights  gradients  optimizer  versions  activations +total$", said, re.MULTILINE)
    cuts = re.findall(r"^(model\.\d+) +16\.4 kB +16\.4 kB$", said, re.MULTILINE)
    assert json.loads(said.partition("split_points: ")[2].splitlines()[0]) == cuts
    assert len(cuts) == 3
    assert "mini-batches/s" in said
    assert "samples/s (without updates and transfers)" in said
    assert "0.33% of the slots of 900 mini-batches: fill and drain" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["err_0", "out_0"], "something was written"


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that are the same on every machine."""
    monkeypatch.setattr(probing, "measure", lambda *_: Costs(tuple(MEASURED)))


@pytest.mark.usefixtures("numbers")
def test_a_recipe_as_json() -> None:
    found = json.loads(plan(*SMALL, "--devices", "4", "--format", "json"))
    assert (found["module"], found["device"], found["precision"]) == ("DigitsClassifier", "cpu", "32-true")
    assert (found["samples"], found["balanced_by"], found["mini_batches"]) == (32, "time", 900)
    assert found["split_points"] == ["model.2", "model.4", "model.6"]
    assert found["blocks"][3] == {
        "name": "model.3",
        "operations": 100.0,
        "forward_s": 0.01,
        "backward_s": 0.02,
        "trained": 1000,
        "frozen": 10,
        "saved": 500,
        "output": 64,
    }
    first, *_, last = found["stages"]
    assert first["blocks"] == ["model.0", "model.1"]
    assert first["forward_s"] == pytest.approx(0.02)
    assert first["memory"] == {
        "weights": 2020,
        "gradients": 2000,
        "optimizer": 4000,
        "versions": 6000,
        "activations": 4000,
        "total": 18020,
    }
    assert (first["in_flight"], first["versions"], first["delay"]) == (4, 4, 3)
    assert (first["sends"], first["gets_back"]) == (32 * 128 * 4, 32 * 128 * 4)
    assert (last["in_flight"], last["versions"], last["delay"]) == (1, 1, 0)
    assert (last["sends"], last["gets_back"]) == (0, 0)
    assert found["period_s"] == pytest.approx(2 * 0.03)
    assert found["samples_per_s"] == pytest.approx(32 / 0.06)
    assert found["imbalance"] == pytest.approx(0)
    assert found["bubble"] == Continuous().slot_exact_ratio(4, 900)
    assert found["warnings"] == []


@pytest.mark.full
@pytest.mark.usefixtures("numbers")
def test_the_configs_own_options_count() -> None:
    words = (
        "--trainer.accumulate_grad_batches=3",
        "--trainer.strategy.extra_in_flight=1",
        "--trainer.max_steps=4",
        "--data.batch_size=8",
        "--trainer.strategy.split_points=[model.1,model.2,model.3]",
    )
    found = json.loads(plan(*SMALL, *words, "--format=json"))
    assert found["samples"] == 8
    assert found["mini_batches"] == 12
    assert found["split_points"] == ["model.1", "model.2", "model.3"]
    assert [stage["in_flight"] for stage in found["stages"]] == [7, 5, 3, 1]
    assert [stage["versions"] for stage in found["stages"]] == [3, 3, 2, 1]


@pytest.mark.full
@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_another_strategy_is_planned_for_the_trainers_devices(strategy: str) -> None:
    words = (f"--trainer.strategy={strategy}", "--trainer.devices=2")
    found = json.loads(plan(*SMALL, *words, "--format=json"))
    assert len(found["stages"]) == 2


@pytest.mark.full
@pytest.mark.usefixtures("numbers")
def test_a_limit_that_fits_is_said_and_moves_the_cut() -> None:
    said = plan(*SMALL, "--devices=4", "--memory-limit=17kB")
    assert "Within the limit of 17 kB per stage." in said
    assert 'split_points: ["model.1", "model.3", "model.5"]' in said


@pytest.mark.usefixtures("numbers")
def test_a_limit_that_nothing_fits_is_an_error() -> None:
    said = failed(*SMALL, "--devices=4", "--memory-limit=5kB")
    assert "cpipe plan: memory_limit=5 kB per stage: the best cut there is (" in said
    assert "  stage 3: " in said


@pytest.mark.usefixtures("numbers")
def test_the_splits_own_memory_is_held_against_the_limit() -> None:
    words = ("--trainer.strategy.split_points=[model.7]", "--devices=2", "--trainer.strategy.memory_limit=26kB")
    said = failed(*SMALL, *words)
    assert "the cut that `split_points` asks for (model.7) needs" in said


@pytest.mark.parametrize(
    ("words", "parts", "status"),
    [
        (["--devices=0"], ["--devices must be at least 1, not 0"], 2),
        (["--memory-limit=much"], ["--memory-limit: 'much' is no amount of memory: write '16GB'"], 2),
        (["--format=xml"], ["--format", "xml"], 2),
        (["--trainer.epochs=3"], ["usage: cpipe plan", "--trainer.epochs=3"], 2),
        (["--trainer.strategy.extra_in_flight=-1"], ["extra_in_flight=-1: the least is 0"], 1),
        (["--trainer.strategy.schedule=1f1b"], ["schedule='1f1b': only the continuous schedule can be forecast"], 1),
        (["--trainer.devices=auto"], ["devices='auto'", "`--devices`"], 1),
        (["--devices=99"], ["99 stages need as many blocks", "has 8"], 1),
        (["--trainer.strategy.split_points=[nowhere]", "--devices=2"], ["does not have: nowhere"], 1),
    ],
)
def test_what_can_not_be_planned_is_said_in_a_sentence(words: list[str], parts: list[str], status: int) -> None:
    said = failed(*SMALL, *words, status=status)
    assert not [part for part in parts if part not in said], said


class Heavy(Chain):
    """Its second block outweighs the others; it prints, and its optimizer is not Adam."""

    def __init__(self) -> None:
        super().__init__(optimizer="plain_sgd")
        self.net[1] = Wide()

    def forward(self, x: Tensor) -> Tensor:
        print("this is no JSON")
        return super().forward(x)

    def train_dataloader(self) -> Any:
        return noise_loader()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 1000), nn.Linear(1000, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(planning, "Heavy", Heavy, raising=False)
    return f"--model={planning.__name__}.Heavy"


def test_a_block_that_dominates_is_named(heavy: str) -> None:
    words = (heavy, "--devices=2", "--trainer.accelerator=cpu", "--trainer.max_epochs=1")
    found = json.loads(plan(*words, "--trainer.strategy.split_points=[net.2]", "--format=json"))
    (warning,) = found["warnings"]
    assert warning.startswith("'net.1', with what runs after it until the next block, costs ")
    assert "times the mean stage" in warning
    assert "`split_points` (net.1.up, net.1.down)" in warning
    assert all(stage["memory"]["optimizer"] == 0 for stage in found["stages"])


def test_it_says_where_it_can_be_used() -> None:
    said = plan("--help")
    for option in ("--config", "--devices", "--memory-limit", "--format"):
        assert option in said
    (told,) = cpipe("--help")
    assert "cpipe plan --config recipes/digits.yaml --devices 4" in told.out
