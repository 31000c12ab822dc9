"""Large arrays without new pages each time.

glibc gives arrays above 32 MiB back to the system at once, and the next one of that size costs a page fault per 4 KiB: about a tenth
of the time of a network whose highest level has 32 features. Here they are kept for the next tile instead, and given back at the end.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

#: parameters of glibc's mallopt (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MIB = 2**20
#: (kept when freed on top, from where on arrays are mapped alone): while predicting; and where glibc's own adjustment ends
KEEP, USUAL = (2047 * MIB, 512 * MIB), (64 * MIB, 32 * MIB)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Freed arrays of up to 512 MiB stay with the process while this is open; nothing happens where the C library is not glibc."""
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if library is None:
        yield
        return
    _set(library, KEEP)
    try:
        yield
    finally:
        _set(library, USUAL)
        library.malloc_trim(ctypes.c_size_t(0))


def _set(library: ctypes.CDLL, limits: tuple[int, int]) -> None:
    for parameter, limit in zip((M_TRIM_THRESHOLD, M_MMAP_THRESHOLD), limits, strict=True):
        library.mallopt(parameter, limit)
