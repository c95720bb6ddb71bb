"""Gives the memory of a tensor back to the system, while the tensor stays where it is.

Freed and taken again, memory of many sizes comes to lie in a heap full of holes that no tensor fits into, and a process
that never needs much at once grows all the same.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

_LIBC = ctypes.CDLL(None, use_errno=True)


def drop_numbers(storage: torch.UntypedStorage) -> None:
    """Lose what a storage on the CPU holds, and the memory that it takes until it is written to again."""
    begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
