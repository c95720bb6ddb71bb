"""A rank that is killed leaves a sentence behind: where it was, or why it ended."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from lightning_cpipe.transport.first_cause import FirstCause, sentence_if_killed
from lightning_cpipe.transport.last_words import LastWords, read_last_words
from tests.helpers.ranks import run_ranks

SENTENCE = "killed at mini-batch {batch}"


def test_the_number_of_the_mini_batch_is_kept_up_to_date(tmp_path: Path) -> None:
    words = LastWords(SENTENCE, tmp_path / "rank_0")
    assert read_last_words(words.path) == "killed at mini-batch 0"
    for batch in (7, 123_456_789, 8):
        words.at(batch)
        assert read_last_words(words.path) == f"killed at mini-batch {batch}"
    words.forget()


def test_a_killed_process_leaves_its_words(tmp_path: Path) -> None:
    def on_rank(rank: int) -> None:
        words = LastWords(sentence_if_killed(3, 2), tmp_path / "rank_3")
        words.at(41)
        if os.fork() == 0:
            os.kill(os.getpid(), 9)
        os.wait()

    run_ranks(on_rank, 1)
    said = "the pipeline ended because stage 2 (rank 3) failed: its process is gone (killed?); it was at mini-batch 41"
    assert read_last_words(tmp_path / "rank_3") == said


def test_a_cause_replaces_the_words_for_good(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    words = LastWords(SENTENCE, folder / "rank_0")
    words.replace("ValueError: no\n  more")
    words.at(5)
    assert read_last_words(words.path) == "ValueError: no more"
    assert [each.name for each in folder.iterdir()] == ["rank_0"]


def test_a_rank_that_ends_well_leaves_nothing() -> None:
    folder = Path(tempfile.gettempdir())
    words = LastWords(SENTENCE)
    assert words.path.parent == folder
    assert words.path.name.startswith("lightning_cpipe_")
    words.forget()
    words.forget()
    assert not list(folder.iterdir())


def test_under_torchrun_the_words_are_where_its_agent_looks(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        words = LastWords(SENTENCE)
    assert words.is_awaited
    words.at(6)
    assert json.loads(path.read_text())["message"]["message"].split() == ["killed", "at", "mini-batch", "6"]
    assert read_last_words(path) == "killed at mini-batch 6"
    words.replace("said")
    assert read_last_words(path) == "said"


@pytest.mark.parametrize("content", [None, "", "  \n", "{", "{}", '{"message": 1}'])
def test_what_can_not_be_read_is_no_word(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "rank_0"
    if content is not None:
        path.write_text(content)
    assert read_last_words(path) is None


def test_a_cause_names_stage_and_rank() -> None:
    assert FirstCause.of(1, 2, "why").text == "the pipeline ended because stage 2 (rank 1) failed: why"
