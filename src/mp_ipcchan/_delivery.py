"""Delivery: a message is taken and decoded so that a signal's handler which raises can't lose it.

Ctrl-C raises KeyboardInterrupt, an alarm whatever its handler likes, anywhere in the main thread
between two bytecodes. So what matters is done in one C call each, which no handler interrupts:
receiving and storing (``Inlet.take``), decoding and storing (here). Between them the message is always
in a variable, and if anything but decoding it raises, it is put back: the next call gets it.

Python looks for signals after calls and at the start of functions and loops, not at a ``return``, a
variable's assignment or an index: those are what a message passes through on its way out.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from itertools import starmap
from typing import Any, Protocol

from . import _codec
from ._inlet import Inlet
from ._message import PLAIN, Incoming, Parcel
from ._transport.unix import AT_ONCE, CUT, WAITING, Packet


class Lock(Protocol):
    def release(self) -> None: ...


class Delivery:
    """For those who receive: they say how to take a message, this delivers it."""

    __slots__ = ()

    #: Decodes a plain frame; a function of C.
    _loads: Callable[[bytes], Any] = staticmethod(pickle.loads)
    #: Decodes a parcel: an iterator whose item is made in one C call.
    _decoder: Callable[[Parcel], Iterator[Any]] = staticmethod(_codec.decoder)

    def _take(self, block: bool, deadline: float | None) -> Incoming:
        """The next message. It must not be in the hands of a call when it returns."""
        raise NotImplementedError

    #: Whether a packet may be received without asking ``_take``.
    _direct = True
    #: Whether ``_taken`` and ``_left`` do anything.
    _counts = False

    def _taken(self) -> None:
        """The message is delivered, or is of no use to anybody."""

    def _left(self) -> None:
        """The message was put back."""

    def _report(self, error: Exception) -> None:
        """Raise what a message that can't be decoded is to raise, if not ``error`` itself."""

    def _deliver(
        self, inlet: Inlet, block: bool, deadline: float | None, lock: Lock | None = None, keep: bool = False
    ) -> Any:
        """Take and decode a message. ``lock``, if given, is held; it is released whatever happens.

        With ``keep``, a message that can't be decoded is put back, for the next call to fail with.
        """
        incoming: Incoming | None = None
        box: list[Packet] = []
        decoded: list[Any] = []
        decoding = False
        try:
            try:
                if lock is not None:
                    inlet.receiving = True
                if self._direct and not inlet.ready and not inlet.inbox:
                    # The usual case: nothing waits in user space, and what comes is a plain packet.
                    try:
                        box.extend(starmap(inlet.recvmsg, WAITING if block and deadline is None else AT_ONCE))
                        data, ancillary, flags, _ = box[0]
                        if data.startswith(PLAIN) and not ancillary and not flags & CUT:
                            incoming = data
                        else:
                            inlet.keep(box)
                    except (BlockingIOError, ConnectionResetError):
                        pass
                if incoming is None:
                    incoming = self._take(block, deadline)
                items = map(self._loads, (incoming,)) if isinstance(incoming, bytes) else self._decoder(incoming)
                decoding = True
                decoded.extend(items)
                if self._counts:
                    self._taken()
            finally:
                if lock is not None:
                    inlet.receiving = False
                    lock.release()
        except BaseException as error:
            if incoming is None:
                inlet.keep(box)
                raise
            intact = isinstance(incoming, bytes) or not incoming.kinds
            undecodable = decoding and not decoded
            # Not kept in a variable: that would be a cycle, through the traceback, which holds descriptors open.
            if undecodable and isinstance(error, Exception) and not (keep and intact):
                self._taken()
                self._report(error)
                raise
            if intact:
                inlet.put_back(incoming)
                self._left()
            else:
                # Some of its descriptors may have been handed out already.
                self._taken()
            if undecodable and isinstance(error, Exception):
                self._report(error)
            raise
        return decoded[0]
