"""What a rank would say if it were killed this moment, kept in a file that outlives it.

A process that gets SIGKILL says nothing. So each rank keeps a sentence in a small memory-mapped file, with the number
of the mini-batch it is at, which costs a write to memory. Others read it when the rank is gone.
Under torchrun it is the file in which the elastic agent looks for a worker's error, so the agent's report says it too.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_DIGITS = 12
_HOLE = "#" * _DIGITS


class LastWords:
    """One rank's file.

    Args:
        sentence: with ``{batch}`` where the number of the mini-batch goes.
        path: of the file; None for a temporary one. Under torchrun the agent decides.
    """

    def __init__(self, sentence: str, path: Path | None = None) -> None:
        agents_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._for_agent = path is None and agents_file is not None
        self._folder = None if path is None else path.parent
        self.is_awaited = path is not None or self._for_agent
        """Whether the process that launched this one reads the file at the end, and removes it."""
        self.path = path or Path(agents_file or _temporary_file())
        self._write(sentence.format(batch=_HOLE))
        with self.path.open("r+b") as file:
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0)
        self._hole = self._map.find(_HOLE.encode())
        self.at(0)

    def at(self, batch: int) -> None:
        """The rank is at this mini-batch now."""
        if self._map is not None:
            self._map[self._hole : self._hole + _DIGITS] = b"%12d" % batch

    def replace(self, text: str) -> None:
        """Say something else, for good."""
        self._close()
        self._write(text)

    def replace_at(self, path: Path, text: str) -> None:
        """Say it in place of another rank, whose file this is and which can't any more."""
        # A new file in one move: whoever reads meanwhile sees the old words or the new ones.
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(_agents_report(text) if self._for_agent else text)
        fresh.replace(path)

    def forget(self, *, with_folder: bool = False) -> None:
        """The rank ended well, or nobody will ask.

        Args:
            with_folder: whether the launcher, which made the folder, is gone; the last rank removes it.
        """
        self._close()
        self.path.unlink(missing_ok=True)
        if with_folder and self._folder is not None:
            with suppress(OSError):
                self._folder.rmdir()

    def _write(self, text: str) -> None:
        self.replace_at(self.path, text)

    def _close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


def read_last_words(path: str | Path) -> str | None:
    """What a rank's file says; None if it can't be read here."""
    try:
        text = Path(path).read_text()
        words = json.loads(text)["message"]["message"] if text.startswith("{") else text
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return " ".join(str(words).split()) or None


def _temporary_file() -> str:
    handle, name = tempfile.mkstemp(prefix="lightning_cpipe_", suffix=".txt")
    os.close(handle)
    return name


def _agents_report(text: str) -> str:
    return json.dumps({"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}})
