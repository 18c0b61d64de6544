"""Keeping freed memory: glibc hands large buffers back to the system, and each step pays the page faults again."""

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees and uses it again, which saves a training step about a tenth of its
    time on a CPU (docs/log.md). Returns whether the C library has the settings (glibc does)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
