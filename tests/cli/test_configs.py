"""Every YAML file of the repository is loaded, alone or laid over a recipe, and what is printed loads again."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_cpipe.cli.main import main
from tests.helpers.commands import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PIECES = sorted((ROOT / "configs").glob("*/*.yaml"))
FOLDERS = [list(files) for _, files in itertools.groupby(PIECES, lambda file: file.parent)]


def named(file: Any) -> str:
    return str(file.relative_to(ROOT)) if isinstance(file, Path) else ""


def cpipe(*words: str) -> None:
    """Run the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cpipe", *words])
        main()


def printed(capsys: pytest.CaptureFixture[str], *files: Path, words: tuple[str, ...] = ()) -> str:
    """The configuration that `cpipe fit` makes of these files."""
    configs = [word for file in files for word in ("--config", str(file))]
    with pytest.raises(SystemExit) as ended:
        cpipe("fit", *configs, *words, "--print_config")
    shown = capsys.readouterr()
    assert ended.value.code in (0, None), shown.err
    return shown.out


def require_within(part: Any, whole: Any) -> None:
    """Every value of `part` stands in `whole`; a key with a plus adds to the end of what is there."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key.endswith("+"):
                added = whole[key[:-1]][-len(value) :]
                for mine, theirs in zip(value, added):
                    require_within(mine, theirs)
            else:
                require_within(value, whole[key])
    elif isinstance(part, list):
        assert len(part) == len(whole)
        for mine, theirs in zip(part, whole):
            require_within(mine, theirs)
    else:
        assert part == whole


def test_there_are_files() -> None:
    assert {named(file) for file in RECIPES} >= {"recipes/char_gpt.yaml", "recipes/digits.yaml"}
    assert {file.parent.name for file in PIECES} >= {"callbacks", "logger", "strategy", "trainer"}
    elsewhere = [*(ROOT / "recipes").rglob("*.y*ml"), *(ROOT / "configs").rglob("*.y*ml")]
    assert sorted(elsewhere) == sorted([*RECIPES, *PIECES]), "a file that these tests do not find"


@pytest.mark.parametrize("recipe", RECIPES, ids=named)
def test_a_recipe_loads_and_what_is_printed_loads_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: Path
) -> None:
    first = printed(capsys, recipe)
    require_within(yaml.safe_load(recipe.read_text()), yaml.safe_load(first))
    again = tmp_path / "again.yaml"
    again.write_text(first)
    assert printed(capsys, again) == first


@pytest.mark.parametrize("recipe", RECIPES, ids=named)
def test_a_recipe_begins_with_its_command_its_data_and_what_to_expect(recipe: Path) -> None:
    header = "".join(itertools.takewhile(lambda line: line.startswith("#"), recipe.open()))
    assert f"cpipe fit --config {named(recipe)}" in header
    assert "Data: " in header
    assert "licence" in header or re.search(r"BSD|MIT|Apache", header)
    assert "Expect " in header
    assert re.search(r"\bminutes?\b", header)


@pytest.mark.full
@pytest.mark.parametrize("piece", PIECES, ids=named)
def test_a_piece_says_what_it_is_for_and_takes_effect_over_a_recipe(
    capsys: pytest.CaptureFixture[str], piece: Path
) -> None:
    assert piece.read_text().startswith("# ")
    recipe = ROOT / "recipes" / "digits.yaml"
    require_within(yaml.safe_load(piece.read_text()), yaml.safe_load(printed(capsys, recipe, piece)))


def each_piece_once() -> list[list[Path]]:
    """Pieces of all kinds, so that each is in one of the lists."""
    return [[file for file in files if file] for files in itertools.zip_longest(*FOLDERS)]


@pytest.mark.parametrize("pieces", each_piece_once(), ids=lambda files: " ".join(file.stem for file in files))
def test_pieces_of_all_kinds_go_together(capsys: pytest.CaptureFixture[str], pieces: list[Path]) -> None:
    assert all(piece.read_text().startswith("# ") for piece in pieces)
    require_together(capsys, ROOT / "recipes" / "digits.yaml", pieces)


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES, ids=named)
@pytest.mark.parametrize(
    "pieces", list(itertools.product(*FOLDERS)), ids=lambda files: " ".join(file.stem for file in files)
)
def test_all_combinations_go_together(
    capsys: pytest.CaptureFixture[str], recipe: Path, pieces: tuple[Path, ...]
) -> None:
    require_together(capsys, recipe, list(pieces))


def require_together(capsys: pytest.CaptureFixture[str], recipe: Path, pieces: list[Path]) -> None:
    """What no later file overrides holds."""
    whole = yaml.safe_load(printed(capsys, recipe, *pieces))
    expected: dict[str, Any] = {}
    for file in [recipe, *pieces]:
        laid_over(expected, yaml.safe_load(file.read_text()))
    require_within(expected, whole)


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Deep for dictionaries, unless the class changes; lists are replaced, or added to."""
    for key, value in above.items():
        if key.endswith("+"):
            below[key[:-1]] = [*below.get(key[:-1], []), *value]
        elif isinstance(value, dict) and isinstance(below.get(key), dict):
            if value.get("class_path", below[key].get("class_path")) != below[key].get("class_path"):
                below[key] = value
            else:
                laid_over(below[key], value)
        else:
            below[key] = value


