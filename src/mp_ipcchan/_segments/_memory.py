"""Mappings of a file, shared or private, that keep no descriptor of it open.

The mapping alone keeps the file alive, and its open file description with it, locks included. So as
many messages can be held as the kernel allows mappings (65,530), whatever ``ulimit -n`` says.
``mmap`` can do so from Python 3.13 on; before, it keeps a duplicate of the descriptor.
"""

from __future__ import annotations

import errno
import mmap
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

PAGE = mmap.PAGESIZE
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_PRIVATE = mmap.MAP_PRIVATE | _MAP_NORESERVE

if sys.version_info >= (3, 13):

    def _map(fd: int, size: int, flags: int) -> mmap.mmap:
        return mmap.mmap(fd, size, flags, trackfd=False)

else:

    @cache
    def _functions() -> tuple[Callable[..., Any], Callable[[mmap.mmap], int]]:
        """C's ``mmap``, and what tells where a mapping lies. Imports ctypes, so only when it is needed."""
        import ctypes

        function = ctypes.CDLL(None, use_errno=True).mmap
        function.restype = ctypes.c_void_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

        def checked(*args: int) -> None:
            if function(*args) != args[0]:
                number = ctypes.get_errno() or errno.ENOMEM
                raise OSError(number, f"can't map {args[1]} bytes of shared memory")

        return checked, lambda region: ctypes.addressof(ctypes.c_char.from_buffer(region))

    def _map(fd: int, size: int, flags: int) -> mmap.mmap:
        map_at, address_of = _functions()
        # Private memory that is never touched, and the file in its place. So the object unmaps it in C, when
        # it is collected: no signal's handler can interrupt that.
        region = mmap.mmap(-1, size, flags=_PRIVATE | mmap.MAP_ANONYMOUS)
        map_at(address_of(region), size, mmap.PROT_READ | mmap.PROT_WRITE, flags | _MAP_FIXED, fd, 0)
        return region


def map_shared(fd: int, size: int, *, entirely: bool = False) -> mmap.mmap:
    """The first ``size`` bytes of ``fd``, writable, until the object is collected. Raises ``OSError``.

    ``entirely``: all of it will be written to. The kernel finds all pages at once, then, not each when it is touched.
    """
    return _map(fd, size, mmap.MAP_SHARED | (mmap.MAP_POPULATE if entirely else 0))


def map_private(fd: int, size: int) -> mmap.mmap:
    """As ``map_shared``, but what is written there is this process's alone: it takes memory, page by page."""
    return _map(fd, size, _PRIVATE)
