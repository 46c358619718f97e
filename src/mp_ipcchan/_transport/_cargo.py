"""Cargo: the descriptors that the messages of a spill bring, in carriers, each message's as one packet with its number.

A reader needs no more of them at a time than if each message had come by itself. Two readers may find each other's.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from itertools import starmap
from typing import Any

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


class Cargo:
    """Owns the carriers."""

    __slots__ = ("_boxes", "carriers")

    def __init__(self, carriers: list[int]) -> None:
        self.carriers = carriers
        #: Packets of carriers that were received and not used after all.
        self._boxes: deque[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = deque()

    def check_room(self, count: int) -> None:
        """Raise ``NoRoom`` where this process has none for so many descriptors."""
        if self.carriers:
            check_room(self.carriers[0], count)

    def unload(self) -> tuple[int, list[int]]:
        """The descriptors that are next, and which message's they are."""
        box: list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = []
        try:
            try:
                box.extend(starmap(self._boxes.popleft, ((),)))
            except IndexError:
                for carrier in self.carriers:
                    if _receive(carrier, box):
                        break
            if not box or len(box[0][0]) != _NUMBER.size:
                raise ProtocolError("the last packet of a process brings too few descriptors")
            if box[0][2] & socket.MSG_CTRUNC:
                for fd in descriptors_in(box[0][1]):
                    os.close(fd)
                box.clear()
                raise too_many()
            fds = descriptors_in(box[0][1])
            return _NUMBER.unpack(box[0][0])[0], fds
        except BaseException:
            self._boxes.extend(box)
            raise

    def close(self) -> None:
        while self._boxes:
            for fd in descriptors_in(self._boxes.popleft()[1]):
                os.close(fd)
        carriers, self.carriers = self.carriers, []
        for carrier in carriers:
            os.close(carrier)


def _receive(carrier: int, box: list[Any]) -> bool:
    """Receive a packet out of a carrier into ``box``; False where there is none."""
    try:
        sock = socket.socket(fileno=carrier)
    except OSError as error:
        raise ProtocolError("the last packet of a process brings something else as a carrier") from error
    try:
        box.extend(starmap(sock.recvmsg, (_UNLOAD,)))
    except BlockingIOError:
        return False
    except OSError as error:
        raise ProtocolError(
            "the last packet of a process brings a carrier that nothing can be received from"
        ) from error
    finally:
        sock.detach()
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