def test_a_later_word_wins(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, piece = ROOT / "recipes" / "digits.yaml", ROOT / "configs" / "strategy" / "continuous.yaml"
    words = ("--trainer.strategy.extra_in_flight=1", "--trainer.max_epochs=3", "--model.depth=4")
    whole = yaml.safe_load(printed(capsys, recipe, piece, words=words))
    assert whole["trainer"]["strategy"]["init_args"]["extra_in_flight"] == 1
    assert whole["trainer"]["max_epochs"] == 3
    assert whole["model"]["init_args"] == {"depth": 4, "width": 128, "dropout": 0.1, "learning_rate": 0.001}


STRATEGY = "lightning_cpipe.ContinuousPipeStrategy"


@pytest.mark.parametrize(
    ("text", "words", "stages"),
    [
        ("", (), "auto"),
        ("", ("--trainer.strategy.num_stages=4",), 4),
        ("trainer: {strategy: {num_stages: 4}}", (), 4),
        (f"trainer: {{strategy: {{class_path: {STRATEGY}, init_args: {{num_stages: 4}}}}}}", (), 4),
        ("trainer: {strategy: {class_path: ContinuousPipeStrategy, init_args: {num_stages: 4}}}", (), 4),
        ("trainer: {strategy: {init_args: {num_stages: 3}}}", ("--trainer.strategy.num_stages=4",), 4),
    ],
)
def test_every_way_to_set_the_strategys_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: tuple[str, ...], stages: Any
) -> None:
    """The class need not be named."""
    over = tmp_path / "over.yaml"
    over.write_text(text or "trainer: {}")
    model = ("--model=lightning_cpipe.demos.digits.DigitsClassifier",)
    strategy = yaml.safe_load(printed(capsys, over, words=(*model, *words)))["trainer"]["strategy"]
    assert strategy["class_path"] == STRATEGY
    assert strategy["init_args"]["num_stages"] == stages


@pytest.mark.parametrize(
    "name",
    [
        "auto",
        "continuous_pipe",
        *(pytest.param(each, marks=pytest.mark.full) for each in ("continuous_pipe_fork", "ddp")),
    ],
)
def test_a_strategy_may_be_named(capsys: pytest.CaptureFixture[str], name: str) -> None:
    words = ("--model=lightning_cpipe.demos.digits.DigitsClassifier", f"--trainer.strategy={name}")
    assert yaml.safe_load(printed(capsys, words=words))["trainer"]["strategy"] == name


def test_a_plan_is_given_by_its_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.csv"
    path.write_text("0F0,0B0\n1F0,1B0\n")
    words = ("--model=lightning_cpipe.demos.digits.DigitsClassifier", f"--trainer.strategy.schedule={path}")
    strategy = yaml.safe_load(printed(capsys, words=words))["trainer"]["strategy"]
    assert strategy["init_args"]["schedule"] == str(path)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--trainer.strategy.stages=3"], ["trainer.strategy", "'stages' is not accepted"]),
        (["--trainer.strategy.versions=newest"], ["versions", "stash", "latest", "vertical", "newest"]),
        (["--trainer.strategy.num_stages=many"], ["num_stages", "many"]),
        (["--trainer.epochs=3"], ["--trainer.epochs=3"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--config", "{wrong}"], ["trainer.max_step"]),
        (["--model=NoSuchModule"], ["NoSuchModule"]),
    ],
)
def test_what_can_not_be_understood_is_named_and_the_status_is_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("trainer: {max_step: 3}")
    recipe = str(ROOT / "recipes" / "digits.yaml")
    with pytest.raises(SystemExit) as ended:
        cpipe("fit", "--config", recipe, *(word.format(wrong=wrong) for word in words))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: cpipe fit --config recipe.yaml [--key.subkey=value ...]\n")
    assert "error: " in said
    assert not [part for part in parts if part not in said], said
    assert len(said.splitlines()) < 20


def test_help_says_which_command_does_what(capsys: pytest.CaptureFixture[str]) -> None:
    cpipe("--help")
    said = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict", "schedule", "continuous_pipe"):
        assert word in said
    # The example works.
    (example,) = re.findall(r"cpipe fit --config (\S+)", said)
    assert (ROOT / example).is_file()


@pytest.mark.parametrize(
    "command", ["fit", *(pytest.param(each, marks=pytest.mark.full) for each in ("validate", "test", "predict"))]
)
def test_a_commands_help_lists_its_options(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cpipe(command, "--help")
    assert not ended.value.code
    said = capsys.readouterr().out
    assert said.startswith(f"usage: cpipe {command} --config recipe.yaml [--key.subkey=value ...]\n")
    for option in ("--config", "--print_config", "--trainer.max_epochs", "--trainer.strategy", "--ckpt_path"):
        assert option in said


def test_the_strategys_help_tells_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cpipe("fit", f"--trainer.strategy.help={STRATEGY}")
    assert not ended.value.code
    said = capsys.readouterr().out
    for option in ("num_stages", "split_points", "extra_in_flight", "cross_epoch", "check", "timeout", "start_method"):
        assert f"--trainer.strategy.{option}" in said or f"--trainer.strategy.init_args.{option}" in said, said
    assert "how much further forwards run ahead" in said
