"""What a rank would say if it were killed this moment, kept in a file that outlives it.

A process that gets SIGKILL says nothing. So each rank keeps one sentence in a small memory-mapped file, with the
number of the mini-batch it is at; keeping it up to date costs a third of a microsecond. Others read it when the rank
is gone. Under torchrun the file is the one in which torch's elastic agent looks for a worker's error, so that the
agent's own report says it too.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
import time
from pathlib import Path

_DIGITS = 12
_HOLE = "#" * _DIGITS


class LastWords:
    """One rank's file.

    Args:
        sentence: with ``{batch}`` where the number of the mini-batch goes.
        folder: where to put the file; None for the folder of temporary files. Under torchrun the agent decides.
    """

    def __init__(self, sentence: str, folder: str | None = None) -> None:
        agents_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        text = sentence.format(batch=_HOLE)
        if agents_file is not None:
            self.path = Path(agents_file)
            self._write(_as_agents_report(text))
        else:
            handle, name = tempfile.mkstemp(prefix="lightning_cpipe_", suffix=".txt", dir=folder)
            os.close(handle)
            self.path = Path(name)
            self._write(text)
        with self.path.open("r+b") as file:
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0)
        self._at = self._map.find(_HOLE.encode())
        self.at(0)

    def at(self, batch: int) -> None:
        """The rank is at this mini-batch now."""
        if self._map is not None:
            self._map[self._at : self._at + _DIGITS] = b"%12d" % batch

    def replace(self, text: str) -> None:
        """Say something else; for good."""
        self._close()
        self._write(_as_agents_report(text) if "TORCHELASTIC_ERROR_FILE" in os.environ else text)

    def forget(self) -> None:
        """The rank ended well."""
        self._close()
        self.path.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        self.path.write_text(text)

    def _close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


def read_last_words(path: str | None) -> str | None:
    """What the file of a rank that is gone says; None if it can't be read here."""
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):
        text = Path(path).read_text()
        words = json.loads(text)["message"]["message"] if text.startswith("{") else text
        return " ".join(str(words).split())
    return None


def _as_agents_report(text: str) -> str:
    extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
    return json.dumps({"message": {"message": text, "extraInfo": extra}})
