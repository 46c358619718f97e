"""What both servers are: clients come to a name, and are given out when they have spoken.

A client is let in when it has connected, and is given out, as a receiver, with the first message that it says.
In between it is *silent*, and waited for beside all others: whoever speaks first is served first.

Guarantees: a client that is dead, silent or talks nonsense holds nobody up. Whatever a signal's handler raises,
a first message that was taken is given out by the next ``accept`` (but on CPython 3.10, as ``_delivery`` says).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import weakref
from collections import deque
from itertools import islice, starmap
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from .._async import pause, readable
from .._deadline import deadline_in, wait_for
from .._inlet import NoRoom
from .._interrupt import raised_by_handler
from .._link import Link
from .._message import CHANNEL_BUFFER
from .._receiver import Receiver
from .._transport import unix
from .._typed_codec import codec_of
from ..errors import Disconnected, Empty, EndpointClosed, ProtocolError, SerializationError
from ._listener import Listener
from ._peer import Admission, Allow, peer_at
from ._watch import Mortal, Watch

if TYPE_CHECKING:
    from typing_extensions import Self

#: How many clients one look lets in, hears or sees off, at most: a flood must not outlast a timeout.
_MOST_STEPS = 10_000
#: How long (seconds) to leave new clients alone while there are no descriptors for them.
_DROUGHT = 0.05
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger("mp_ipcchan")

#: What ``accept`` returns.
Guest: TypeAlias = "tuple[Receiver[Any], Any]"


class Silent(NamedTuple):
    """A client that is in, and hasn't spoken; until when (monotonic seconds) it is waited for."""

    receiver: Receiver[Any]
    until: float | None


