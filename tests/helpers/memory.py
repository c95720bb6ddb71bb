"""How much memory this process takes, as the system counts it."""

from __future__ import annotations

import ctypes
from pathlib import Path

_STATUS = Path("/proc/self/status")
_LIBC = ctypes.CDLL(None)


def resident() -> int:
    """Bytes in memory now."""
    return _read("VmRSS")


def peak() -> int:
    """The most bytes in memory at once, since the process began or `forget_peak` was called."""
    return _read("VmHWM")


def forget_peak() -> int:
    """Begin to measure anew, without what was freed; returns the bytes in memory now."""
    _LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def _read(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
