"""Who is at the other end of a socket, as the kernel tells, and who may come in."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, TypeAlias

_CREDENTIALS = struct.Struct("iII")
#: How many users there are where every user of the machine is known: all but -1.
_EVERYBODY = 2**32 - 1

#: Users beside one's own, or who decides: called with pid, uid and gid of each client.
Allow: TypeAlias = Collection[int] | Callable[[int, int, int], object] | None


class Peer(NamedTuple):
    """A process as it was when it connected: its number, and the user and group that it acted for.

    The number may belong to another process by now, if that one has ended.
    """

    pid: int
    uid: int
    gid: int


def peer_at(sock: socket.socket) -> Peer:
    return Peer(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


class Admission:
    """Decides who may come in: this user and those in ``allow``; or whom the function ``allow`` says."""

    __slots__ = ("_decide", "_unknown", "_users")

    def __init__(self, allow: Allow) -> None:
        self._decide = allow if callable(allow) else None
        self._users: frozenset[int] = frozenset()
        if allow is not None and not callable(allow):
            if isinstance(allow, (int, str, bytes)) or not all(isinstance(uid, int) for uid in allow):
                raise TypeError(f"allow is a set of uids, or a function of pid, uid and gid, not {allow!r}")
            self._users = frozenset(allow)
        #: The number of those who have none here.
        self._unknown = _unknown_uid()
        if allow is None and self._unknown == os.geteuid():
            raise PermissionError(
                f"this process's user has no number in its user namespace (it shows as {os.geteuid()}, as all such "
                f"users do), so that nobody can be told apart from it: say with allow= who may connect"
            )

    @property
    def of_others(self) -> bool:
        """Whether other users may be admitted."""
        return bool(self._users) or self._decide is not None

    def admits(self, peer: Peer) -> bool:
        if self._decide is not None:
            return bool(self._decide(*peer))
        return (peer.uid == os.geteuid() or peer.uid in self._users) and peer.uid != self._unknown


def may_be_anybody(uid: int) -> bool:
    """Whether ``uid`` may stand for users that this user namespace has no number for: they all get the same one."""
    return uid == _unknown_uid()


def _unknown_uid() -> int | None:
    return None if _knows_everybody() else _overflow_uid()


def _overflow_uid() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return 65534


def _knows_everybody() -> bool:
    try:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except OSError:
        return False
    return sum(int(line.split()[2]) for line in lines) >= _EVERYBODY
