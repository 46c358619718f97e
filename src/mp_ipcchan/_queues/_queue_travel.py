"""How queues travel: by copy, with the descriptors of their ends and their books."""

from __future__ import annotations

import os
from typing import Any

from .. import _codec
from .._message import HandleKind
from ._books import Books
from ._counter import Counter
from ._ends import Ends
from ._ledger import Ledger
from ._queue import JoinableQueue, Queue, SimpleQueue, known_books

_CLASSES: dict[str, type[Queue[Any]]] = {cls.__name__: cls for cls in (Queue, JoinableQueue)}


class _BookHandle:
    """A descriptor of a queue's books, which stay open at least until the message has left."""

    __slots__ = ("_books", "_owner", "kind")

    def __init__(self, kind: HandleKind, owner: Ledger | Counter, books: Books) -> None:
        self.kind = kind
        self._owner = owner
        self._books = books

    def fileno(self) -> int:
        return self._owner.fileno()

    def sent(self) -> None:
        pass

    unsent = sent


def _pack_queue(queue: Queue[Any]) -> _codec.Packed:
    queue._check_open()
    books = queue._books
    handles = queue._ends.pack()
    handles.append(_BookHandle(HandleKind.LEDGER, books.ledger, books))
    handles += [_BookHandle(HandleKind.EVENT, counter, books) for counter in books.counters()]
    return _rebuild_queue, (type(queue).__name__, books.maxsize), handles


@_codec.rebuilds
def _rebuild_queue(name: str, maxsize: int, kinds: bytes, fds: list[int]) -> Queue[Any]:
    cls = _CLASSES[name]
    events = (maxsize > 0) + 2 * cls._joinable
    wanted = [HandleKind.CONNECTION] * 4 + [HandleKind.LEDGER] + [HandleKind.EVENT] * events
    _codec.expect(wanted, kinds, fds)
    ledger_fd = fds[4]
    counters = [Counter(fd) for fd in fds[5:]]
    ends = Ends.adopt(fds[:4])
    books = known_books.get(ends.inode)
    if books is None:
        books = Books(maxsize, ledger_fd, counters)
    else:
        os.close(ledger_fd)
    return cls._of(ends, books)


def _pack_simple_queue(queue: SimpleQueue[Any]) -> _codec.Packed:
    for end in (queue._reader, queue._writer):
        end._check_closed()
    return _rebuild_simple_queue, (), queue._ends.pack()


@_codec.rebuilds
def _rebuild_simple_queue(kinds: bytes, fds: list[int]) -> SimpleQueue[Any]:
    queue: SimpleQueue[Any] = SimpleQueue.__new__(SimpleQueue)
    queue._set_ends(Ends.adopt(_codec.expect((HandleKind.CONNECTION,) * 4, kinds, fds)))
    return queue


_codec.register(SimpleQueue, _pack_simple_queue)
_codec.register(Queue, _pack_queue)
_codec.register(JoinableQueue, _pack_queue)
