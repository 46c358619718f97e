"""Objects to messages and back: pickle, with endpoints and large buffers beside the pickle.

A type that travels with descriptors is registered with how to *pack* it::

    pack(obj) -> (rebuild, args, handles)

and is rebuilt on the other side by ``rebuild(*args, kinds, descriptors)``, which owns the
descriptors from its first line on, whatever it raises.

Encoders are kept, because building a pickler costs more than pickling a small object; one is
taken from a free list for the length of one ``dump`` and dropped after an exception. A pickler that
is entered twice (an object's ``__reduce__`` may itself send something) crashes the interpreter,
which the free list rules out. What a pickler collects belongs to it, never to the thread.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

from ._message import (
    INLINE_SIZE,
    MAX_BUFFERS,
    PLAIN,
    PLAIN_SIZE,
    Descriptors,
    Handle,
    HandleKind,
    Incoming,
    Message,
    Outgoing,
    Parcel,
    release_all,
)
from ._segments import _sealed_array
from .errors import ProtocolError

PROTOCOL = 5
#: How a pickle of that protocol begins.
_FIRST = pickle.PROTO + bytes([PROTOCOL])
#: A buffer of at least this many bytes leaves the pickle, so that it is copied once, not thrice.
OUT_OF_BAND = 32768
#: But for the arrays of a message that has no more (bytes) of them: in a plain frame they save more than copies cost.
_STAYS = INLINE_SIZE - 2048
#: From how many bytes on one copy more is worth avoiding.
_COSTLY_COPY = 1 << 18
#: An encoder that has written more than this (bytes) is dropped: clearing the memo of a pickler
#: costs what the largest pickle it ever wrote did.
_KEEP_BELOW = INLINE_SIZE

Packed = tuple[Callable[..., object], tuple[Any, ...], Sequence[Handle]]
Pack = Callable[[Any], Packed]

_packs: dict[type, Pack] = {}
_free: list[_Encoder] = []
#: ForkingPickler's registered reducers: users (and torch) add theirs, at any time.
_registered: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
_stdlib_table = copyreg.dispatch_table


def register(cls: type, pack: Pack) -> None:
    """Let objects of exactly ``cls`` travel with descriptors."""
    _packs[cls] = pack
    _free.clear()


def packer(cls: type) -> Pack:
    return _packs[cls]


def revive(*_: object) -> object:
    """Stands in a pickle for an object with descriptors; the decoder puts its own function in its place."""
    raise pickle.UnpicklingError("this pickle belongs to a message that carried descriptors; they are not here")


class _Encoder:
    """A pickler and what it collects. Used by ``encode`` alone."""

    __slots__ = ("__weakref__", "_pickler", "buffers", "clear_memo", "dump", "handles", "pieces", "root", "version")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.buffers: list[memoryview] = []
        self.handles: list[Handle] = []
        #: What is being pickled.
        self.root: object = None
        #: How many foreign reducers the table was made of; none are ever taken away.
        self.version = -1
        self._pickler = pickle.Pickler(_Sink(self.pieces), PROTOCOL, buffer_callback=self._keep_buffer)
        self.dump, self.clear_memo = self._pickler.dump, self._pickler.clear_memo

    def _keep_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether the pickler is to write ``buffer`` into the pickle, as it would without us."""
        try:
            view = buffer.raw()
        except BufferError:
            return True
        if view.nbytes < OUT_OF_BAND or len(self.buffers) >= MAX_BUFFERS:
            return True
        if view.nbytes <= _STAYS and not self.buffers and 0 < _arrays_in(self.root) <= _STAYS:
            return True
        self.buffers.append(view)
        return False

    def _table(self) -> dict[type, Callable[[Any], Any]]:
        """What ForkingPickler would look types up in, and our own types.

        The foreign reducers are looked up again at each use, so that one that is registered anew counts.
        """
        table: dict[type, Callable[[Any], Any]] = {}
        for registry in (_stdlib_table, _registered):
            for cls in list(registry):
                table[cls] = partial(_reduce_foreign, registry, cls)
        for cls, pack in _packs.items():
            table[cls] = partial(self._reduce, pack)
        for cls in _FILES:
            table.setdefault(cls, _refuse_file)
        # Its import registers something with the stdlib's table, so this is asked again then.
        numpy = sys.modules.get("numpy")
        if numpy is not None and hasattr(numpy, "ndarray"):
            table.setdefault(numpy.ndarray, self._reduce_array)
        return table

    def _reduce_array(self, array: Any) -> Any:
        """Arrays arrive writable, as through the stdlib's queues; protocol 5 would keep a read-only one so."""
        packed = _sealed_array.pack(array) if array.nbytes >= _sealed_array.SEALED_FROM else None
        if packed is not None:
            description, handle = packed
            return self._reduce_with(_unpack_array, description, (handle,))
        return (array if array.flags.writeable else _writable(array)).__reduce_ex__(PROTOCOL)

    def _reduce(self, pack: Pack, obj: object) -> tuple[Callable[..., object], tuple[Any, ...]]:
        rebuild, args, handles = pack(obj)
        if not handles:
            return rebuild, (*args, b"", [])
        return self._reduce_with(rebuild, args, handles)

    def _reduce_with(
        self, rebuild: Callable[..., object], args: tuple[Any, ...], handles: Sequence[Handle]
    ) -> tuple[Callable[..., object], tuple[Any, ...]]:
        first = len(self.handles)
        self.handles += handles
        return revive, (rebuild, args, first, len(handles))

    def refresh(self) -> None:
        """Take notice of what was registered since."""
        self._pickler.dispatch_table = self._table()
        self.version = len(_stdlib_table) + len(_registered)

    def outgoing(self) -> Outgoing:
        """What ``dump`` has made, where it is more than a plain frame, or one with something large in it."""
        # What is large the pickler writes as it is, and that may have any shape.
        body = [one if one.__class__ is bytes else pickle.PickleBuffer(one).raw() for one in self.pieces]
        size = sum(map(len, body))
        made: Outgoing
        if self.buffers or self.handles or size > INLINE_SIZE:
            made = Message(body, self.buffers[:], self.handles[:])
        else:
            made = b"".join((PLAIN, *body))
        if size <= _KEEP_BELOW:
            self.pieces.clear()
            self.buffers.clear()
            self.handles.clear()
            _free.append(self)
        return made


