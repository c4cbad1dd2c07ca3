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

    By default glibc maps each tensor above 32 MB anew and unmaps it when it is freed, so every step touches
    fresh pages, each a page fault. The price is that freed memory is never returned to the system.
    FASTLM_KEEP_FREED_MEMORY=0 turns it off. Elsewhere than on glibc nothing is done.

    Measured with PyTorch's operators on one thread of a Xeon with AMX (4 layers of 384, 8 x 256 tokens,
    bfloat16, median CPU time of a step, two interleaved rounds): with a vocabulary of 32768, whose logits
    are large, 1.48 and 1.45 s became 1.03 and 1.04 s, 366,000 page faults a step became fewer than 10,000,
    and the peak rose from 2.1 to 2.6-2.9 GB; with one of 2048 the difference was within the noise (5 %).
    """
    if os.environ.get("FASTLM_KEEP_FREED_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEEP_ALL), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
