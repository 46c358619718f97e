"""The queues of a context, with the stdlib's surface: many processes put, many take, none locks.

A queue is a socket pair of which every process holds both ends. One message is one packet, so the
kernel hands each to one taker; ``put`` needs no taker (see ``_outlet``). Only the counts need
more: a ledger (see ``_ledger``), and two kinds of counters that are descriptors and so can travel:
the free slots of a bounded queue, and the unfinished tasks of a joinable one.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from collections.abc import Iterable
from multiprocessing import queues as stdlib
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeVar

from .. import _codec
from .._deadline import deadline_in, remaining
from .._delivery import Delivery
from .._inlet import Inlet, ShutMark
from .._message import Incoming, Outgoing, TooLargeError
from .._transport._spill import lower_limit
from .._transport.unix import SEND_FLAGS
from ..errors import Empty, Full, ShutDown
from ._books import Books
from ._ends import LOOK_EVERY, Ends
from ._ledger import DETOUR, DISCARDED, SHUT, STATE, TAKEN

T = TypeVar("T")

#: How often (seconds) a taker looks for the last messages of a queue that was shut down.
GLANCE_EVERY = 0.02

if TYPE_CHECKING:
    from typing_extensions import Self

    class _StdlibQueue:
        """The type checker's view of the base classes: only their names matter, for ``isinstance``."""

    _StdlibSimpleQueue = _StdlibQueue
else:
    _StdlibQueue = stdlib.Queue
    _StdlibSimpleQueue = stdlib.SimpleQueue


#: By the inode of the reading end: however often a queue arrives, its books exist once a process.
known_books: weakref.WeakValueDictionary[int, Books] = weakref.WeakValueDictionary()


class SimpleQueue(Delivery, _StdlibSimpleQueue, Generic[T]):
    """A queue without a bound and without counts. ``put`` needs no taker."""

    def __init__(self) -> None:
        self._set_ends(Ends.new())

    def _set_ends(self, ends: Ends) -> None:
        self._ends = ends
        # The stdlib's pools and executors reach for these.
        self._reader, self._writer = ends.reader, ends.writer

    def put(self, obj: T) -> None:
        """Put ``obj``; raises in the caller what pickling it raises."""
        self._writer._check_closed()
        item = _codec.encode(obj)
        outlet = self._writer._link.outlet
        if item.__class__ is bytes and not outlet.backlog:
            # The usual case, without further calls.
            try:
                outlet.send_raw(item, SEND_FLAGS)
                return
            except BlockingIOError:
                pass
        outlet.send(item)

    def get(self) -> T:
        """Take a message; waits for one."""
        self._reader._check_closed()
        return self._deliver(self._reader._link.inlet, True, True, None)  # type: ignore[no-any-return]

    def _take(self, block: bool, deadline: float | None) -> Incoming:
        while True:
            try:
                taken = self._ends.take(block)
            except BlockingIOError:
                self._ends.await_readable(deadline_in(LOOK_EVERY) if deadline is None else deadline)
                continue
            if taken.__class__ is not ShutMark:
                return taken  # type: ignore[return-value]

    def empty(self) -> bool:
        """Whether there is nothing to take now."""
        return self._ends.is_empty

    def close(self) -> None:
        """Close both ends in this process."""
        self._ends.close()

    @property
    def _rlock(self) -> threading.Lock:
        # The stdlib's Pool holds it while it drains the queue; here nobody needs to be kept out.
        return threading.Lock()

    def __reduce__(self) -> Any:
        return _codec.refuse_bare_pickle(self)

    __getstate__ = __reduce__

    def __repr__(self) -> str:
        return f"<mp_ipcchan.{type(self).__name__} {'closed' if self._reader.closed else self._reader._link.fileno()}>"


