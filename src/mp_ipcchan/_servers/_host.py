"""What both servers are: clients come to a name, and are given out when they have spoken.

Guarantees: a client that is dead, silent or talks nonsense holds nobody up. Whatever a signal's handler raises,
a first message that was taken is given out by the next ``accept`` (but on CPython 3.10, as ``_delivery`` says).
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from itertools import starmap
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from .._async import pause, readable
from .._deadline import deadline_in, wait_for
from .._interrupt import raised_by_handler
from .._typed_codec import codec_for
from ..errors import Disconnected, Empty, EndpointClosed, ProtocolError
from ._listener import Listener
from ._lobby import Client, Guest, Lobby
from ._peer import Admission, Allow
from ._watch import Mortal, Watch

if TYPE_CHECKING:
    from typing_extensions import Self, TypeVar

    # A server without a type is one of pickles: of anything.
    T = TypeVar("T", default=Any)
else:
    from typing import TypeVar

    T = TypeVar("T")

#: How many clients one look lets in, hears or sees off, at most: a flood must not outlast a timeout.
_MOST_STEPS = 10_000
#: How long (seconds) to leave new clients alone while there are no descriptors for them.
_DROUGHT = 0.05


class ServerBase(Generic[T]):
    """What both servers are. Safe to be used by several threads; a forked child's copy is closed."""

    _once: ClassVar[bool]

    def __init__(
        self,
        name: str | os.PathLike[str] | None,
        allow: Allow,
        patience: float | None,
        type: Any,  # noqa: A002  (the name that users give it)
    ) -> None:
        if patience is not None and not patience >= 0:
            raise ValueError(f"patience is a number of seconds, not {patience!r}")
        admission = Admission(allow)
        typed = codec_for(type)
        #: Reentrant: a signal's handler may close the server.
        self._lock = threading.RLock()
        #: How many calls wait here now, which ``close`` must not take the descriptors away from.
        self._waiting = 0
        self._closed = False
        self._lobby = Lobby(admission, typed, patience)
        #: What ``fileno`` gives: the listener, and the lobby's. Made when somebody asks.
        self._door: select.epoll | None = None
        #: Rung by ``close``, and heard by whoever waits.
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._close_bell = weakref.finalize(self, os.close, self._bell)
        try:
            self._lobby.epoll.register(self._bell, select.EPOLLIN)
            self._listener = Listener(
                None if name is None else os.fspath(name), others=admission.of_others, once=self._once
            )
        except BaseException:
            self._release()
            raise
        self.name: str = self._listener.name
        _servers.add(self)

    # -- accepting -------------------------------------------------------------------------

    def accept(self, timeout: float | None = None, *, process: Mortal | None = None) -> Guest[T]:
        """Wait for a client and its first message: ``(receiver, message)``.

        Raises ``Empty`` when nobody has come and said something within ``timeout`` seconds; who has come stays.
        ``process``, of ``multiprocessing`` or ``subprocess``, is who is expected: when it has ended and nobody
        has spoken, ``Disconnected``. ``EndpointClosed`` where the server is closed; also if that happens
        meanwhile, in another thread or a signal's handler. ``OSError`` where clients wait, but this process
        had no descriptors left for them within ``timeout``; without it they are let in when there are.
        """
        deadline = deadline_in(timeout)
        held: list[Guest[T]] = []
        try:
            with Watch(process) as watch:
                while True:
                    self._await_guest(deadline, watch)
                    try:
                        held = [*starmap(self._lobby.guests.popleft, ((),))]
                        break
                    except IndexError:
                        # Another thread was faster.
                        continue
        except BaseException:
            self._lobby.guests.extendleft(held)
            raise
        return held[0]

    async def accept_async(self) -> Guest[T]:
        """``accept`` in a coroutine, on asyncio or trio. When it is cancelled, no client is lost."""
        while True:
            try:
                return self.accept(0)
            except Empty:
                await self._until_ready()
            except OSError as error:
                if error is not self._lobby.drought:
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
            if not self._lobby.guests:
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
                    raise self._lobby.drought or Empty(f"nobody has connected to {self.name} and said something")
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
            if self._lobby.drought:
                # Who there is no room for is ready all the time.
                fds.append(self._bell)
                until.append(monotonic() + _DROUGHT)
            else:
                fds.append(self._lobby.epoll.fileno())
                until.append(self._lobby.until())
                if not self._listener.closed:
                    fds.append(self._listener.sock.fileno())
        wait_for(fds[0], select.POLLIN, min((one for one in until if one is not None), default=None), *fds[1:])

    def _look(self) -> bool:
        """Do what there is to do, without waiting; whether there is a guest then."""
        for _ in range(_MOST_STEPS):
            with self._lock:
                if self._lobby.has_guest():
                    return True
                self._check_open()
                try:
                    if not self._lobby.step(self._listener, self._disappointed):
                        return False
                except (OSError, ValueError, IndexError) as error:
                    if not self._closed or isinstance(error, ProtocolError) or raised_by_handler(error):
                        raise
                    # A handler has closed the server, in the middle of it.
                    self._check_open()
        return False

    def _disappointed(self, client: Client, error: Exception) -> None:
        """A client has left without a word, or what it said can't be understood."""
        raise NotImplementedError

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
                self._door.register(self._lobby.epoll.fileno(), select.EPOLLIN)
                if not self._listener.closed:
                    self._door.register(self._listener.sock.fileno(), select.EPOLLIN)
            return self._door.fileno()

    def close(self) -> None:
        """Remove the name, and drop who has come and was not accepted; may be called twice."""
        with self._lock:
            self._closed = True
            self._listener.close()
            self._lobby.drop_all()
            if not self._waiting:
                self._release()
            elif self._close_bell.alive:
                # Descriptors that are being waited for can't be closed: their numbers may be somebody else's at once.
                os.eventfd_write(self._bell, 1)

    def _release(self) -> None:
        if self._door is not None:
            self._door.close()
        self._lobby.epoll.close()
        self._close_bell()

    def _forget(self) -> None:
        """In a forked child: the server, its name and its clients are the parent's."""
        self._lock = threading.RLock()
        if not self._closed:
            self._closed = True
            self._listener.forget()
            self._lobby.drop_all()
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


_servers: weakref.WeakSet[ServerBase[Any]] = weakref.WeakSet()


def _forget_all() -> None:
    for server in list(_servers):
        server._forget()


os.register_at_fork(after_in_child=_forget_all)
