"""Where clients of a server are from when they connect until they are given out, with the first message that they say.

Whoever speaks first is served first. Who has connected is heard at once: most have spoken by then. Who hasn't is
*silent*, and waited for beside all others; while there are any, whoever comes is waited for with them, as one of them
may have spoken meanwhile.

Guarantees: what is done here is done in steps, each of which may be interrupted by a signal's handler that raises,
and is then taken up where it was.
Relies on: one thread at a time; a server has a lock. A handler may close it in the middle of a step.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice
from time import monotonic
from typing import Any, NamedTuple, TypeAlias, TypeVar

from .._deadline import wait_for
from .._inlet import NoRoom
from .._interrupt import raised_by_handler
from .._link import Link
from .._receiver import Receiver
from .._transport import unix
from .._typed_codec import TypedCodec
from ..errors import Disconnected, Empty, ProtocolError, SerializationError
from ._listener import Listener
from ._peer import Admission, peer_at

_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger("mp_ipcchan")

T = TypeVar("T")

#: What ``accept`` returns.
Guest: TypeAlias = "tuple[Receiver[T], T]"


class Client(NamedTuple):
    """One that is in, and hasn't spoken; until when (monotonic seconds) it is waited for."""

    receiver: Receiver[Any]
    until: float | None


class Lobby:
    def __init__(self, admission: Admission, typed: TypedCodec | None, patience: float | None) -> None:
        self._admission = admission
        self._typed = typed
        self._patience = patience
        #: Clients whose first message was taken; empty, but for moments.
        self.guests: deque[Guest[Any]] = deque()
        #: Who has come, and wasn't looked at.
        self._arrived: deque[socket.socket] = deque()
        #: By descriptor, whoever came first ahead; each is registered with ``epoll``.
        self._silent: dict[int, Client] = {}
        #: The one that is being heard; in ``_silent``, too, if it was silent before.
        self._speaking: Client | None = None
        #: Why no client could be let in, or heard, lately.
        self.drought: OSError | None = None
        #: The silent clients.
        self.epoll: select.epoll = select.epoll()

    def has_guest(self) -> bool:
        if not self.guests:
            return False
        if self._speaking is not None:
            self._unwatch(self._speaking)
            self._speaking = None
        return True

    def until(self) -> float | None:
        """When a client that stays silent is to be dismissed (monotonic seconds)."""
        return next((client.until for client in islice(self._silent.values(), 1)), None)

    def step(self, listener: Listener, disappointed: Callable[[Client, Exception], None]) -> bool:
        """Do one thing; False where there was nothing to do, or no room for it.

        ``disappointed`` is told who has left without a word, or said what can't be understood, and is to ``dismiss``
        them, or they are heard again.
        """
        if self._arrived:
            self._welcome(self._arrived[0], listener)
        elif self._speaking is None:
            self._dismiss_impatient()
            called = self.epoll.poll(0, 1) if self._silent else []
            for fd, _ in called:
                # None for the bell of a server that closes, which the next step sees to.
                self._speaking = self._silent.get(fd)
            if not called:
                if not self._let_in(listener):
                    return False
                self._welcome(self._arrived[0], listener)
        return self._speaking is None or self._hear(self._speaking, listener.name, disappointed)

    def _let_in(self, listener: Listener) -> bool:
        """Let in who waits at the door; False where there is nobody, or no room."""
        if listener.closed:
            return False
        try:
            unix.accept(listener.sock, self._arrived)
        except BlockingIOError:
            self.drought = None
            return False
        except OSError as error:
            if error.errno not in _NO_DESCRIPTORS:
                raise
            self._suffer(error, f"a client of {listener.name} waits, but this process has no descriptor for it")
            return False
        self.drought = None
        return True

    def _welcome(self, sock: socket.socket, listener: Listener) -> None:
        """Look at who has arrived, and have them heard; or refuse."""
        client = self._speaking or self._silent.get(sock.fileno())
        if client is None:
            peer = peer_at(sock)
            try:
                admitted = self._admission.admits(peer)
            except Exception as error:
                if not raised_by_handler(error):
                    self._arrived.popleft().close()
                raise
            if not admitted:
                log.info("%s: refused a client of uid %d (pid %d)", listener.name, peer.uid, peer.pid)
                self._arrived.popleft().close()
                return
            unix.let_wait(sock)
            # Known before it can be closed: a receiver that is dropped with a link takes that along.
            until = None if self._patience is None else monotonic() + self._patience
            client = self._speaking = Client(Receiver.__new__(Receiver), until)
        # A socket so new has no other link than one of an attempt that was interrupted. Nor can anybody see
        # that the receiver is made twice.
        link = getattr(client.receiver, "_link", None) or Link(sock, os.fstat(sock.fileno()).st_ino)
        client.receiver.__init__(link, self._typed)
        if listener.once:
            listener.close()
        if self._silent:
            self._watch(client)
        self._arrived.popleft()

    def _hear(self, client: Client, name: str, disappointed: Callable[[Client, Exception], None]) -> bool:
        """Take the first message of a client; False where there is no room for what it brings."""
        receiver = client.receiver
        if receiver.closed:
            # It was seen off, but for this.
            self._speaking = None
            return True
        try:
            message = receiver.try_recv()
            # Until it is in there, and unless it was none of these, the client is heard again.
            self.guests.append((receiver, message))
        except Empty:
            self._watch(client)
        except NoRoom:
            self._watch(client)
            error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._suffer(error, f"a client of {name} brings more descriptors than this process has room for")
            return False
        except (Disconnected, SerializationError, ProtocolError) as error:
            disappointed(client, error)
        return True

    def _suffer(self, error: OSError, why: str) -> None:
        if self.drought is None:
            log.warning("%s; it is let in when there is one (ulimit -n)", why)
        self.drought = OSError(error.errno, f"{error.strerror}: {why}; close some, or raise the limit (ulimit -n)")

    def _watch(self, client: Client) -> None:
        """Wait until that client speaks."""
        fd = client.receiver._open_link().fileno()
        self._silent[fd] = client
        try:
            self.epoll.register(fd, select.EPOLLIN)
        except FileExistsError:
            # It has fired for nothing.
            pass
        self._speaking = None

    def _unwatch(self, client: Client) -> None:
        fd = client.receiver._open_link().fileno()
        if fd not in self._silent:
            return
        # While it is open: a copy in another process would go on firing.
        try:
            self.epoll.unregister(fd)
        except FileNotFoundError:
            pass
        self._silent.pop(fd, None)

    def dismiss(self, client: Client) -> None:
        self._unwatch(client)
        client.receiver.close()
        self._speaking = None

    def _dismiss_impatient(self) -> None:
        for fd, client in list(self._silent.items()) if self._patience is not None else []:
            if client.until is None or monotonic() < client.until or wait_for(fd, select.POLLIN, 0):
                return
            self.dismiss(client)

    def drop_all(self) -> None:
        """Close whoever has come and was not given out."""
        speaking, self._speaking = self._speaking, None
        clients = [*self._silent.values(), *([] if speaking is None else [speaking])]
        for receiver in [*(client.receiver for client in clients), *(one for one, _ in self.guests)]:
            if getattr(receiver, "_link", None) is not None:
                receiver.close()
        for sock in self._arrived:
            sock.close()
        self._silent.clear()
        self.guests.clear()
        self._arrived.clear()
