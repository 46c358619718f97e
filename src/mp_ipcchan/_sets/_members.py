"""What a ReceiverSet can wait for, each made to look alike: receivers, queues, connections, descriptors.

A receiver belongs to the set while it is a member; the others stay their owners', who may use them
beside the set.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

from .._connection import Connection
from .._delivery import Decoding
from .._endpoint import ReceivingEnd
from .._fd import HasFileno
from .._inlet import EndOfStream, Inlet, ShutMark
from .._message import Incoming
from .._opaque import OpaqueReceiver
from .._queues._ends import LOOK_EVERY
from .._queues._queue import GLANCE_EVERY, Queue, SimpleQueue
from .._receiver import ReceiverBase
from ..errors import Empty, ShutDown

#: What ``add`` takes.
Selectable: TypeAlias = (
    ReceiverBase[Any] | OpaqueReceiver | Queue[Any] | SimpleQueue[Any] | Connection | BaseProcess | HasFileno | int
)


#: The most messages to take of a member at a time: so many that it pays, so few that the others get their turn.
_MOST = 16


class Member:
    """What all members have."""

    __slots__ = ("ended", "fd", "id")

    #: What decodes its messages; None where it has none.
    decoding: Decoding | None
    #: How often (seconds) to look at it though no event has come, if ever.
    glance: float | None = None
    #: How many messages to take at a time. Of what others take from, too, one: it is lost with the process.
    batch = 1

    def __init__(self) -> None:
        #: Its number in the set, and the descriptor that is waited for.
        self.id: int = -1
        self.fd: int = -1
        #: Whether its end was reported.
        self.ended: bool = False

    def fileno(self) -> int:
        """What to wait for; -1 where it has nothing of the kind, and ``announce`` is to be asked."""
        raise NotImplementedError

    def announce(self, call: Callable[[], object] | None) -> None:
        """Have ``call`` called, by any thread, whenever something has come that no descriptor shows; None: no more."""

    def take(self) -> Incoming:
        """The next message. Raises ``BlockingIOError``, ``EndOfStream``, ``NoRoom``, or what is wrong with one."""
        raise NotImplementedError

    @property
    def hand_out(self) -> Callable[[], object] | None:
        """What to call before it is asked for messages; several members may have the same."""
        return None

    def took(self, all_of_it: bool) -> None:
        """Whether there was as much to take as was asked for."""

    def put_back(self, messages: list[Incoming]) -> None:
        """Let ``messages`` be the next again. They leave the list as they get there."""

    @property
    def holding(self) -> bool:
        """Whether it has messages that waiting for its descriptor doesn't show."""
        return False

    @property
    def has_left(self) -> bool:
        """Whether ``leave`` has given it back already; never where it was its owner's all the time."""
        return False

    def leave(self) -> object:
        """What its owner has, or had, in hands; the member is none any more."""
        raise NotImplementedError

    def drop(self) -> None:
        """Close what is the set's."""


class _Inlets(Member):
    """One that has an inlet, and nothing else to do."""

    __slots__ = ("_inlet", "decoding")

    _inlet: Inlet

    def take(self) -> Incoming:
        return self._inlet.take_message(False)

    def put_back(self, messages: list[Incoming]) -> None:
        self._inlet.take_back(messages)  # type: ignore[arg-type]


class ReceiverMember(_Inlets):
    """A receiver, claimed."""

    __slots__ = ("_link", "_receiver", "_streak")

    def __init__(self, receiver: ReceiverBase[Any] | OpaqueReceiver) -> None:
        super().__init__()
        self._receiver: ReceivingEnd = receiver
        self.decoding = receiver._decoding
        self._link = receiver._claim()
        self._inlet = self._link.inlet
        #: How often in a row there was as much to take as was asked for.
        self._streak = 0

    def fileno(self) -> int:
        # What waits in user space is asked for.
        return -1 if self._inlet.announces else self._inlet.source()

    def announce(self, call: Callable[[], object] | None) -> None:
        if self._inlet.announces:
            self._inlet.announce(call)

    @property
    def batch(self) -> int:  # type: ignore[override]
        # To be told that there is no more costs a system call: it is for those that mostly have more.
        return _MOST if self._inlet.ready else min(1 << (self._streak >> 2), _MOST)

    def took(self, all_of_it: bool) -> None:
        self._streak = self._streak + 1 if all_of_it else 0

    @property
    def hand_out(self) -> Callable[[], object] | None:
        return self._inlet.hand_out

    @property
    def holding(self) -> bool:
        return self._inlet.holding

    @property
    def has_left(self) -> bool:
        return self._receiver._link is self._link

    def leave(self) -> ReceivingEnd:
        self._receiver._restore(self._link)
        return self._receiver

    def drop(self) -> None:
        self._link.release()


