"""``SharedMemory``: anonymous memory that is sent as a handle; whoever receives it maps the same pages.

It has no name that could be left behind: the kernel frees it with its last holder, whether that closes
it, ends or is killed. Nobody can make it shorter (it is sealed), so no peer can kill a reader by doing
so. It is never used again for something else.

A process that receives the same memory again finds it by its inode, as a link is found: however many
handles it has, they take one descriptor, which is kept so that it can be sent on. Mapping takes none.
"""

from __future__ import annotations

import fcntl
import functools
import math
import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, final, overload

from .. import _codec
from .._message import Descriptors, Handle, HandleKind
from ..errors import EndpointClosed, EndpointMoved, ProtocolError
from . import _segment
from ._memory import map_shared

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.typing import DTypeLike
    from typing_extensions import Buffer, Self

#: As ``linux/fcntl.h`` has it; Python's module lacks it.
_F_SEAL_FUTURE_WRITE = 0x10
#: What must not be there: it is everybody's to write to.
_UNWRITABLE = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE
#: How much is filled or compared at a time (bytes): it fits the cache.
_STRIDE = 1 << 20


class _Region:
    """Pages that processes share; this one's hold on them, for all its handles. Owns the descriptor.

    A region of size 0 has none, nor any other object of the operating system's.

    Another object closes the descriptor: while a finalizer of the region's own ran, another thread could find the
    region among ``_regions``, and have it without one.
    """

    __slots__ = ("__weakref__", "_fd", "_fds", "_view", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._view: memoryview | None = None if size else memoryview(bytearray())
        self._fd = fd
        self._fds = Descriptors([fd])

    @classmethod
    def create(cls, size: int) -> _Region:
        return cls.of(_segment.create_blank(size)) if size else cls(-1, 0)

    @classmethod
    def of(cls, fd: int) -> _Region:
        """The region of a descriptor, which is taken over, or closed where this process has the region."""
        try:
            status = os.fstat(fd)
            region = _regions.get(status.st_ino)
            if region is None:
                region = cls(fd, status.st_size)
                # From here on it is the region that closes it.
                fd = -1
                _regions[status.st_ino] = region
            return region
        finally:
            if fd >= 0:
                os.close(fd)

    @property
    def view(self) -> memoryview:
        """The pages, writable; mapped when they are first asked for."""
        view = self._view
        if view is None:
            view = self._view = memoryview(map_shared(self._fd, self.size))
        return view

    def fileno(self) -> int:
        return self._fd

    def write(self, pieces: Iterable[Buffer]) -> None:
        """Write ``pieces`` from the start on. Not through a mapping: that would cost a fault for each page."""
        at = 0
        for piece in pieces:
            rest = memoryview(piece).cast("B")
            while rest:
                written = os.pwrite(self._fd, rest, at)
                at += written
                rest = rest[written:]


#: The regions of this process, by inode. What is in there has its descriptor open, so no number can be another's.
_regions: weakref.WeakValueDictionary[int, _Region] = weakref.WeakValueDictionary()


class _RegionHandle:
    """A region that a message takes along: held, so that its descriptor is there when the message leaves."""

    __slots__ = ("_region", "kind")

    def __init__(self, region: _Region) -> None:
        self.kind = HandleKind.MEMORY
        self._region: _Region | None = region

    def fileno(self) -> int:
        return self._region.fileno() if self._region is not None else -1

    def sent(self) -> None:
        self._region = None

    unsent = sent


@final
class SharedMemory:
    """Memory that processes share, made by ``from_bytes``, ``filled`` or ``zeros``.

    Sent in a message it is copied as a handle is, not in its content: the sender keeps its own, and all
    holders, clones too, see what any of them writes. There is no lock: who writes when is theirs to agree.

    ``close`` gives up this handle alone. Views and arrays that were made from it stay valid and keep the
    memory; it is freed with the last of them and the last handle of any process.
    """

    __slots__ = ("__weakref__", "_region", "_taken")

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("use SharedMemory.zeros(size), SharedMemory.filled(byte, size) or SharedMemory.from_bytes(buf)")

    @classmethod
    def _holding(cls, region: _Region) -> Self:
        memory = cls.__new__(cls)
        memory._region = region
        memory._taken = False
        return memory

    _region: _Region | None
    _taken: bool

    @classmethod
    def from_bytes(cls, buf: Buffer) -> Self:
        """Memory with a copy of the bytes of ``buf``: bytes, an array, any buffer; a strided one in C order.

        Raises ``OSError`` where the system has no room.
        """
        view = memoryview(buf)
        region = _Region.create(view.nbytes)
        if view.nbytes:
            region.write([view if view.c_contiguous else view.tobytes()])
        return cls._holding(region)

    @classmethod
    def filled(cls, byte: int, size: int) -> Self:
        """``size`` bytes of memory, each of them ``byte`` (0 to 255). Raises ``OSError`` where there is no room."""
        if not 0 <= byte <= 255:
            raise ValueError(f"a byte is from 0 to 255, not {byte}")
        memory = cls.zeros(size)
        if byte and memory._region is not None:
            stride = bytes([byte]) * min(size, _STRIDE)
            whole, rest = divmod(size, _STRIDE) if size > _STRIDE else (1, 0)
            memory._region.write([*[stride] * whole, stride[:rest]])
        return memory

    @classmethod
    def zeros(cls, size: int) -> Self:
        """``size`` bytes of zeros. They take no memory until they are written to.

        Where the system has none left then, the kernel ends the process; ``filled`` and ``from_bytes``
        raise ``OSError``, they have it all from the start.
        """
        if size < 0:
            raise ValueError(f"a size can't be negative: {size}")
        return cls._holding(_Region.create(size))

    def _open_region(self) -> _Region:
        region = self._region
        if region is None:
            if self._taken:
                raise EndpointMoved("the content of this SharedMemory was taken")
            raise EndpointClosed("this SharedMemory is closed")
        return region

    @property
    def size(self) -> int:
        """How many bytes there are; fixed for ever. Raises ``EndpointClosed`` or ``EndpointMoved``, as all here."""
        return self._open_region().size

    def __len__(self) -> int:
        return self._open_region().size

    @property
    def buf(self) -> memoryview:
        """A read-only view, uncopied; it shows what other holders write. Valid after ``close``, too."""
        return self._open_region().view.toreadonly()

    def writable(self) -> memoryview:
        """A view to write through: every holder sees it at once."""
        region = self._open_region()
        # A view of its own: the user may release it.
        return region.view[:]

    def array(self, dtype: DTypeLike, shape: int | Iterable[int] | None = None) -> ndarray[Any, Any]:
        """A numpy array on this memory, from its start: writable, uncopied, in C order.

        Without ``shape`` it is flat and takes in what there is. Every holder sees what is written to it, and
        it keeps the memory by itself, so this handle may be closed. Raises ``ValueError`` for a shape that
        there is no room for, ``TypeError`` for a type that holds Python objects.
        """
        # Imported late: numpy is no dependency of this package.
        import numpy as np

        region = self._open_region()
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise TypeError(f"an array of {kind} holds pointers, which mean nothing to another process")
        if shape is None:
            if not kind.itemsize or region.size % kind.itemsize:
                raise ValueError(f"{region.size} bytes are no whole number of {kind} items: say the shape")
            lengths: tuple[int, ...] = (region.size // kind.itemsize,)
        else:
            lengths = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(length < 0 for length in lengths):
            raise ValueError(f"a shape has no negative numbers: {lengths}")
        needed = math.prod(lengths) * kind.itemsize
        if needed > region.size:
            raise ValueError(f"an array of {kind} with shape {lengths} takes {needed} bytes, there are {region.size}")
        array: ndarray[Any, Any] = np.ndarray(lengths, kind, region.view)
        return array

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> ndarray[Any, Any]:
        """For ``numpy.asarray``: the bytes, on this memory, unless another type or a copy is asked for."""
        array = self.array("u1")
        other = dtype is not None and array.dtype != dtype
        if other and copy is False:
            raise ValueError("as another type than bytes it would have to be copied: use SharedMemory.array(dtype)")
        return array.astype(dtype) if other else array.copy() if copy else array

    def take(self) -> bytes:
        """The content, copied; this handle is used up then, and raises ``EndpointMoved``. Others are as before."""
        content = bytes(self._open_region().view)
        self._region, self._taken = None, True
        return content

    def clone(self) -> Self:
        """Another handle on the same memory, to be closed by itself. Takes no descriptor."""
        return self._holding(self._open_region())

    def __copy__(self) -> Self:
        return self.clone()

    def close(self) -> None:
        """Give this handle up; what was made from it stays valid. Closing twice, or after ``take``, does nothing."""
        self._region = None

    @property
    def closed(self) -> bool:
        """Whether this handle can't be used any more: closed, or its content taken."""
        return self._region is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> memoryview: ...
    def __getitem__(self, index: int | slice) -> int | memoryview:
        """A byte as a number, or a stretch as a read-only view, uncopied."""
        return self.buf[index]

    def __bytes__(self) -> bytes:
        return bytes(self._open_region().view)

    def __buffer__(self, flags: int) -> memoryview:
        # From Python 3.12 on this object is a buffer, writable as the memory is.
        return self.writable()

    def __eq__(self, other: object) -> bool:
        """Whether the content is the same, that of another SharedMemory or of a buffer of bytes."""
        if isinstance(other, SharedMemory):
            mine, its = self._open_region(), other._open_region()
            return mine is its or _same(mine.view, its.view)
        if isinstance(other, (bytes, bytearray, memoryview)):
            view = memoryview(other)
            if view.format == "B" and view.c_contiguous:
                return _same(self._open_region().view, view)
            return self._open_region().view == view
        return NotImplemented

    # Its content changes.
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __repr__(self) -> str:
        region = self._region
        state = f"{region.size} bytes" if region is not None else "taken" if self._taken else "closed"
        return f"<mp_ipcchan.SharedMemory {state}>"

    def __reduce__(self) -> Any:
        self._open_region()
        return _codec.refuse_bare_pickle(self)


def _same(one: memoryview, other: memoryview) -> bool:
    # As bytes, which are compared a word at a time, not an item.
    return one.nbytes == other.nbytes and all(
        bytes(one[at : at + _STRIDE]) == bytes(other[at : at + _STRIDE]) for at in range(0, one.nbytes, _STRIDE)
    )


@functools.cache
def _device() -> int:
    """Where the system keeps memory of this kind. That of huge pages lies elsewhere, and can kill who touches it."""
    fd = _segment.create_blank(1)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _check(fd: int) -> None:
    """Raise ``ProtocolError`` for what no ``SharedMemory`` of ours was."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError("a descriptor that was sent as shared memory is something else") from error
    if seals & _segment.SEALS != _segment.SEALS:
        raise ProtocolError("shared memory arrived that its sender could still truncate: it is not sealed")
    readable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    if seals & _UNWRITABLE or not readable:
        raise ProtocolError("shared memory arrived that can't be written to")
    status = os.fstat(fd)
    if status.st_dev != _device() or not status.st_size:
        raise ProtocolError("shared memory arrived that is of another kind, or empty")


def pack(memory: SharedMemory) -> list[Handle]:
    """What travels of ``memory``: its descriptor, if it has one."""
    region = memory._open_region()
    return [_RegionHandle(region)] if region.size else []


@_codec.rebuilds
def rebuild(kinds: bytes, fds: list[int]) -> SharedMemory:
    """The memory that was packed. Raises ``ProtocolError`` for what isn't, and closes it."""
    if not kinds:
        return SharedMemory._holding(_Region(-1, 0))
    (fd,) = _codec.expect((HandleKind.MEMORY,), kinds, fds)
    try:
        _check(fd)
    except BaseException:
        os.close(fd)
        raise
    return SharedMemory._holding(_Region.of(fd))


def _pack_for_pickle(memory: SharedMemory) -> _codec.Packed:
    return rebuild, (), pack(memory)


_codec.register(SharedMemory, _pack_for_pickle)
