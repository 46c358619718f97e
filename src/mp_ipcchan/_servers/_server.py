"""Servers: a name at which processes that don't know each other meet. Server takes many clients, OneShotServer one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any, final, overload

from ..errors import Disconnected, EndpointClosed, SerializationError
from ._host import ServerBase, T
from ._lobby import Client, Guest, log
from ._peer import Allow, peer_at
from ._watch import Mortal


@final
class Server(ServerBase[T]):
    """Accepts any number of clients, processes of this user that call ``connect(server.name)``::

        with Server("/run/me/store") as server:
            for receiver, first in server:
                ...

    ``name``: a path, or "@" and a word (an abstract address, free again when this process ends, however). The path's
    directory must be one that only this user or root may write to. What a dead server has left there is
    taken over; ``OSError`` (``EADDRINUSE``) where a live one has it, ``PermissionError`` where others could take it.
    Without a name: a path in a new private directory.

    ``allow``: who may connect beside this user: a collection of uids, or a function that is called with ``pid, uid,
    gid`` of each client and decides. Without ``type``, a message is a pickle, so who may connect can make this process
    do anything.

    ``type``: what messages are held against, as in a typed ``channel``; clients give the same to ``connect``. One whose
    message doesn't fit is dropped, and the log tells.

    ``patience``: how long (seconds) a client that has connected may say nothing before it is dropped; it keeps
    a descriptor of this process. ``None``: until it leaves.

    Closing it, or leaving its ``with`` block, removes the name. Receivers that were accepted go on.
    """

    _once = False

    @overload
    def __init__(
        self: Server[Any],
        name: str | os.PathLike[str] | None = None,
        *,
        allow: Allow = None,
        patience: float | None = None,
        type: None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: Server[T],
        name: str | os.PathLike[str] | None = None,
        *,
        allow: Allow = None,
        patience: float | None = None,
        type: type[T],
    ) -> None: ...
    @overload
    def __init__(
        self: Server[Any],
        name: str | os.PathLike[str] | None = None,
        *,
        allow: Allow = None,
        patience: float | None = None,
        type: Any,
    ) -> None: ...
    def __init__(
        self,
        name: str | os.PathLike[str] | None = None,
        *,
        allow: Allow = None,
        patience: float | None = None,
        type: Any = None,  # noqa: A002  (as of ``channel``)
    ) -> None:
        super().__init__(name, allow, patience, type)

    def __iter__(self) -> Iterator[Guest[T]]:
        """Accept clients until the server is closed."""
        while True:
            try:
                guest = self.accept()
            except EndpointClosed:
                return
            yield guest

    async def __aiter__(self) -> AsyncIterator[Guest[T]]:
        """Accept clients until the server is closed."""
        while True:
            try:
                guest = await self.accept_async()
            except EndpointClosed:
                return
            yield guest

    def _disappointed(self, client: Client, error: Exception) -> None:
        if not isinstance(error, Disconnected):
            peer = peer_at(client.receiver._open_link().sock)
            log.warning("%s: dropped a client of uid %d (pid %d): %s", self.name, peer.uid, peer.pid, error)
        self._lobby.dismiss(client)


@final
class OneShotServer(ServerBase[T]):
    """Accepts one client, a process of this user that calls ``connect(server.name)``.

    A second one is refused: while the first waits to be accepted, too. Then the name is gone. Closing the server, or
    leaving its ``with`` block, removes the name. ``allow`` and ``type`` as for ``Server``.
    """

    _once = True

    @overload
    def __init__(self: OneShotServer[Any], *, allow: Allow = None, type: None = None) -> None: ...
    @overload
    def __init__(self: OneShotServer[T], *, allow: Allow = None, type: type[T]) -> None: ...
    @overload
    def __init__(self: OneShotServer[Any], *, allow: Allow = None, type: Any) -> None: ...
    def __init__(self, *, allow: Allow = None, type: Any = None) -> None:  # noqa: A002
        super().__init__(None, allow, None, type)

    def accept(self, timeout: float | None = None, *, process: Mortal | None = None) -> Guest[T]:
        """As ``Server.accept``; the server is closed then. ``Disconnected`` where the client leaves without a word,
        ``SerializationError`` where its message can't be decoded; its next one is waited for then.
        """
        guest = super().accept(timeout, process=process)
        try:
            self.close()
        except BaseException:
            self._lobby.guests.append(guest)
            raise
        return guest

    def _disappointed(self, client: Client, error: Exception) -> None:
        # It is heard again at once: what it said next may have come along.
        if not isinstance(error, SerializationError):
            self._lobby.dismiss(client)
            self.close()
        raise error
