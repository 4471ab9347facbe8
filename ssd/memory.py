"""How the process treats memory that it frees."""

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep freed memory for its next use, where it has glibc.

    glibc returns each large block to the system at once. The next image, or the next run of a
    network on a CPU, gets it anew, page by page and filled with zeros, which can take a third of
    its time.
    """
    mallopt = getattr(ctypes.pythonapi, "mallopt", None)  # not on macOS and Windows
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_MMAP_MAX, 0)  # no block by itself
