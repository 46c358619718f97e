"""Cargo: the descriptors that the messages of a spill bring, in carriers, each message's as one packet with its number.

A reader needs no more of them at a time than if each message had come by itself. Two readers may find each other's.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat, starmap
from typing import Any, TypeAlias

from .._message import Descriptors
from ..errors import ProtocolError
from ._carrier import MAX_IN_PACKET, Carrier, check_room, descriptors_in, load, too_many

#: Beside a message's descriptors in a carrier: which message.
_NUMBER = struct.Struct("<Q")
_UNLOAD = (
    _NUMBER.size,
    socket.CMSG_SPACE(MAX_IN_PACKET * array.array("i").itemsize),
    int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC),
)


# Of the part of ``socket.socket`` that is written in C.
_open: Callable[..., Any] = partial(socket.SocketType, int(socket.AF_UNIX), int(socket.SOCK_SEQPACKET), 0)
#: What ``recvmsg`` returns: data, ancillary data, flags, address.
Packet: TypeAlias = tuple[bytes, list[tuple[int, int, bytes]], int, Any]


class Cargo:
    """Owns the carriers."""

    __slots__ = ("_returned", "carriers")

    def __init__(self, carriers: list[int]) -> None:
        self.carriers = carriers
        #: Packets of carriers that were received and not used after all.
        self._returned: deque[Packet] = deque()

    def check_room(self, count: int) -> None:
        """Raise ``NoRoom`` where this process has none for so many descriptors."""
        if self.carriers:
            check_room(self.carriers[0], count)

    def take(self, into: list[Packet]) -> None:
        """Take the packet that is next, with some message's descriptors. It has to be used, or ``put_back``.

        Raises ``OSError`` where this process has no room for them, ``ProtocolError`` where there is none.
        """
        try:
            into.extend(starmap(self._returned.popleft, ((),)))
        except IndexError:
            for carrier in self.carriers:
                if _receive(carrier, into):
                    break
        if not into or len(into[0][0]) != _NUMBER.size:
            raise ProtocolError("the last packet of a process brings too few descriptors")
        if into[0][2] & socket.MSG_CTRUNC:
            for fd in descriptors_in(into[0][1]):
                os.close(fd)
            into.clear()
            raise too_many()

    def put_back(self, packets: list[Packet]) -> None:
        """Let the next ``take`` have them; they leave the list as they get there."""
        self._returned.extend(starmap(packets.pop, repeat((), len(packets))))

    def close(self) -> None:
        while self._returned:
            for fd in descriptors_in(self._returned.popleft()[1]):
                os.close(fd)
        list(map(os.close, map(self.carriers.pop, [-1] * len(self.carriers))))


def numbered(packet: Packet) -> tuple[int, list[int]]:
    """Which message's descriptors a packet has, and these."""
    return _NUMBER.unpack(packet[0])[0], descriptors_in(packet[1])


def _receive(carrier: int, into: list[Packet]) -> bool:
    """Receive a packet out of a carrier into ``into``; False where there is none."""
    copies: list[int] = []
    held: list[socket.socket] = []
    try:
        # Of a duplicate, and by one C call: a socket that a signal's handler leaves behind closes what it is of.
        copies.extend(map(os.dup, (carrier,)))
        held.extend(map(_open, copies))
        into.extend(starmap(held[0].recvmsg, (_UNLOAD,)))
    except BlockingIOError:
        return False
    except OSError as error:
        raise ProtocolError(
            "the last packet of a process brings a carrier that nothing can be received from"
        ) from error
    finally:
        for sock in held:
            sock.close()
        if not held:
            list(map(os.close, copies))
    return True


def load_all(loads: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """Carriers with every one of ``loads``, in order, each as one packet with the message's number."""
    carriers = Descriptors([])
    current: Carrier | None = None
    try:
        for number, fds in loads:
            # More than a packet takes go in a carrier of their own, inside.
            nested = load(fds) if len(fds) > MAX_IN_PACKET else None
            if nested is not None:
                fds = [nested.fileno()]
            while True:
                if current is None:
                    current = Carrier()
                if current.add(fds, _NUMBER.pack(number)):
                    break
                carriers.fds.append(current.detach())
                current = None
            _close(nested)
        if current is not None:
            carriers.fds.append(current.detach())
            current = None
    finally:
        _close(current)
    made, carriers.fds = carriers.fds, []
    return made


def _close(carrier: Carrier | socket.socket | None) -> None:
    if carrier is not None:
        carrier.close()