class ServerBase:
    """What both servers are. Safe to be used by several threads; a forked child's copy is closed."""

    _once: ClassVar[bool]

    def __init__(
        self,
        name: str | os.PathLike[str] | None,
        allow: Allow,
        patience: float | None,
        type: Any,  # noqa: A002  (the name that users give it)
    ) -> None:
        self._admission = Admission(allow)
        self._typed = None if type is None else codec_of(type)
        self._patience = patience
        #: Reentrant: a signal's handler may close the server.
        self._lock = threading.RLock()
        #: How many calls wait here now, which ``close`` must not take the descriptors away from.
        self._waiting = 0
        self._closed = False
        #: Clients whose first message was taken; empty, but for moments.
        self._guests: deque[Guest] = deque()
        #: Clients that have come, and weren't looked at.
        self._arrived: deque[socket.socket] = deque()
        #: By descriptor, whoever came first ahead; each is registered with ``_epoll``.
        self._silent: dict[int, Silent] = {}
        #: The one of them that is being heard.
        self._speaking: Silent | None = None
        #: Why no client could be let in, or heard, lately.
        self._drought: OSError | None = None
        #: The silent clients, and the bell that ``close`` rings.
        self._epoll = select.epoll()
        #: What ``fileno`` gives: the listener, and the former. Made when somebody asks.
        self._door: select.epoll | None = None
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._close_bell = weakref.finalize(self, os.close, self._bell)
        try:
            self._epoll.register(self._bell, select.EPOLLIN)
            self._listener = Listener(
                None if name is None else os.fspath(name), others=self._admission.of_others, once=self._once
            )
        except BaseException:
            self._release()
            raise
        self.name: str = self._listener.name
        _servers.add(self)

    # -- accepting -------------------------------------------------------------------------

    def accept(self, timeout: float | None = None, *, process: Mortal | None = None) -> Guest:
        """Wait for a client and its first message: ``(receiver, message)``.

        Raises ``Empty`` when nobody has come and said something within ``timeout`` seconds; who has come stays.
        ``process``, of ``multiprocessing`` or ``subprocess``, is who is expected: when it has ended and nobody
        has spoken, ``Disconnected``. ``EndpointClosed`` where the server is closed; also if that happens
        meanwhile, in another thread or a signal's handler. ``OSError`` where clients wait, but this process
        had no descriptors left for them within ``timeout``; without it they are let in when there are.
        """
        deadline = deadline_in(timeout)
        held: list[Guest] = []
        try:
            with Watch(process) as watch:
                while True:
                    self._await_guest(deadline, watch)
                    try:
                        held = [*starmap(self._guests.popleft, ((),))]
                        break
                    except IndexError:
                        # Another thread was faster.
                        continue
        except BaseException:
            self._guests.extendleft(held)
            raise
        return held[0]

    async def accept_async(self) -> Guest:
        """``accept`` in a coroutine, on asyncio or trio. When it is cancelled, no client is lost."""
        while True:
            try:
                return self.accept(0)
            except Empty:
                await self._until_ready()
            except OSError as error:
                if error is not self._drought:
                    raise
                await pause(_DROUGHT)

    async def _until_ready(self) -> None:
        with self._lock:
            fd = self.fileno()
            self._waiting += 1
        try:
            await readable(fd)
        finally:
            self._leave()

    def _await_guest(self, deadline: float | None, watch: Watch) -> None:
        with self._lock:
            if not self._guests:
                self._check_open()
            self._waiting += 1
        try:
            while True:
                # Both are asked before it looks once more: who spoke before the time was over, or died, counts.
                over = deadline is not None and monotonic() >= deadline
                ended = watch.ended()
                if self._look():
                    return
                if ended:
                    raise Disconnected(f"{watch} has ended, and nobody has connected to {self.name} and spoken")
                if over:
                    raise self._drought or Empty(f"nobody has connected to {self.name} and said something")
                self._sleep(deadline, watch)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._waiting -= 1
            if self._closed and not self._waiting:
                self._release()

    def _sleep(self, deadline: float | None, watch: Watch) -> None:
        """Wait until there is something to look at, but no longer than until ``deadline``."""
        with self._lock:
            self._check_open()
            fds = [*watch.fds]
            until = [deadline]
            if self._drought:
                # Who there is no room for is ready all the time.
                fds.append(self._bell)
                until.append(monotonic() + _DROUGHT)
            else:
                fds.append(self._epoll.fileno())
                until += [silent.until for silent in islice(self._silent.values(), 1)]
                if not self._listener.closed:
                    fds.append(self._listener.sock.fileno())
        wait_for(fds[0], select.POLLIN, min((one for one in until if one is not None), default=None), *fds[1:])

    def _look(self) -> bool:
        """Do what there is to do, without waiting; whether there is a guest then.

        Each step may be interrupted by a handler that raises, and is then taken up where it was.
        """
        for _ in range(_MOST_STEPS):
            with self._lock:
                if self._guests:
                    if self._speaking is not None:
                        self._unwatch(self._speaking)
                        self._speaking = None
                    return True
                self._check_open()
                try:
                    if not self._step():
                        return False
                except (OSError, ValueError, IndexError) as error:
                    if not self._closed or isinstance(error, ProtocolError) or raised_by_handler(error):
                        raise
                    # A handler has closed the server, in the middle of it.
                    self._check_open()
        return False

    def _step(self) -> bool:
        """Do one thing; False where there was nothing to do, or no room for it."""
        if self._arrived:
            self._welcome(self._arrived[0])
            return True
        self._dismiss_impatient()
        called = self._epoll.poll(0, 1) if self._silent and self._speaking is None else []
        for fd, _ in called:
            # None for the bell of a server that closes, which the next step sees to.
            self._speaking = self._silent.get(fd)
        if self._speaking is not None:
            return self._hear(self._speaking)
        return bool(called) or self._let_in()

    def _let_in(self) -> bool:
        """Let in who waits at the door; False where there is nobody, or no room."""
        if self._listener.closed:
            return False
        try:
            unix.accept(self._listener.sock, self._arrived)
        except BlockingIOError:
            self._drought = None
            return False
        except OSError as error:
            if error.errno not in _NO_DESCRIPTORS:
                raise
            self._suffer(error, f"a client of {self.name} waits, but this process has no descriptor for it")
            return False
        self._drought = None
        return True

    def _welcome(self, client: socket.socket) -> None:
        """Look at who has arrived, and wait until they speak; or refuse."""
        fd = client.fileno()
        silent = self._silent.get(fd)
        if silent is None:
            peer = peer_at(client)
            try:
                admitted = self._admission.admits(peer)
            except Exception as error:
                if not raised_by_handler(error):
                    self._arrived.popleft().close()
                raise
            if not admitted:
                log.info("%s: refused a client of uid %d (pid %d)", self.name, peer.uid, peer.pid)
                self._arrived.popleft().close()
                return
            unix.prepare(client, CHANNEL_BUFFER)
            # Known before it can be closed: a receiver that is dropped with a link takes that along.
            until = None if self._patience is None else monotonic() + self._patience
            silent = self._silent[fd] = Silent(Receiver.__new__(Receiver), until)
        # A socket so new has no other link than one of an attempt that was interrupted. Nor can anybody see
        # that the receiver is made twice.
        link = getattr(silent.receiver, "_link", None) or Link(client, os.fstat(fd).st_ino)
        silent.receiver.__init__(link, self._typed)
        self._watch(fd)
        if self._once:
            self._listener.close()
        self._arrived.popleft()

    def _hear(self, silent: Silent) -> bool:
        """Take the first message of a client; False where there is no room for what it brings."""
        receiver = silent.receiver
        if receiver.closed:
            # It was seen off, but for this.
            self._speaking = None
            return True
        try:
            message = receiver.try_recv()
            # Until it is in there, and unless it was none of these, the client is heard again.
            self._guests.append((receiver, message))
        except Empty:
            self._speaking = None
        except NoRoom:
            self._speaking = None
            error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._suffer(error, f"a client of {self.name} brings more descriptors than this process has room for")
            return False
        except (Disconnected, SerializationError, ProtocolError) as error:
            self._disappointed(silent, error)
        return True

    def _disappointed(self, client: Silent, error: Exception) -> None:
        """A client has left without a word, or what it said can't be understood."""
        raise NotImplementedError

    def _suffer(self, error: OSError, why: str) -> None:
        if self._drought is None:
            log.warning("%s; it is let in when there is one (ulimit -n)", why)
        self._drought = OSError(error.errno, f"{error.strerror}: {why}; close some, or raise the limit (ulimit -n)")

    def _watch(self, fd: int) -> None:
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except FileExistsError:
            pass

    def _unwatch(self, silent: Silent) -> None:
        fd = silent.receiver._open_link().fileno()
        # While it is open: a copy in another process would go on firing.
        try:
            self._epoll.unregister(fd)
        except FileNotFoundError:
            pass
        self._silent.pop(fd, None)

    def _dismiss(self, silent: Silent) -> None:
        self._unwatch(silent)
        silent.receiver.close()
        self._speaking = None

    def _dismiss_impatient(self) -> None:
        for fd, silent in list(self._silent.items()) if self._patience is not None else []:
            if silent.until is None or monotonic() < silent.until or wait_for(fd, select.POLLIN, 0):
                return
            self._dismiss(silent)

    # -- the end ---------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise EndpointClosed(f"this {type(self).__name__} is closed")

    @property
    def closed(self) -> bool:
        """Whether no more clients are let in."""
        return self._closed or self._listener.closed

    def fileno(self) -> int:
        """A descriptor to ``poll``: readable whenever ``accept(0)`` has something to do; still it may be ``Empty``."""
        with self._lock:
            self._check_open()
            if self._door is None:
                self._door = select.epoll()
                self._door.register(self._epoll.fileno(), select.EPOLLIN)
                if not self._listener.closed:
                    self._door.register(self._listener.sock.fileno(), select.EPOLLIN)
            return self._door.fileno()

    def close(self) -> None:
        """Remove the name, and drop who has come and was not accepted; may be called twice."""
        with self._lock:
            self._closed = True
            self._listener.close()
            self._drop_clients()
            if not self._waiting:
                self._release()
            elif self._close_bell.alive:
                # Descriptors that are being waited for can't be closed: their numbers may be somebody else's at once.
                os.eventfd_write(self._bell, 1)

    def _drop_clients(self) -> None:
        self._speaking = None
        for receiver in [*(silent.receiver for silent in self._silent.values()), *(one for one, _ in self._guests)]:
            if getattr(receiver, "_link", None) is not None:
                receiver.close()
        for client in self._arrived:
            client.close()
        self._silent.clear()
        self._guests.clear()
        self._arrived.clear()

    def _release(self) -> None:
        if self._door is not None:
            self._door.close()
        self._epoll.close()
        self._close_bell()

    def _forget(self) -> None:
        """In a forked child: the server, its name and its clients are the parent's."""
        self._lock = threading.RLock()
        if not self._closed:
            self._closed = True
            self._listener.forget()
            self._drop_clients()
        self._waiting = 0
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_listener"):
            self.close()

    def __repr__(self) -> str:
        return f"<mp_ipcchan.{type(self).__name__} {self.name}{' closed' if self.closed else ''}>"


_servers: weakref.WeakSet[ServerBase] = weakref.WeakSet()


def _forget_all() -> None:
    for server in list(_servers):
        server._forget()


os.register_at_fork(after_in_child=_forget_all)