class ConnectionMember(_Inlets):
    """One end of a pipe; others may receive from it meanwhile."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        connection._check_closed()
        connection._check_readable()
        self._connection = connection
        self.decoding = connection._decoding
        self._inlet = connection._link.inlet

    def fileno(self) -> int:
        # Not the socket: others may make messages wait in user space.
        return self._inlet.fileno()

    def leave(self) -> Connection:
        return self._connection


class SimpleQueueMember(Member):
    """A queue; the set is one of those who take from it."""

    __slots__ = ("_queue", "decoding")

    glance = LOOK_EVERY

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        super().__init__()
        queue._reader._check_closed()
        self._queue = queue
        self.decoding = queue._decoding

    def fileno(self) -> int:
        return self._queue._reader._link.inlet.fileno()

    def take(self) -> Incoming:
        queue = self._queue
        if queue._reader.closed:
            raise EndOfStream
        while True:
            try:
                taken = queue._ends.take(False)
            except EOFError:
                raise EndOfStream from None
            if taken.__class__ is not ShutMark:
                return taken  # type: ignore[return-value]

    def put_back(self, messages: list[Incoming]) -> None:
        self._queue._reader._link.inlet.take_back(messages)  # type: ignore[arg-type]

    def leave(self) -> SimpleQueue[Any]:
        return self._queue


class QueueMember(Member):
    """A queue that counts. A message is taken once the set has it."""

    __slots__ = ("_queue", "decoding")

    def __init__(self, queue: Queue[Any]) -> None:
        super().__init__()
        queue._check_open()
        self._queue = queue
        self.decoding = queue._decoding

    @property
    def glance(self) -> float:  # type: ignore[override]
        return GLANCE_EVERY if self._queue._books.ledger.state else LOOK_EVERY

    def fileno(self) -> int:
        return self._queue._inlet.fileno()

    def take(self) -> Incoming:
        queue = self._queue
        if queue._closed:
            raise EndOfStream
        try:
            incoming = queue._take(False, None)
        except Empty:
            raise BlockingIOError from None
        except (EOFError, ShutDown):
            raise EndOfStream from None
        try:
            queue._taken()
        except BaseException:
            queue._inlet.put_back(incoming)
            queue._left()
            raise
        return incoming

    def put_back(self, messages: list[Incoming]) -> None:
        count = len(messages)
        self._queue._inlet.take_back(messages)  # type: ignore[arg-type]
        # They count as taken, and their slots were given back; both will be done again.
        books = self._queue._books
        if count:
            books.ledger.take(0, -count)
        if books.slots:
            books.ledger.ahead += count

    def leave(self) -> Queue[Any]:
        return self._queue


class DescriptorMember(Member):
    """Anything with a descriptor; it is ready, or not."""

    __slots__ = ("_fd", "_file")

    decoding = None

    def __init__(self, file: HasFileno | BaseProcess | int, fd: int | None = None) -> None:
        super().__init__()
        self._file = file
        self._fd = file.fileno() if fd is None else fd  # type: ignore[union-attr]

    def fileno(self) -> int:
        return self._fd

    def leave(self) -> HasFileno | BaseProcess | int:
        return self._file


def member_for(source: Selectable) -> Member:
    """``source`` as a member; a receiver is claimed. Raises what is wrong with it, ``TypeError`` where it is none."""
    if isinstance(source, (ReceiverBase, OpaqueReceiver)):
        return ReceiverMember(source)
    if isinstance(source, Connection):
        return ConnectionMember(source)
    if isinstance(source, Queue):
        return QueueMember(source)
    if isinstance(source, SimpleQueue):
        return SimpleQueueMember(source)
    if isinstance(source, BaseProcess):
        return DescriptorMember(source, source.sentinel)
    if isinstance(source, int) or hasattr(source, "fileno"):
        return DescriptorMember(source, source if isinstance(source, int) else None)
    raise TypeError(
        "a ReceiverSet takes receivers, our queues and connections, processes, and what has a fileno(), "
        f"not {type(source)!r}"
    )
