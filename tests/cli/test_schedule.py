"""``cpipe schedule`` prints the paper's three tables cell for cell, with their bubbles, and says what it can't draw."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lightning_cpipe import __version__
from lightning_cpipe.cli.main import main
from lightning_cpipe.schedules import SCHEDULES, Continuous
from lightning_cpipe.schedules.action import Kind, Row
from lightning_cpipe.schedules.table import Table

# Typed off the paper, "ContinuousPipe: eliminate bubbles in the pipe parallel completely".

CONTINUOUS_PIPE = """
0MF  *   1MF  *   2MF  *   3MF  0MB  4MF  1MB  5MF  2MB  6MF  3MB  7MF  4MB  8MF  5MB  9MF  6MB 10MF  7MB 11MF  8MB 12MF  9MB
 *  0MF   *  1MF   *  2MF  0MB  3MF  1MB  4MF  2MB  5MF  3MB  6MF  4MB  7MF  5MB  8MF  6MB  9MF  7MB 10MF  8MB 11MF  9MB 12MF
 *   *   0MF  *   1MF 0MB  2MF  1MB  3MF  2MB  4MF  3MB  5MF  4MB  6MF  5MB  7MF  6MB  8MF  7MB  9MF  8MB 10MF  9MB 11MF 10MB
 *   *    *  0MF  0MB 1MF  1MB  2MF  2MB  3MF  3MB  4MF  4MB  5MF  5MB  6MF  6MB  7MF  7MB  8MF  8MB  9MF  9MB 10MF 10MB 11MF
"""  # noqa: E501

GPIPE = """
0F  1F  2F  3F  4F  5F  6F  7F   *   *   *   *   *   *  7B  6B  5B  4B  3B  2B  1B  0B
 *  0F  1F  2F  3F  4F  5F  6F  7F   *   *   *   *  7B  6B  5B  4B  3B  2B  1B  0B   *
 *   *  0F  1F  2F  3F  4F  5F  6F  7F   *   *  7B  6B  5B  4B  3B  2B  1B  0B   *   *
 *   *   *  0F  1F  2F  3F  4F  5F  6F  7F  7B  6B  5B  4B  3B  2B  1B  0B   *   *   *
"""

PIPE_DREAM = """
0F   *  1F   *  2F   *  3F  0B  4F  1B  5F  2B  6F  3B  7F  4B   *  5B   *  6B   *  7B
 *  0F   *  1F   *  2F  0B  3F  1B  4F  2B  5F  3B  6F  4B  7F  5B   *  6B   *  7B   *
 *   *  0F   *  1F  0B  2F  1B  3F  2B  4F  3B  5F  4B  6F  5B  7F  6B   *  7B   *   *
 *   *   *  0F  0B  1F  1B  2F  2B  3F  3B  4F  4B  5F  5B  6F  6B  7F  7B   *   *   *
