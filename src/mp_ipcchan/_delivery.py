"""Delivery: a message is taken and decoded so that a signal's handler which raises can't lose it.

Ctrl-C raises KeyboardInterrupt, an alarm whatever its handler likes, anywhere in the main thread
between two bytecodes. So what matters is done in one C call each, which no handler interrupts:
receiving and storing (a ``for`` over ``Packets.now``, or an unpacking), and, where descriptors make it
impossible to decode twice, decoding and storing. Between them the message is always in a variable, and if
anything but decoding it raises, it is put back: the next call gets it.

Python looks for signals after calls and at the start of functions and loops, not at a ``return``, a
variable's assignment or an index: those are what a message passes through on its way out. And from
3.12 on a ``while`` with a condition has a jump that no ``try`` or ``with`` around it covers: what
is raised there gets past them. So there is none inside of one in this package; ``tests`` check it.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

from . import _codec
from ._deadline import remaining
from ._inlet import Inlet, NoRoom, Spill
from ._interrupt import ATTEMPTS, raised_by_handler
from ._message import PLAIN, Incoming, Parcel, TooLargeError
from ._transport.unix import CUT, Packet
from .errors import Empty, ProtocolError, ShutDown

T = TypeVar("T")

#: Stands for an object that isn't decoded yet.
_NOTHING = object()


class Decoding(NamedTuple):
    """How the messages of a receiver become objects; see ``Delivery``."""

    loads: Callable[[bytes], Any]
    decoder: Callable[[Parcel], Iterator[Any]]
    report: Callable[[Exception, Incoming], None]
    #: What the messages of a typed channel are.
    of: Any = None


class Delivery:
    """For those who receive: they say how to take a message, this delivers it."""

    __slots__ = ()

    #: Decodes a plain frame; a function of C.
    _loads: Callable[[bytes], Any] = staticmethod(pickle.loads)
    #: Decodes a parcel: an iterator whose item is made in one C call.
    _decoder: Callable[[Parcel], Iterator[Any]] = staticmethod(_codec.decoder)

    @property
    def _decoding(self) -> Decoding:
        return Decoding(self._loads, self._decoder, self._report)

    def _take(self, block: bool, deadline: float | None) -> Incoming:
        """The next message. It must not be in the hands of a call when it returns."""
        raise NotImplementedError

    #: Whether ``_taken`` and ``_left`` do anything.
    _counts = False

    def _taken(self, count: int = 1) -> None:
        """``count`` messages are delivered, or of no use to anybody. Raises only where nothing was done."""

    def _left(self, count: int = 1) -> None:
        """``count`` messages were put back."""

    def _comes_late(self) -> bool:
        """Whether what has come while this waited may be newer than something elsewhere: then ``_take`` sees to it."""
        return False

    def _report(self, error: Exception, incoming: Incoming) -> None:  # noqa: ARG002  (others look at it)
        """Raise what a message that can't be decoded is to raise, if not ``error`` itself."""
        if isinstance(error, MemoryError) and not isinstance(error, TooLargeError):
            raise TooLargeError from error

    def _deliver(
        self,
        inlet: Inlet,
        direct: bool,
        block: bool,
        deadline: float | None,
        alone: bool = False,
        entries: memoryview | None = None,
        entry: int = 0,
    ) -> Any:
        """Take and decode a message. ``alone``: while nobody else receives; see ``_turn``.

        ``direct``: whether a packet may be received without asking ``_take``. A message that comes so is
        counted in ``entries[entry]``, if given, and not by ``_taken``.
        """
        incoming: Incoming | None = None
        packet: Packet | None = None
        decoding = late = turn = mine = False
        obj: Any = _NOTHING
        # Of the lock that there is now: forked meanwhile, by a signal's handler, a child has another.
        ends = inlet.ends
        try:
            try:
                if alone:
                    for turn in inlet.turns:  # noqa: B007
                        break
                    if not turn:
                        # By then the receiver may have been closed, or have moved: ``_take`` sees to that.
                        direct = False
                        [turn] = self._turn(inlet, deadline if block else 0.0)
                    if not turn or inlet.receiving:
                        self._refuse(turn and block)
                    mine = inlet.receiving = True
                if direct and not (inlet.ready or inlet.inbox or inlet.detour):
                    # The usual case: nothing waits in user space, and what comes is a plain packet.
                    try:
                        try:
                            for packet in inlet.packets.now:  # noqa: B007
                                break
                        except BlockingIOError:
                            if not block or deadline is not None:
                                raise
                            [packet] = inlet.await_packet()
                            late = self._comes_late()
                        data, ancillary, flags, _ = packet  # type: ignore[misc]
                        if ancillary or flags & CUT or late or not data.startswith(PLAIN):
                            inlet.inbox += (packet,)  # type: ignore[arg-type]
                            packet = None
                        else:
                            incoming = data
                            decoding = True
                            # A handler that raises behind this call leaves the message to be decoded again.
                            obj = self._loads(data)
                            if entries is not None:
                                # No call in it, so neither a handler nor another thread comes between.
                                entries[entry] += 1
                    except (BlockingIOError, ConnectionResetError):
                        if packet is not None:
                            raise
                if incoming is None:
                    incoming = self._take(block, deadline)
                    decoding = True
                    if incoming.__class__ is bytes:
                        obj = self._loads(incoming)
                    else:
                        [obj] = self._decoder(incoming)  # type: ignore[arg-type]
                    if self._counts:
                        self._taken()
            finally:
                if turn:
                    if mine:
                        inlet.receiving = False
                    for turn in ends:  # noqa: B007
                        break
        except BaseException as error:
            if turn:
                self._end_turn(inlet, mine, ends)
            if incoming is None:
                if packet is not None:
                    # Without a call: at the next one, another handler may follow.
                    inlet.inbox += (packet,)
                raise
            decoding = decoding and obj is _NOTHING
            try:
                undecodable = self._is_undecodable(inlet, incoming, error, decoding)
            except BaseException:
                # That other handler, before anything was done.
                undecodable = self._is_undecodable(inlet, incoming, error, decoding)
            if undecodable:
                # Not kept in a variable: that would be a cycle, through the traceback, which holds descriptors open.
                self._report(error, incoming)  # type: ignore[arg-type]
            raise
        return obj

    @staticmethod
    def _turn(inlet: Inlet, deadline: float | None) -> Iterator[bool]:
        """Its one step waits while another thread receives, acquires the lock, and says whether it did in time."""
        left = remaining(deadline)
        # The longest that threading takes is some 292 years; longer is forever.
        return map(inlet.lock.acquire, (True,), (-1 if left is None or left > threading.TIMEOUT_MAX else left,))

    @staticmethod
    def _end_turn(inlet: Inlet, mine: bool, ends: Iterator[object]) -> None:
        """End a turn that a signal's handler kept from ending: 3.10 looks for signals before it does a ``finally``."""
        if mine:
            inlet.receiving = False
        next(ends)

    @staticmethod
    def _refuse(reentered: bool) -> NoReturn:
        if reentered:
            raise RuntimeError("this thread is receiving from it already: use try_recv in a signal's handler")
        raise Empty("another thread is receiving, and no message came")

    def _is_undecodable(self, inlet: Inlet, incoming: Incoming, error: BaseException, decoding: bool) -> bool:
        """Whether ``error`` is what decoding ``incoming`` raised. If not, the message is put back."""
        held: list[Incoming | Spill] = [incoming]
        counted = undecodable = False
        for _ in ATTEMPTS:
            try:
                undecodable = decoding and isinstance(error, Exception) and not raised_by_handler(error)
                if undecodable or not is_intact(incoming):
                    # Some of its descriptors may have been handed out already.
                    if not counted:
                        self._taken()
                        counted = True
                else:
                    inlet.take_back(held)
                    if not counted:
                        self._left()
                        counted = True
                break
            except BaseException:
                # Another handler; what it interrupted is done again, if it hasn't been.
                continue
        return undecodable

    def _deliver_many(self, inlet: Inlet, most: int, deadline: float | None, alone: bool = False) -> list[Any]:
        """Wait for a message as ``_deliver`` does; decode it and those that are there, ``most`` in all."""
        taken: list[Incoming] = []
        decoded: list[Any] = []
        decoding = turn = mine = False
        ends = inlet.ends
        try:
            try:
                if alone:
                    [turn] = self._turn(inlet, deadline)
                    if not turn or inlet.receiving:
                        self._refuse(turn)
                    mine = inlet.receiving = True
                taken.append(self._take(True, deadline))
                self._take_more(inlet, taken, most, alone)
                decoding = True
                if {bytes}.issuperset(map(type, taken)):
                    decoded.extend(map(self._loads, taken))  # type: ignore[arg-type]
                else:
                    self._decode(taken, decoded)
                if self._counts:
                    self._taken(len(taken))
            finally:
                if turn:
                    if mine:
                        inlet.receiving = False
                    for turn in ends:  # noqa: B007
                        break
        except BaseException as error:
            if turn:
                self._end_turn(inlet, mine, ends)
            if not taken:
                raise
            try:
                raises, undecodable = self._settle_many(inlet, taken, decoded, decoding, error)
            except BaseException:
                # Another handler, before anything was done.
                raises, undecodable = self._settle_many(inlet, taken, decoded, decoding, error)
            if undecodable:
                self._report(error, taken[0])  # type: ignore[arg-type]
            if raises:
                raise
        return decoded

    def _settle_many(
        self, inlet: Inlet, taken: list[Incoming], decoded: list[Any], decoding: bool, error: BaseException
    ) -> tuple[bool, bool]:
        """Put back what was not decoded, as ``error`` came between.

        Whether that is to be raised, and whether it is of a message that can't be decoded.
        """
        back: list[Incoming | Spill] | None = None
        raises, undecodable = True, False
        staying, left = 0, False
        for _ in ATTEMPTS:
            try:
                if back is None:
                    done = len(decoded)
                    if decoding and done < len(taken) and isinstance(error, Exception) and not raised_by_handler(error):
                        # A message that can't be decoded: the next call says so, if there is something to return now.
                        raises = undecodable = not done
                        rest = taken[done or 1 :]
                    else:
                        begun = done + 1 if decoding else 0
                        rest = [one for one in taken[:begun] if is_intact(one)] + taken[begun:]
                    staying, back = len(rest), [*rest]
                # What gets there leaves the list.
                inlet.take_back(back)
                if not left:
                    self._left(staying)
                    left = True
                self._taken(len(taken) - staying)
                break
            except BaseException:
                # Another handler; what it interrupted is done again, if it hasn't been.
                continue
        return raises, undecodable

    def _deliver_by(
        self, inlet: Inlet, copy: Callable[[Incoming], T], deadline: float | None, alone: bool = False
    ) -> T:
        """Wait for a message and return what ``copy`` makes of it. If that raises, the message is still there.

        But for ``ProtocolError`` and ``MemoryError``: then it is of no use. ``alone`` as in ``_deliver``.
        """
        incoming: Incoming | None = None
        copied: list[T] = []
        turn = mine = False
        ends = inlet.ends
        try:
            try:
                if alone:
                    [turn] = self._turn(inlet, deadline)
                    if not turn or inlet.receiving:
                        self._refuse(turn)
                    mine = inlet.receiving = True
                incoming = self._take(True, deadline)
                copied.extend(map(copy, (incoming,)))
            finally:
                if turn:
                    if mine:
                        inlet.receiving = False
                    for turn in ends:  # noqa: B007
                        break
        except BaseException as error:
            if turn:
                self._end_turn(inlet, mine, ends)
            if incoming is not None and not isinstance(error, (ProtocolError, MemoryError)):
                inlet.put_back(incoming)
            if incoming is not None and isinstance(error, MemoryError):
                raise TooLargeError from error
            raise
        return copied[0]

    def _take_more(self, inlet: Inlet, taken: list[Incoming], most: int, alone: bool) -> None:
        """Take what is there until ``taken`` has ``most``. ``alone``: nobody else takes."""
        try:
            while True:
                if len(taken) >= most:
                    return
                if not alone or not inlet.take_packed(taken, most):
                    taken.append(self._take(False, None))
        except (Empty, EOFError, ShutDown, NoRoom):
            # An end shows again in the next call, and so does what there is no room for, which those may have that
            # were taken: this call has something to return.
            pass

    def _decode(self, taken: list[Incoming], decoded: list[Any]) -> None:
        for one in taken:
            decoded.extend(map(self._loads, (one,)) if isinstance(one, bytes) else self._decoder(one))


def is_intact(incoming: Incoming) -> bool:
    """Whether a message may be decoded once more."""
    return isinstance(incoming, bytes) or not incoming.kinds
