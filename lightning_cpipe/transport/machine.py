"""What two processes of one machine can know of each other."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def this_machine() -> list[str]:
    """What two processes share if they see each other's process ids, files and loopback addresses."""
    return [socket.gethostname(), *(_namespace(kind) for kind in ("pid", "net"))]


def is_alive(pid: int | None) -> bool:
    """Whether a process of this machine lives; True if it is of another machine."""
    if pid is None:
        return True
    try:
        os.kill(pid, 0)
        # A process that is dead and not yet collected by its parent still answers to its number.
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except OSError:
        return True


def _namespace(kind: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return ""
