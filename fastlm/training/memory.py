"""Let the C library keep the memory that tensors free, so that the next ones need no page faults."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h
KEEP_ALL = -1  # read as the largest size_t
TOP_PAD_BYTES = 64 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from the heap and never to shrink it; True where that took hold.

    By default glibc maps each large tensor anew and unmaps it when it is freed, so every step touches
    fresh pages, each a page fault. Costs: the peak of the process is never returned to the system.
    FASTLM_KEEP_FREED_MEMORY=0 turns it off. Elsewhere than on glibc nothing is done.
    """
    if os.environ.get("FASTLM_KEEP_FREED_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEEP_ALL), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
