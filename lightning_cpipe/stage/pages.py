"""Gives memory on the CPU back to the system.

Freed and taken again, memory of many sizes comes to lie in a heap full of holes that no tensor fits into, and a process
that never needs much at once grows all the same.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch

_LIBC = ctypes.CDLL(None, use_errno=True)


def drop_numbers(storage: torch.UntypedStorage) -> None:
    """Lose what a storage on the CPU holds, and the memory that it takes until it is written to again."""
    begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def keep_tensors_out_of_the_heap() -> None:
    """From here on, in this process, the C library gives memory of 256 KB and more back as soon as it is freed.

    It leaves that alone where the user has set it, in ``MALLOC_MMAP_THRESHOLD_``.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_MMAP_THRESHOLD, 2**18)


def let_tensors_into_the_heap() -> None:
    """The opposite: freed memory is kept and used again, as the C library does once it has freed large pieces.

    A step that makes tensors anew each time takes far less CPU time so.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_MMAP_THRESHOLD, 2**25)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 2**26)


_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