class Queue(Delivery, _StdlibQueue, Generic[T]):
    """A queue that behaves as ``multiprocessing.Queue``, which documents its methods.

    ``put`` pickles at once, so an object that can't be pickled raises in the caller and the queue
    goes on. It needs no taker, but where there is a ``maxsize`` it waits for a slot. One that runs ahead of its
    takers may be held up for a hundredth of a second now and then, if not by ``put_nowait``: all goes faster so.
    """

    _joinable = False

    def __init__(self, maxsize: int = 0) -> None:
        if not isinstance(maxsize, SupportsIndex):
            raise TypeError(f"maxsize is how many messages the queue holds, 0 for any number, not {maxsize!r}")
        self._assemble(Ends.new(), Books.new(maxsize, self._joinable))

    @classmethod
    def _of(cls, ends: Ends, books: Books) -> Self:
        """A queue that was received."""
        queue = cls.__new__(cls)
        queue._assemble(ends, books)
        return queue

    def _assemble(self, ends: Ends, books: Books) -> None:
        self._ends = ends
        self._books = books
        ends.ledger = books.ledger
        self._maxsize = books.maxsize
        # Others wait for these: multiprocessing.connection.wait, and the stdlib's executors.
        self._reader, self._writer = ends.reader, ends.writer
        self._inlet = ends.reader._link.inlet
        self._outlet = ends.writer._link.outlet
        self._ledger, self._plain = books.ledger, books.plain
        self._closed = False
        #: Whether this process has put anything, for ``empty`` after ``close``.
        self._used = False
        known_books[ends.inode] = books
        ends.writer._link.outlet.delivered = books.ledger.deliver

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"this {type(self).__name__} is closed: close() was called on it in this process")

    # -- putting -----------------------------------------------------------------------------

    def put(self, obj: T, block: bool = True, timeout: float | None = None) -> None:
        """Put ``obj``. Raises what pickling raises; ``queue.Full`` where there is no slot in time (seconds)
        or, without ``block``, now; ``ShutDown``; ``ValueError`` after ``close``.
        """
        if self._closed:
            self._check_open()
        item = _codec.encode(obj)
        outlet = self._outlet
        if item.__class__ is bytes and self._plain and self._used and not outlet.backlog:
            # The usual case, at one go.
            try:
                if self._ledger.put(outlet.send_raw, item, SEND_FLAGS):
                    return
            except BlockingIOError:
                pass
        self._put(item, block, deadline_in(timeout) if block else None)

    def _put(self, item: Outgoing, block: bool, deadline: float | None) -> None:
        if not self._used:
            self._used = True
            lower_limit(self._writer._link.sock)
        self._books.put(self._outlet, item, block, deadline)

    def put_nowait(self, obj: T) -> None:
        """``put(obj, False)``."""
        self.put(obj, False)

    def put_many(self, objs: Iterable[T], block: bool = True, timeout: float | None = None) -> None:
        """Put each of ``objs``, in order, as it comes; where one fails, those before it are in the queue.

        ``timeout`` is for all together. ``queue.Full`` has ``put``, how many are in the queue, and ``refused``, the
        next, which isn't: an iterator goes on behind it.
        """
        self._check_open()
        deadline = deadline_in(timeout) if block else None
        # Only a bounded queue is ever full, and there nothing is put at one go.
        count = 0
        encode, ledger, outlet, direct = _codec.encode, self._ledger, self._outlet, self._plain
        put, send = ledger.put, outlet.send_raw
        for obj in objs:
            item = encode(obj)
            if self._closed:
                self._check_open()
            if item.__class__ is bytes and direct and self._used and not outlet.backlog:
                try:
                    if put(send, item, SEND_FLAGS):
                        continue
                except BlockingIOError:
                    pass
            try:
                self._put(item, block, deadline)
            except Full as full:
                full.put, full.refused = count, obj
                raise
            count += 1

    # -- taking ------------------------------------------------------------------------------

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take a message. Raises ``queue.Empty`` where there is none in time (seconds) or, without ``block``,
        now; ``ShutDown``; ``ValueError`` after ``close``.
        """
        if self._closed:
            self._check_open()
        deadline = None if timeout is None or not block else deadline_in(timeout)
        ledger = self._ledger
        words, base = ledger.words, ledger.base
        # Open, with everything in order in its socket, and nothing to count but what the ledger does.
        direct = (
            self._plain and base > 0 and not words[STATE] and not words[DETOUR] and self._reader._handle is not None
        )
        return self._deliver(self._inlet, direct, block, deadline, False, words, base + TAKEN)  # type: ignore[no-any-return]

    def get_nowait(self) -> T:
        """``get(False)``."""
        return self.get(False)

    def get_many(self, max_items: int, timeout: float | None = None) -> list[T]:
        """Wait for a message as ``get`` does, and return it with those that are there, 1 to ``max_items``."""
        most = min(operator.index(max_items), sys.maxsize)
        if most < 1:
            raise ValueError(f"max_items must be at least 1, not {max_items}")
        self._check_open()
        return self._deliver_many(self._inlet, most, deadline_in(timeout))

    def _take_more(self, inlet: Inlet, taken: list[Incoming], most: int, alone: bool) -> None:
        words = self._ledger.words
        if self._plain and not (words[STATE] or words[DETOUR] or inlet.ready or inlet.inbox or inlet.detour):
            inlet.take_plain(taken, most)
        super()._take_more(inlet, taken, most, alone)

    _counts = True

    def _taken(self, count: int = 1) -> None:
        self._books.took(count)

    def _left(self, count: int = 1) -> None:
        self._books.left(count)

    def _comes_late(self) -> bool:
        return self._books.ledger.detour > 0

    def _take(self, block: bool, deadline: float | None) -> Incoming:
        """A message that ``books.taking`` was told of."""
        ends, books, ledger = self._ends, self._books, self._books.ledger
        if not ledger.base:
            # Now, not when a message has been taken and there turns out to be no descriptor for it.
            ledger.join()
        marked = drained = False
        try:
            while True:
                state = ledger.state
                books.taking()
                try:
                    # A bounded queue never waits while it owes a slot; a queue that was shut down may
                    # have nothing to wait for.
                    taken = ends.take(block and deadline is None and not books.slots and not state)
                except TooLargeError:
                    books.took()
                    raise
                except BaseException as error:
                    books.left()
                    if not isinstance(error, BlockingIOError):
                        raise
                    if drained:
                        raise ShutDown("the queue was shut down, and everything in it was taken") from None
                    if state:
                        # Nothing left in any backlog? Then what isn't there at the next look never will be.
                        drained = not ledger.undelivered()
                        if drained:
                            continue
                    if not block or not self._await_message(deadline, bool(state)):
                        raise Empty("the queue is empty") from None
                    continue
                if taken.__class__ is bytes and state != DISCARDED:
                    return taken
                if isinstance(taken, ShutMark):
                    marked = True
                    books.left()
                elif state == DISCARDED:
                    self._discard(taken)
                else:
                    return taken
        finally:
            if marked:
                # Others may be waiting who haven't seen it.
                self._mark_shut()

    def _await_message(self, deadline: float | None, shut: bool) -> bool:
        """Wait for a message, though not for long at a time: False at the deadline."""
        left = remaining(deadline)
        longest = GLANCE_EVERY if shut else LOOK_EVERY
        self._ends.await_readable(deadline_in(longest if left is None else min(left, longest)))
        return left is None or left > 0

    # -- the end -----------------------------------------------------------------------------

    def shutdown(self, immediate: bool = False) -> None:
        """Refuse every further ``put``, in all processes; ``get`` goes on until the queue is empty.

        Then, and at once for whoever waits in ``put``, ``ShutDown`` is raised. With ``immediate``,
        what is in the queue is discarded, and counts as done for ``JoinableQueue.join``.
        """
        self._check_open()
        self._books.shut(DISCARDED if immediate else SHUT)
        if immediate:
            self._discard_all()
        self._mark_shut()

    def _mark_shut(self) -> None:
        """Wake a process that waits in ``get``; it wakes the next. On a full socket nobody waits."""
        self._ends.send_shut()

    def _discard(self, taken: Incoming) -> None:
        if not isinstance(taken, bytes):
            taken.close()
        self._books.took()
        if self._books.tasks:
            self._books.finish(1)

    def _discard_all(self) -> None:
        self._inlet.detour = True
        while True:
            self._books.taking()
            try:
                taken = self._ends.take(False)
            except (BlockingIOError, EOFError):
                self._books.left()
                break
            if isinstance(taken, ShutMark):
                self._books.left()
            else:
                self._discard(taken)

    def close(self) -> None:
        """This process puts and takes nothing more through this object. What it has put still arrives."""
        self._closed = True
        self._ends.close()

    def join_thread(self) -> None:
        """Hand what this process has put to the kernel, after ``close``. Does not wait for a taker."""
        assert self._closed, f"Queue {self!r} not closed"
        self._writer._link.outlet.spill()

    def cancel_join_thread(self) -> None:
        """Does nothing: the end of a process never waits for this queue, and loses nothing of it."""

    # -- counts ------------------------------------------------------------------------------

    def qsize(self) -> int:
        """Messages put and not yet taken, by anybody; may have changed by the time it returns."""
        return self._books.ledger.count()

    def empty(self) -> bool:
        """Whether there is nothing to take now. ``OSError`` once the queue was used and closed."""
        if self._closed and not self._used:
            return True
        if self._books.ledger.state:
            return not self.qsize()
        return self._ends.is_empty

    def full(self) -> bool:
        """Whether a ``put`` would have to wait for a slot."""
        return self._books.slots is not None and self._books.slots.is_zero

    def __reduce__(self) -> Any:
        return _codec.refuse_bare_pickle(self)

    __getstate__ = __reduce__

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"fd={self._reader._link.fileno()}"
        return f"<mp_ipcchan.{type(self).__name__} {state} maxsize={self._maxsize}>"


class JoinableQueue(Queue[T]):
    """A queue that also counts tasks: each message put is one, until ``task_done`` was called for it."""

    _joinable = True

    def task_done(self) -> None:
        """One task less. ``ValueError`` where it was called more often than messages were put."""
        if not self._books.finish(1):
            raise ValueError("task_done() called too many times")

    def join(self) -> None:
        """Wait until every task is done."""
        self._books.await_idle(self._glance)

    def _glance(self) -> bool:
        if self._books.ledger.state != DISCARDED:
            return False
        # Others hand over what they had not sent; it is to be discarded as well.
        self._discard_all()
        self._ends.await_readable(deadline_in(GLANCE_EVERY))
        return True
