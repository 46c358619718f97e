"""Mapped memory that costs no descriptor: the pages of a memfd, shared with whoever maps them, too.

Python's ``mmap`` keeps a duplicate of the descriptor for as long as the pages are mapped, up to 3.12
always; a program that holds a thousand of them runs out of descriptors.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from typing import Any

if sys.version_info >= (3, 13):

    def map_shared(fd: int, size: int) -> memoryview:
        """The first ``size`` bytes (at least 1) of the file, writable; ``fd`` stays the caller's, who may close it.

        The pages stay mapped for as long as anything made from the view lives. Raises ``OSError``.
        """
        return memoryview(mmap.mmap(fd, size, trackfd=False))

else:

    def map_shared(fd: int, size: int) -> memoryview:
        """The first ``size`` bytes (at least 1) of the file, writable; ``fd`` stays the caller's, who may close it.

        The pages stay mapped for as long as anything made from the view lives. Raises ``OSError``.
        """
        # Imported late: it takes longer to import than all of this package.
        import ctypes

        libc = _libc()
        address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        pages = (ctypes.c_ubyte * size).from_address(address)
        # The views hold the array, so it dies when nobody can reach the pages any more.
        weakref.finalize(pages, libc.munmap, address, size).atexit = False
        return memoryview(pages).cast("B")

    _library: list[Any] = []

    def _libc() -> Any:
        import ctypes

        if not _library:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_ssize_t,
            ]
            libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
            _library.append(libc)
        return _library[0]
