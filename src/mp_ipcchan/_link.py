"""Links: the one descriptor that all handles of this process on the same end of a channel share.

A link is found again by its socket's inode. So a sender that arrives ten thousand times costs one
descriptor, and the backlog of a channel is one per process, in order, whichever handle sends.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

from ._inlet import Inlet
from ._message import Handle, HandleKind, MovingHandle
from ._outlet import Outlet
from ._transport import unix

if TYPE_CHECKING:
    from ._endpoint import Endpoint

#: Reentrant: a finaliser may release a link while this thread registers another.
_lock = threading.RLock()
_links: weakref.WeakValueDictionary[int, Link] = weakref.WeakValueDictionary()


#: What messages that have not left have taken along of links. A forked child lets go of it: it is the parent's.
in_transit: weakref.WeakSet[Handle] = weakref.WeakSet()


class Closable(Protocol):
    def close(self) -> None: ...


class User(Protocol):
    _link: Link | None


class Link:
    """Owns a socket; counts the handles that use it and closes it with the last one."""

    __slots__ = ("__weakref__", "_inode", "_peer", "_uses", "front", "inlet", "outlet", "sock", "waits")

    def __init__(self, sock: socket.socket, inode: int) -> None:
        self.sock: socket.socket = sock
        self._inode = inode
        #: Of the other end, where both were made here; 0 where that isn't known.
        self._peer = 0
        self._uses = 1
        #: The same end of a queue's front lane (``_ends``); this link's to release.
        self.front: Link | None = None
        #: The coroutines that wait for it (``_async``), to be told when it closes.
        self.waits: Closable | None = None
        self.inlet: Inlet = Inlet(sock)
        self.outlet: Outlet = Outlet(sock, self._emptied)
        _links[inode] = self

    @classmethod
    def pair(cls, send_buffer: int) -> tuple[Link, Link]:
        """The two ends of a new socket pair, each used once."""
        first, second = map(cls.of, unix.make_pair(send_buffer))
        first._peer, second._peer = second._inode, first._inode
        return first, second

    @classmethod
    def of(cls, sock: socket.socket) -> Link:
        """The link for ``sock``, used once more; ``sock`` is taken over, or closed if there is one already."""
        inode = os.fstat(sock.fileno()).st_ino
        with _lock:
            link = _links.get(inode)
            if link is not None:
                # In use, or, unused, waiting for its backlog to go: a second one would overtake that.
                link._uses += 1
                sock.close()
                return link
            return cls(sock, inode)

    @classmethod
    def adopt(cls, brought: int | Link) -> Link:
        """As ``of``, for a descriptor that was received. ``ProtocolError`` where it is no socket of ours.

        A link that came in its place (see ``lend``) is the caller's as it is.
        """
        return brought if isinstance(brought, Link) else cls.of(unix.adopt(brought))

    def fileno(self) -> int:
        return self.sock.fileno()

    def leads_to(self, end: object) -> bool:
        """Whether what is sent here comes out at ``end``; False where this process can't tell."""
        return self._peer > 0 and self._peer == getattr(end, "_inode", 0)

    def lend(self, endpoint: Endpoint | None) -> MovingHandle | None:  # noqa: ARG002
        """A handle that takes ``endpoint``, which stands on this, to wherever a message goes; it need not be a
        descriptor there. None where the link's own descriptor does (``_lane_message``).
        """
        return None

    def attach(self, front: Link) -> None:
        """Let ``front`` be the front lane, which is taken over, or released where there is one already."""
        with _lock:
            if self.front is None:
                self.front = front
                self.inlet.front = front.sock
                return
        front.release()

    def retain(self) -> Link:
        with _lock:
            self._uses += 1
        return self

    def let_go(self, user: User) -> None:
        """``user`` gives up its use of this, unless another thread was faster."""
        mine = False
        try:
            with _lock:
                if user._link is self:
                    # No signal's handler comes between these.
                    user._link = None
                    self._uses -= 1
                    mine = True
            if mine:
                self._end_if_unused()
        except BaseException:
            # Perhaps a signal's handler: what it interrupted is done again, as ``user`` has nothing to close any more.
            if mine:
                self._end_if_unused()
            raise

    def release(self) -> None:
        """One handle less. With the last one, what still waits to be sent is sent, then the socket closes."""
        with _lock:
            self._uses -= 1
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        with _lock:
            if self._uses or self.outlet.backlog:
                return
            self._forget()
        self._close()

    def _emptied(self) -> None:
        """The backlog has gone: the socket was only waiting for that, if nobody uses it any more."""
        with _lock:
            if self._uses:
                return
            self._forget()
        self._close()

    def _forget(self) -> None:
        if _links.get(self._inode) is self:
            del _links[self._inode]

    def _close(self) -> None:
        if self.waits:
            self.waits.close()
        self.inlet.close()
        self.outlet.close()
        self.sock.close()
        front, self.front = self.front, None
        if front:
            front.release()


class LinkHandle:
    """A link that a message takes along by copy: ours stays open until the kernel has its own."""

    __slots__ = ("__weakref__", "_link", "kind")

    def __init__(self, kind: HandleKind, link: Link) -> None:
        self.kind = kind
        self._link: Link | None = link.retain()
        in_transit.add(self)

    def fileno(self) -> int:
        assert self._link is not None
        return self._link.fileno()

    def sent(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.release()

    unsent = sent


def _reset_after_fork() -> None:
    """In a forked child: locks may be held by threads that are not here, and what waits is the parent's."""
    global _lock
    _lock = threading.RLock()
    for link in list(_links.values()):
        link.waits = None
        link.inlet.reset_after_fork()
        link.outlet.reset_after_fork()
        if not link._uses:
            # It was open for its backlog alone, which is the parent's.
            link._forget()
            link._close()


os.register_at_fork(after_in_child=_reset_after_fork)
