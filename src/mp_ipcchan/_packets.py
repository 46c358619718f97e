"""The packets of a socket, received so that none is lost for want of descriptors.

Of the descriptors that a packet brings the kernel drops those that this process can't open, and by then the packet is
gone. So where some may come it is seen first that there is room: one is opened and closed, or, where they may be
several and few are free, the packet is looked at, which leaves it where it is. Nothing tells of a packet's
descriptors without costing half of what receiving it does; so behind some packets without any, nobody asks.
"""

from __future__ import annotations

import array
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from itertools import repeat, starmap

from ._transport.unix import AT_ONCE, WAITING, NoRoom, Packet, await_next, check_next, has_one, has_plenty

#: After so many packets in a row without descriptors, the next is received without asking.
_PLAIN_ROW = 8
#: How long (bytes) the ancillary data of a packet is that brings one descriptor.
_ONE = array.array("i").itemsize


class Packets:
    """Each step of its iterators receives a packet, and they have no end.

    ``for packet in packets.now: break`` receives and stores in one C call, and faster than by calling anything. They
    raise ``NoRoom`` where the next packet brings more descriptors than this process has room for; it is still there.
    """

    __slots__ = ("__weakref__", "_fd", "_plain", "_recvmsg", "_several", "_spare", "_wary", "now", "unasked", "waiting")

    def __init__(self, sock: socket.socket) -> None:
        self._fd = sock.fileno()
        self._recvmsg: Callable[[int, int, int], Packet] = sock.recvmsg
        #: Loses what there is no room for. Raises ``BlockingIOError`` where there is no packet now.
        self.unasked: Iterator[Packet] = starmap(sock.recvmsg, repeat(AT_ONCE))
        me = weakref.ref(self)
        self._wary: Iterator[Packet] = starmap(sock.recvmsg, starmap(_check_next, repeat((me,))))
        #: One of these two.
        self.now: Iterator[Packet] = self._wary
        #: Waits for a packet.
        self.waiting: Iterator[Packet] = starmap(sock.recvmsg, starmap(_await_next, repeat((me,))))
        #: How many packets have come, so far as it matters, since one has brought descriptors.
        self._plain = 0
        #: Whether the next may bring more than one.
        self._several = True
        #: Each step opens a descriptor, if there is room for one, and closes it, in one C call.
        self._spare: Iterator[None] = map(os.close, map(os.dup, repeat(self._fd)))

    def expect_more(self, size: int) -> None:
        """A packet has brought descriptors, ``size`` bytes of them: so may the next."""
        self._plain, self.now = 0, self._wary
        self._several = size > _ONE

    def fits(self) -> bool:
        """Whether this process has room for the descriptors of the packet that is next, if there is one."""
        try:
            check_next(self._recvmsg)
        except NoRoom:
            return False
        except OSError:
            pass
        return True

    def _has_room(self) -> bool:
        """Whether there is certainly room for what the next packet may bring."""
        return has_plenty(self._fd) if self._several else has_one(self._spare)


def _check_next(packets_ref: weakref.ref[Packets]) -> tuple[int, int, int]:
    """How to receive the next packet, once it is certain that there is room for what it brings."""
    packets = packets_ref()
    assert packets
    if not packets._has_room():
        check_next(packets._recvmsg)
    packets._plain += 1
    if packets._plain == _PLAIN_ROW:
        packets.now = packets.unasked
    return AT_ONCE


def _await_next(packets_ref: weakref.ref[Packets]) -> tuple[int, int, int]:
    """As ``_check_next``, for who waits; it costs little beside that."""
    packets = packets_ref()
    assert packets
    if packets.now is packets.unasked or packets._has_room():
        return WAITING
    await_next(packets._recvmsg)
    return _check_next(packets_ref)
