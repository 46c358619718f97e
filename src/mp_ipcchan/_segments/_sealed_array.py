"""Large arrays that are passed on without being copied again.

A large array that is read-only goes into a segment of its own, which is sealed against every further write. Its
receiver maps that *privately*: the array is writable there, and where it is written to, the kernel gives this
process a page of its own; nobody else ever sees that. So what was received can be sent on as the segment it came
in, as long as none of its pages is such a copy. The kernel tells that, too, in ``/proc/self/pagemap``. Where it
doesn't, or where the array was written to, it is copied as any other.

Nothing is counted or named: the kernel frees the memory with the last message and the last array that has it, of
any process.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .._message import Descriptors, Handle, HandleKind
from ..errors import ProtocolError
from . import _segment
from ._memory import PAGE, map_private
from ._segment_pool import MOST_BYTES

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]

#: From how many bytes on: what is smaller goes in memory that its sender keeps, and to copy it there costs less than
#: the page faults of whoever maps it anew.
SEALED_FROM = MOST_BYTES

#: Of an entry of pagemap: the page is in memory, or swapped out, and is the file's, not this process's.
_PRESENT, _SWAPPED, _FILES = 1 << 63, 1 << 62, 1 << 61
_ENTRY = 8
#: How much of it is read at a time (bytes).
_STRIDE = 1 << 20


class Bytes:
    """The bytes of an array, for numpy, as if they could be written to: the last ``base`` of the arrays in them."""

    __slots__ = ("__array_interface__", "_array", "address")

    def __init__(self, array: Array) -> None:
        #: Keeps them there.
        self._array = array
        self.address: int = _address(array)
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (array.nbytes,),
            "data": (self.address, False),
        }


class _Pages(Bytes):
    """A sealed segment as a received array has it mapped."""

    __slots__ = ("descriptors",)

    def __init__(self, fd: int, size: int) -> None:
        import numpy as np

        super().__init__(np.frombuffer(map_private(fd, size), np.uint8))
        #: What it takes to send it on; only while there are plenty.
        self.descriptors = Descriptors([])
        self.descriptors.fds.extend(map(os.dup, (fd,)))
        if self.descriptors.fds[0] >= _segment.plenty():
            self.descriptors.close()


class _SealedHandle:
    """A sealed segment that a message takes along."""

    __slots__ = ("_descriptors", "kind")

    def __init__(self, descriptors: Descriptors) -> None:
        self.kind = HandleKind.SEGMENT
        self._descriptors: Descriptors | None = descriptors

    def fileno(self) -> int:
        return self._descriptors.fds[0] if self._descriptors is not None else -1

    def sent(self) -> None:
        # Closed with the last that has them: the array, or other messages.
        self._descriptors = None

    unsent = sent


#: What tells an array in a segment: its type, shape, order, and where it begins.
Description: TypeAlias = "tuple[np.dtype[Any], tuple[int, ...], str, int]"


def pack(array: Array) -> tuple[Description, Handle] | None:
    """How ``array``, a large one, goes as a sealed segment, or None where it is to go as any other."""
    if array.dtype.hasobject or not array.flags.forc:
        return None
    pages = _pages_of(array)
    offset = 0
    if pages is not None and pages.descriptors.fds and _is_untouched(array):
        descriptors = pages.descriptors
        offset = _address(array) - pages.address
    elif array.flags.writeable:
        return None
    else:
        descriptors = Descriptors([])
        try:
            _segment.create([_bytes_of(array)], descriptors.fds, final=True)
        except OSError:
            # The ordinary way needs less, or says what is missing.
            return None
    return (array.dtype, array.shape, order_of(array), offset), _SealedHandle(descriptors)


def unpack(fd: int, dtype: np.dtype[Any], shape: Sequence[int], order: Any, offset: int) -> Array:
    """The array that was packed, writable. ``fd`` stays the caller's. Raises ``ProtocolError``."""
    import numpy as np

    size = os.fstat(fd).st_size
    needed = math.prod(shape) * dtype.itemsize
    _segment.check(fd, offset + needed, size, final=True)
    if offset < 0 or needed <= 0:
        raise ProtocolError("an array was sent that lies outside of its segment")
    memory: Array
    try:
        memory = np.asarray(_Pages(fd, size))
    except OSError:
        # This process has all the mappings that it may have.
        memory, offset = np.frombuffer(_segment.read(fd, needed, offset), np.uint8), 0
    array: Array = np.ndarray(shape, dtype, memory, offset, order=order)
    return array


def order_of(array: Array) -> Literal["C", "F"]:
    """In which order its items lie, without gaps."""
    return "C" if array.flags.c_contiguous else "F"


def _pages_of(array: Array) -> _Pages | None:
    numpy = sys.modules["numpy"]
    base: Any = array
    while isinstance(base, numpy.ndarray):
        base = base.base
    return base if isinstance(base, _Pages) else None


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _bytes_of(array: Array) -> memoryview:
    """Its bytes in their order; also of a type that is no buffer, such as a date."""
    flat: Any = (array if array.flags.c_contiguous else array.T).reshape(-1)
    return memoryview(flat.view("u1"))


def _is_untouched(array: Array) -> bool:
    """Whether all of its pages, which are mapped privately, are still the file's; False where that can't be told."""
    start = _address(array)
    first, last = (start // PAGE) * _ENTRY, -(-(start + array.nbytes) // PAGE) * _ENTRY
    opened = Descriptors([])
    try:
        opened.fds.extend(map(os.open, ("/proc/self/pagemap",), (os.O_RDONLY | os.O_CLOEXEC,)))
        return all(
            _are_the_file_s(os.pread(opened.fds[0], _STRIDE, at), min(_STRIDE, last - at))
            for at in range(first, last, _STRIDE)
        )
    except (OSError, ValueError):
        return False
    finally:
        opened.close()


def _are_the_file_s(entries: bytes, size: int) -> bool:
    """Whether the pages of these entries, of ``size`` bytes, are, as far as there are any."""
    import numpy as np

    if len(entries) < size:
        return False
    words = np.frombuffer(entries[:size], np.uint64)
    has_page = (words & np.uint64(_PRESENT | _SWAPPED)) != 0
    return not (has_page & ((words & np.uint64(_FILES)) == 0)).any()
