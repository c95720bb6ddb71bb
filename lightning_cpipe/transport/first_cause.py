"""Why a pipeline ended, in one sentence that every rank agrees on."""

from __future__ import annotations

import sys
from typing import NamedTuple

GONE = "its process is gone (killed?)"
SILENT = "it was silent for"
ORPHANED = "the process that launched it is gone"


class FirstCause(NamedTuple):
    """Why the pipeline ended.

    Attributes:
        rank: that failed first.
        text: one sentence that names stage, rank, mini-batch and error.
        is_mute: whether that rank can't say it itself.
    """

    rank: int
    text: str
    is_mute: bool = False

    @classmethod
    def of(cls, rank: int, stage: int | str, story: str, *, is_mute: bool = False) -> FirstCause:
        """The cause in one sentence.

        Args:
            rank: that failed first.
            stage: that it holds; in words where it holds several: ``2-3``.
            story: what happened.
            is_mute: whether that rank can't say it itself.
        """
        return cls(rank, f"{_beginning(rank, stage)}{story}", is_mute)

    def tells(self, story: str, stage: int | str) -> bool:
        """Whether the story begins so; an error's own text never does."""
        return self.text.startswith(_beginning(self.rank, stage) + story)


def _beginning(rank: int, stage: int | str) -> str:
    return f"the pipeline ended because stage {stage} (rank {rank}) failed: "


def sentence_if_killed(rank: int, stage: int | str) -> str:
    """The last words of a rank that could not say any."""
    return FirstCause.of(rank, stage, f"{GONE}; it was at mini-batch {{batch}}").text


def say(cause: FirstCause) -> None:
    """Print the first cause as the last thing on the screen."""
    sys.stderr.write(f"\nlightning_cpipe: {cause.text}\n")
    sys.stderr.flush()