def _reduce_foreign(registry: dict[type, Callable[[Any], Any]], cls: type, obj: object) -> Any:
    return registry[cls](obj)


#: What ``open`` makes. Pickle refuses them; this way it says what to do.
_FILES = (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO)


def _refuse_file(file: Any) -> Any:
    name = f"{type(file).__module__}.{type(file).__qualname__}"
    raise TypeError(f"cannot pickle '{name}' object: to send an open file along, wrap it: Fd(file)")


def _writable(array: Any) -> Any:
    """``array``, which is read-only, as one that isn't: a copy, or where that would cost, one that nobody writes to."""
    if array.nbytes < _COSTLY_COPY or array.dtype.hasobject or not array.flags.forc:
        return array.copy("K")
    numpy = sys.modules["numpy"]
    memory = numpy.asarray(_sealed_array.Bytes(array))
    return numpy.ndarray(array.shape, array.dtype, memory, order=_sealed_array.order_of(array))


def _arrays_in(obj: object) -> int:
    """How many bytes the arrays have that ``obj`` is, or directly holds."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return 0
    ones = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple)) else (obj,)
    return sum(one.nbytes for one in ones if one.__class__ is numpy.ndarray)


class _Sink:
    """What a pickler writes to: it looks only for ``write``, which here is ``list.append`` itself."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.write = pieces.append