"""

# Arguments, the paper's table, and the lines below it: counted by hand, the ratios by the paper's formulas
# (6/19 for ContinuousPipe, 3/11 for the others) and as idle slots over all slots.
PAPER = [
    pytest.param(
        ["--stages", "4", "--mini-batches", "13", "--slots", "26"],
        CONTINUOUS_PIPE,
        "window of 26 slots x 4 stages: 104 slots, 12 idle; bubble ratio 0.3158 (paper), 0.1154 (slot-exact)",
        "whole run of 13 mini-batches: 128 slots, 24 idle; bubble ratio 0.3158 (paper), 0.1875 (slot-exact)",
        "each stage, at most: in flight 4 3 2 1; versions of its weights 4 3 2 1; updates late 3 2 1 0",
        id="ContinuousPipe",
    ),
    pytest.param(
        ["--schedule", "gpipe", "--stages", "4", "--micro-batches", "8"],
        GPIPE,
        "window of 22 slots x 4 stages: 88 slots, 24 idle; bubble ratio 0.2727 (paper), 0.2727 (slot-exact)",
        "whole step of 8 micro-batches: 88 slots, 24 idle; bubble ratio 0.2727 (paper), 0.2727 (slot-exact)",
        "each stage, at most: in flight 8; versions of its weights 1; updates late 0",
        id="GPipe",
    ),
    pytest.param(
        ["--schedule", "1f1b", "--stages", "4", "--micro-batches", "8"],
        PIPE_DREAM,
        "window of 22 slots x 4 stages: 88 slots, 24 idle; bubble ratio 0.2727 (paper), 0.2727 (slot-exact)",
        "whole step of 8 micro-batches: 88 slots, 24 idle; bubble ratio 0.2727 (paper), 0.2727 (slot-exact)",
        "each stage, at most: in flight 4 3 2 1; versions of its weights 1; updates late 0",
        id="PipeDream",
    ),
]


class Cpipe:
    """Runs ``cpipe`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> str:
        """What the command prints."""
        main(words)
        printed = self._capsys.readouterr()
        assert printed.err == ""
        return printed.out

    def refused(self, *words: str) -> str:
        """What the command says of arguments that it exits from with status 2."""
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        printed = self._capsys.readouterr()
        assert printed.out == ""
        return printed.err


@pytest.fixture
def cpipe(capsys: pytest.CaptureFixture[str]) -> Cpipe:
    return Cpipe(capsys)


def cells(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


@pytest.mark.parametrize(("arguments", "table", "window", "whole", "per_stage"), PAPER)
def test_the_papers_table_is_printed_cell_for_cell_with_its_bubbles_below(
    cpipe: Cpipe, arguments: list[str], table: str, window: str, whole: str, per_stage: str
) -> None:
    grid, _, summary = cpipe("schedule", *arguments).partition("\n\n")
    lines = [line.split("|") for line in grid.splitlines()]
    assert [head.strip() for head, _ in lines] == ["slot", "stage 0", "stage 1", "stage 2", "stage 3"]
    slots, *rows = [row.split() for _, row in lines]
    assert rows == cells(table)
    assert slots == [str(slot) for slot in range(len(rows[0]))]
    assert summary.splitlines() == [window, whole, per_stage]


@pytest.mark.parametrize(("arguments", "table", "window", "whole", "per_stage"), PAPER)
def test_the_papers_table_is_the_same_in_json(
    cpipe: Cpipe, arguments: list[str], table: str, window: str, whole: str, per_stage: str
) -> None:
    told = json.loads(cpipe("schedule", *arguments, "--format", "json"))
    assert [["*" if cell is None else cell for cell in row] for row in told["cells"]] == cells(table)


@pytest.mark.parametrize(
    ("schedule", "unit", "slots"),
    [("continuous", "mini-batch", 32), ("gpipe", "micro-batch", 22), ("1f1b", "micro-batch", 22)],
)
def test_without_arguments_the_papers_sizes_are_shown_whole(cpipe: Cpipe, schedule: str, unit: str, slots: int) -> None:
    told = json.loads(cpipe("schedule", "--schedule", schedule, "--format", "json"))
    assert (told["schedule"], told["unit"], told["stages"]) == (schedule, unit, 4)
    assert told["batches"] == {"mini-batch": 13, "micro-batch": 8}[unit]
    assert told["window"]["slots"] == told["run"]["slots"] == slots
    assert told["window"]["idle_slots"] == told["run"]["idle_slots"] == 24


def test_the_default_is_the_continuous_schedule_as_text(cpipe: Cpipe) -> None:
    assert cpipe("schedule") == Table(Continuous(), 4, 13).text() + "\n"


def test_each_format_is_printed_as_the_table_writes_it(cpipe: Cpipe) -> None:
    table = Table(Continuous(), 3, 5, 7)
    asked = ["schedule", "--stages", "3", "--mini-batches", "5", "--slots", "7", "--format"]
    assert cpipe(*asked, "text") == table.text() + "\n"
    assert cpipe(*asked, "markdown") == table.markdown() + "\n"
    assert cpipe(*asked, "json") == table.json() + "\n"
    assert cpipe(*asked, "svg") == table.svg() + "\n"


def test_markdown_has_a_column_for_the_stage_and_one_per_slot(cpipe: Cpipe) -> None:
    table = cpipe("schedule", "--slots", "26", "--format", "markdown").split("\n\n")[0].splitlines()
    assert len(table) == 2 + 4
    assert {line.count("|") for line in table} == {1 + 1 + 26}


def test_svg_is_a_picture_with_a_rectangle_for_every_cell(cpipe: Cpipe) -> None:
    picture = ElementTree.fromstring(cpipe("schedule", "--slots", "26", "--format", "svg"))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    titles = picture.findall("./{*}rect/{*}title")
    assert len(titles) == 4 * 26
    assert sum((title.text or "").startswith("idle") for title in titles) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "0"], "--stages must be at least 1, not 0."),
        (["--stages", "four"], "argument --stages: invalid int value: 'four'"),
        (["--mini-batches", "0"], "--mini-batches must be at least 1, not 0."),
        (["--mini-batches", "-5"], "--mini-batches must be at least 1, not -5."),
        (["--schedule", "1f1b", "--micro-batches", "0"], "--micro-batches must be at least 1, not 0."),
        (["--slots", "0"], "--slots must be at least 1, not 0."),
        (["--micro-batches", "8"], "--schedule continuous counts mini-batches: give --mini-batches."),
        (
            ["--schedule", "gpipe", "--mini-batches", "8"],
            "--schedule gpipe counts micro-batches: give --micro-batches.",
        ),
        (["--schedule", "1f1b", "--mini-batches", "3"], "--schedule 1f1b counts micro-batches: give --micro-batches."),
        (["--ranks", "0"], "--ranks must be at least 1, not 0."),
        (["--stages", "6", "--ranks", "4"], "6 stages do not go into 4 ranks: --stages must be a multiple."),
        (["--schedule", "interleaved", "--stages", "5"], "5 stages do not go into ranks of 2: --stages must be"),
        (
            ["--schedule", "zb", "--early-input-gradient"],
            "--early-input-gradient is for --schedule continuous, not zb.",
        ),
        (["--accumulate", "0"], "--accumulate must be at least 1, not 0."),
        (["--schedule", "gpipe", "--versions", "2bw"], "--versions is for --schedule continuous, not gpipe."),
        (
            ["--versions", "2bw", "--stages", "4"],
            "--versions 2bw with --accumulate 1: for two versions to be enough, at least 3 mini-batches must share an"
            " update, as many as stage 0 of 4 is ahead. Set --accumulate 3 or more, or --versions stash",
        ),
        (["--versions", "newest"], "argument --versions: there is no policy 'newest'; there are: stash, latest, vert"),
        (["--schedule", "no.csv"], "argument --schedule: the plan 'no.csv' can't be read: No such file"),
        (["--compare", "--format", "svg"], "--compare prints a table: --format text or markdown."),
        (["--compare", "--versions", "2bw"], "--compare shows every schedule whole: leave out --versions."),
        (["--compare", "--schedule", "zb"], "--compare shows every schedule whole: leave out --schedule."),
        (["--compare", "--stages", "8", "--ranks", "4"], "--compare chooses how many stages a rank holds"),
        (["--format", "pdf"], "argument --format: invalid choice: 'pdf'"),
        (["--depth", "4"], "unrecognized arguments: --depth 4"),
    ],
)
def test_bad_arguments_are_refused_with_what_to_give(cpipe: Cpipe, arguments: list[str], message: str) -> None:
    said = cpipe.refused("schedule", *arguments)
    assert said.startswith("usage: cpipe schedule ")
    assert f"cpipe schedule: error: {message}" in said


def test_one_of_everything_is_enough(cpipe: Cpipe) -> None:
    assert "stage 0 | 0MF\n" in cpipe("schedule", "--stages", "1", "--mini-batches", "1", "--slots", "1")


def test_an_unknown_schedule_is_refused_with_all_names(cpipe: Cpipe) -> None:
    said = cpipe.refused("schedule", "--schedule", "pipedream")
    assert "argument --schedule: there is no schedule 'pipedream'" in said
    assert all(name in said.splitlines()[-1] for name in ("continuous", "gpipe", "1f1b", "interleaved", "zb", ".csv"))


def test_a_schedule_with_faults_is_not_drawn_and_all_of_them_are_listed(
    cpipe: Cpipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(Continuous):
        name = "forgetful"

        def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
            for row in super().rows(stage, num_stages, num_batches):
                yield tuple(action for action in row if action.kind is not Kind.UPDATE)

    monkeypatch.setitem(SCHEDULES, "forgetful", Forgetful)
    said = cpipe.refused("schedule", "--schedule", "forgetful", "--stages", "2", "--mini-batches", "2")
    assert said.partition("cpipe schedule: error: ")[2].splitlines() == [
        "the plan has faults:",
        "  stage 0: never updates",
        "  stage 1: never updates",
        "  stage 1: F1 finds version 0 where version 1 is promised",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_drawn_whole_on_four_ranks(cpipe: Cpipe, name: str) -> None:
    told = json.loads(cpipe("schedule", "--schedule", name, "--format", "json"))
    assert len(told["cells"]) == 4
    assert told["stages"] == {"interleaved": 8}.get(name, 4)
    assert told["window"] == told["run"]


def test_a_rank_may_hold_several_stages(cpipe: Cpipe) -> None:
    grid = cpipe("schedule", "--stages", "6", "--ranks", "2", "--mini-batches", "2").splitlines()
    assert [line.split(" | ")[0] for line in grid[1:3]] == ["stages 0, 1, 2", "stages 3, 4, 5"]
    one = cpipe("schedule", "--schedule", "gpipe", "--stages", "3", "--ranks", "1", "--micro-batches", "1")
    assert "stages 0, 1, 2 | 0F0 1F0 2F0 2B0 1B0 0B0\n" in one
    grid = cpipe("schedule", "--schedule", "interleaved", "--ranks", "2", "--micro-batches", "2").splitlines()
    assert [line.split(" | ")[0] for line in grid[1:3]] == ["stages 0, 2", "stages 1, 3"]


def test_backwards_may_be_split(cpipe: Cpipe) -> None:
    drawn = cpipe("schedule", "--stages", "2", "--mini-batches", "2", "--early-input-gradient")
    assert "stage 1 |   * 0MF 0MI 0MW 1MF 1MI 1MW   *\n" in drawn


@pytest.mark.parametrize(
    ("asked", "versions", "late"),
    [
        ("--accumulate 3", "2 2 2 1", "1 1 1 0"),
        ("--versions vertical", "4", "3"),
        ("--versions 2bw --accumulate 3", "2", "1"),
        ("--versions latest", "1", "3 2 1 0"),
    ],
)
def test_what_a_version_policy_costs_is_told(cpipe: Cpipe, asked: str, versions: str, late: str) -> None:
    told = f"in flight 4 3 2 1; versions of its weights {versions}; updates late {late}"
    assert cpipe("schedule", *asked.split()).splitlines()[-1] == f"each stage, at most: {told}"


def test_a_plan_is_written_as_csv_and_read_checked_and_drawn_from_there(cpipe: Cpipe, tmp_path: Path) -> None:
    asked = ["schedule", "--schedule", "interleaved", "--ranks", "2", "--micro-batches", "2"]
    written = cpipe(*asked, "--format", "csv")
    assert written == "0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1\n"
    file = tmp_path / "plan.csv"
    file.write_text(written)
    read = cpipe("schedule", "--schedule", str(file))
    assert read.partition("\n\n")[0] == cpipe(*asked).partition("\n\n")[0]
    assert "whole plan of 2 batches: 20 slots, 4 idle;" in read
    assert cpipe("schedule", "--schedule", str(file), "--format", "csv") == written
    said = cpipe.refused("schedule", "--schedule", str(file), "--stages", "4")
    assert "a plan in a file has its own size: leave out --stages" in said
    folded = cpipe("schedule", "--schedule", str(file), "--ranks", "1", "--format", "csv")
    assert folded.startswith("0F0,1F0,0F1,2F0,1F1,3F0,")
    said = cpipe.refused("schedule", "--schedule", str(file), "--ranks", "3")
    assert "--ranks 3: the plan is for 2 ranks. Give a divisor of that" in said


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (
            b"0F0,0F1,0B0\n1F0,1B0,1B1\n",
            [
                "the plan has faults:",
                "  stage 1, row 2: B1 before F1",
                "  stage 0: F1 has no B1",
                "  stage 0: F1 as its F number 1, but stage 1 nothing",
                "  stage 0: nothing as its B number 1, but stage 1 B1",
            ],
        ),
        (
            b"0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
            [
                "the plan has faults:",
                *(f"  stage {s}, row 1: RECV_{a} waits for ever" for s, a in ((0, "B0"), (1, "F1"))),
            ],
        ),
        (b"", ["argument --schedule: the plan is empty: write one line for each rank, for example 0F0,0B0."]),
        (b"\n,,\n", ["argument --schedule: the plan is empty: write one line for each rank, for example 0F0,0B0."]),
        (b"\xff", ["argument --schedule: the plan 'plan.csv' can't be read: it is no text."]),
    ],
)
def test_the_faults_of_a_plan_in_a_file_are_listed(
    cpipe: Cpipe, text: bytes, faults: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.csv").write_bytes(text)
    said = cpipe.refused("schedule", "--schedule", "plan.csv")
    assert said.partition("cpipe schedule: error: ")[2].splitlines() == faults


def test_all_schedules_are_compared(cpipe: Cpipe) -> None:
    printed = cpipe("schedule", "--compare", "--ranks", "2", "--micro-batches", "4", "--mini-batches", "50")
    table, _, legend = printed.partition("\n\n")
    lines = {line.split("|")[0].strip(): [cell.strip() for cell in line.split("|")[1:]] for line in table.splitlines()}
    assert set(SCHEDULES) <= set(lines)
    assert lines["1f1b"] == ["15", "20.0%", "2", "2 1", "1", "0"]
    assert lines["zb"] == ["13", "7.7%", "2", "2", "1", "0"]
    assert lines["continuous"][1:] == ["2.0%", "2", "2 1", "2 1", "1 0"]
    assert lines["continuous, vertical"][1:] == ["2.0%", "2", "2 1", "2", "1"]
    assert lines["continuous, latest"][1:] == ["2.0%", "2", "2 1", "1", "1 0"]
    assert "a run of 50 mini-batches" in legend
    assert cpipe("schedule", "--compare", "--format", "markdown").startswith("| schedule | slots |")


def test_an_unknown_command_is_refused_with_the_help(cpipe: Cpipe) -> None:
    said = cpipe.refused("shedule")
    assert said.startswith("usage: cpipe COMMAND [OPTIONS]")
    assert said.endswith("cpipe: there is no command 'shedule'.\n")


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(cpipe: Cpipe, words: list[str]) -> None:
    said = cpipe(*words)
    assert said.startswith("usage: cpipe COMMAND [OPTIONS]")
    assert "fit, validate, test, predict" in said
    assert "schedule" in said


def test_the_version_is_told(cpipe: Cpipe) -> None:
    assert cpipe("--version") == f"cpipe {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [[Path(sys.executable).with_name("cpipe")], [sys.executable, "-m", "lightning_cpipe"]],
    ids=["cpipe", "python -m lightning_cpipe"],
)
def test_the_command_is_the_same_from_a_shell(cpipe: Cpipe, command: list[str | Path]) -> None:
    asked = ["schedule", "--schedule", "gpipe", "--stages", "3"]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", cpipe(*asked))
    refused = subprocess.run([*command, "schedule", "--stages", "0"], capture_output=True, timeout=30, check=False)
    assert refused.returncode == 2