def encode(obj: object) -> Outgoing:
    """The message for ``obj``. Raises whatever pickling it raises; endpoints in it are as before then."""
    try:
        kept = _free.pop()
    except IndexError:
        kept = _Encoder()
    if len(_stdlib_table) + len(_registered) != kept.version:
        kept.refresh()
    kept.root = obj
    try:
        kept.dump(obj)
    except BaseException:
        Message((), (), kept.handles).unsent()
        raise
    kept.root = None
    kept.clear_memo()
    pieces = kept.pieces
    if len(pieces) > 1 or kept.buffers or kept.handles or len(pieces[0]) > INLINE_SIZE:
        return kept.outgoing()
    frame = PLAIN + pieces.pop()
    _free.append(kept)
    return frame


def is_pickle(incoming: Incoming) -> bool:
    """Whether a message is what ``encode`` makes. In MessagePack nothing follows on a first byte of that value."""
    start = incoming[PLAIN_SIZE : PLAIN_SIZE + 2] if isinstance(incoming, bytes) else bytes(incoming.body[:2])
    return start == _FIRST


def decoder(parcel: Parcel) -> Iterator[Any]:
    """An iterator whose one item is the object in ``parcel``. Raises then whatever unpickling it raises.

    Where the parcel has no descriptors, the item is made by one C call.
    """
    if not parcel.kinds:
        return map(partial(pickle.loads, buffers=parcel.buffers), (parcel.body,))
    return map(_decode_with_descriptors, (parcel,))


def _decode_with_descriptors(parcel: Parcel) -> Any:
    try:
        return _Decoder(parcel).load()
    finally:
        parcel.close()


class _Decoder(pickle.Unpickler):
    def __init__(self, parcel: Parcel) -> None:
        super().__init__(io.BytesIO(parcel.body), buffers=parcel.buffers)
        self._parcel = parcel

    def find_class(self, module: str, name: str) -> Any:
        if name == "revive" and module == __name__:
            # Not a method: a failed load would leave a cycle through its stack, and descriptors open in it.
            return partial(_revive, self._parcel)
        return super().find_class(module, name)


def _revive(parcel: Parcel, rebuild: Callable[..., object], args: tuple[Any, ...], first: int, count: int) -> object:
    if rebuild not in _rebuilds:
        raise ProtocolError(f"{rebuild!r} does not rebuild anything that travels with descriptors")
    kinds, fds = parcel.take(first, count)
    return rebuild(*args, kinds, fds)


def refuse_bare_pickle(obj: object) -> Any:
    """What ``__reduce__`` of everything with descriptors does outside of a message."""
    raise TypeError(
        f"{type(obj).__name__} objects {_REFUSED}, they carry an open descriptor: send them through a channel, queue "
        f"or pipe, or pass them as arguments to a process that is started or to a task; a function that uses one from "
        f"around it can't take it along"
    )


def is_refusal(error: Exception) -> bool:
    """Whether ``refuse_bare_pickle`` has raised it."""
    return isinstance(error, TypeError) and _REFUSED in str(error)


_REFUSED = "can't be pickled by themselves"


_rebuilds: set[Callable[..., object]] = set()


def rebuilds(function: Callable[..., object]) -> Callable[..., object]:
    """Mark ``function`` as one that a message may hand descriptors to."""
    _rebuilds.add(function)
    return function


def expect(wanted: Sequence[int], kinds: bytes, fds: list[int]) -> list[int]:
    """``fds``, if they are of the kinds that are wanted; else they are let go of and ``ProtocolError`` is raised."""
    if list(kinds) != list(wanted):
        release_all(fds)
        raise ProtocolError(f"an object was sent with descriptors of kinds {list(kinds)}, it takes {list(wanted)}")
    return fds


@rebuilds
def _unpack_array(*args: Any) -> Any:
    *description, kinds, fds = args
    opened = Descriptors(expect((HandleKind.SEGMENT,), kinds, fds))
    try:
        return _sealed_array.unpack(opened.fds[0], *description)
    finally:
        opened.close()


# An encoder in the list may be half-way out of it when another thread forks.
os.register_at_fork(after_in_child=_free.clear)
