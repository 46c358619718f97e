"""Router: a thread that receives for many receivers and calls what was registered for each.

Guarantees: callbacks run in this one thread, in the order of each receiver's messages. What one of them raises
concerns its route alone, and that goes on. They may add and close routes, and shut the router down. A callback
is let go of once nothing can call it any more; what it holds is freed then.
"""

from __future__ import annotations

import logging
import os
import queue as stdlib
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, final

from .._inlet import NoRoom
from .._interrupt import handlers_put_off
from .._opaque import OpaqueReceiver
from .._receiver import ReceiverBase
from ..errors import Disconnected, EndpointClosed
from ._events import ChannelClosed, MessageReceived
from ._receiver_set import Event, ReceiverSet
from ._undecoded import UndecodedMessage

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_log = logging.getLogger("mp_ipcchan")

#: How long (seconds) nothing is done where no descriptor is left for a message.
_PAUSE = 0.05


class Putable(Protocol):
    """A queue, as far as ``route_to_queue`` is concerned."""

    def put(self, item: Any, /) -> object: ...


@final
class Route:
    """What ``add_route`` gives: a receiver's way to its callback, until ``close``, or its last sender is gone."""

    __slots__ = ("__weakref__", "_callback", "_id", "_on_close", "_on_error", "_once", "_routes")

    def __init__(
        self,
        routes: _Routes,
        callback: Callable[[Any], object],
        on_error: Callable[[Exception], object] | None,
        on_close: Callable[[], object] | None,
        once: bool,
    ) -> None:
        if not callable(callback):
            raise TypeError(f"a route needs a function to call with each message, not {callback!r}")
        self._routes = routes
        self._id = -1
        #: None once it must not be called any more.
        self._callback: Callable[[Any], object] | None = callback
        self._on_error = on_error
        self._on_close = on_close
        self._once = once

    @property
    def closed(self) -> bool:
        return self._routes.get(self._id) is not self

    def close(self) -> None:
        """Close the receiver. A callback that runs, runs on; none begins any more. Closing twice does nothing."""
        self._routes.drop(self)

    def _release(self) -> None:
        self._callback = self._on_error = self._on_close = None

    # In the router's thread. No reference to a callback is left behind where these return.

    def _deliver(self, message: UndecodedMessage) -> None:
        callback = self._callback
        if callback is None:
            message.close()
            return
        try:
            obj = message.to()
            if self._once:
                self._callback = None
            callback(obj)
        except BaseException as error:
            self._fail(error)
            if isinstance(error, NoRoom):
                # It would come again at once.
                time.sleep(_PAUSE)

    def _end(self) -> None:
        on_close = self._on_close
        try:
            if on_close is not None:
                on_close()
        except BaseException as error:
            self._fail(error)
        self._release()

    def _fail(self, error: BaseException) -> None:
        """Something of the user's raised: it must not end the thread, whatever it is."""
        on_error = self._on_error
        if on_error is not None and isinstance(error, Exception):
            try:
                on_error(error)
                return
            except BaseException as another:
                error = another
        _log.error("a router's callback failed, or a message for it could not be decoded", exc_info=error)

    def __repr__(self) -> str:
        return f"<mp_ipcchan.Route {self._id}{' closed' if self.closed else ''}>"


class _Routes:
    """What the router's thread has in common with those who add and close routes."""

    def __init__(self) -> None:
        self.receivers: ReceiverSet = ReceiverSet()
        #: Held while routes come and go, so that the thread finds the route of whatever it receives.
        self._lock = threading.RLock()
        self._routes: dict[int, Route] = {}
        self.shut: bool = False
        _all_routes.add(self)

    def get(self, id: int) -> Route | None:  # noqa: A002
        # It may have been received for before it was entered.
        with self._lock:
            return self._routes.get(id)

    def __len__(self) -> int:
        return len(self._routes)

    def add(self, receiver: ReceiverBase[Any] | OpaqueReceiver, route: Route) -> None:
        with self._lock:
            if self.shut:
                raise RuntimeError("this router was shut down")
            route._id = self.receivers.add(receiver)
            self._routes[route._id] = route

    def drop(self, route: Route) -> None:
        with self._lock:
            if self._routes.get(route._id) is route:
                del self._routes[route._id]
                self.receivers.remove(route._id).close()
        route._release()

    def ended(self, id: int) -> Route | None:  # noqa: A002
        """The route of a member that has left the set; it is none any more."""
        with self._lock:
            return self._routes.pop(id, None)

    def shut_down(self) -> None:
        with self._lock:
            self.shut = True
            routes = list(self._routes.values())
            self._routes.clear()
            # Whoever waits in ``select`` gets an exception.
            self.receivers.close()
        for route in routes:
            route._release()

    def reset_after_fork(self) -> None:
        """The thread is the parent's; a copy of its routes that nobody serves would keep their channels open."""
        self._lock = threading.RLock()
        self.shut_down()


@final
class Router:
    """Calls a function for each message of many receivers, in one daemon thread of its own.

    A slow callback delays all others. ``with Router() as router`` shuts it down at the end; so does letting go of it.
    In a forked child it is shut down.
    """

    def __init__(self) -> None:
        self._routes = _Routes()
        self._owner = os.getpid()
        self._thread = threading.Thread(target=_run, args=(self._routes,), name="ipcchan-router", daemon=True)
        # Also when the interpreter ends; it doesn't wait for a callback that runs.
        weakref.finalize(self, self._routes.shut_down)
        with handlers_put_off():
            self._thread.start()

    def add_route(
        self,
        rx: ReceiverBase[T] | OpaqueReceiver,
        callback: Callable[[T], object],
        *,
        on_error: Callable[[Exception], object] | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> Route:
        """From now on, call ``callback(obj)`` for each message of ``rx``, which moves into the router.

        What the callback, or decoding a message, raises goes to ``on_error(exc)``, or is logged, and the route goes on.
        ``on_close()`` is called behind the last message when every sender is gone; not by ``Route.close`` or
        ``shutdown``. Raises what ``ReceiverSet.add`` raises, and ``RuntimeError`` after ``shutdown``; ``rx`` is still
        the caller's then.
        """
        return self._add(rx, Route(self._routes, callback, on_error, on_close, once=False))

    def add_one_shot_route(self, rx: ReceiverBase[T] | OpaqueReceiver, callback: Callable[[T], object]) -> Route:
        """Call ``callback(obj)`` for the first message of ``rx``, and let go of it.

        Later messages are received and dropped, so that their senders don't fail, until ``Route.close``.
        """
        return self._add(rx, Route(self._routes, callback, None, None, once=True))

    def route_to_queue(self, rx: ReceiverBase[Any] | OpaqueReceiver, queue: Putable | None = None) -> Any:
        """Put each message of ``rx`` into ``queue``, or a new ``queue.SimpleQueue``; the queue.

        A message that can't be decoded is put as its exception (``SerializationError``), and the end as
        ``Disconnected``. Where ``queue`` is bounded and full, everything waits for it.
        """
        target = stdlib.SimpleQueue() if queue is None else queue
        put = target.put
        self._add(rx, Route(self._routes, put, partial(_put_error, put), partial(_put_end, put), once=False))
        return target

    def _add(self, rx: ReceiverBase[Any] | OpaqueReceiver, route: Route) -> Route:
        if not isinstance(rx, (ReceiverBase, OpaqueReceiver)):
            raise TypeError(f"a router takes receivers, not {type(rx)!r}")
        self._routes.add(rx, route)
        return route

    def shutdown(self, timeout: float | None = None) -> bool:
        """Drop all routes, at once, and wait for the thread's end, at most ``timeout`` seconds; whether it has come.

        A callback that runs is what it waits for; called by one, it doesn't wait. May be called again.
        """
        self._routes.shut_down()
        if self._owner != os.getpid():
            return True
        if threading.current_thread() is self._thread:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def closed(self) -> bool:
        """Whether it was shut down."""
        return self._routes.shut

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"<mp_ipcchan.Router {'shut down' if self.closed else f'with {len(self._routes)} routes'}>"


def _run(routes: _Routes) -> None:
    try:
        while True:
            if not _take_turn(routes):
                return
    finally:
        # Whatever ends the thread, senders must not be left with receivers that nobody serves.
        routes.shut_down()


def _take_turn(routes: _Routes) -> bool:
    """Wait for events and handle them; False once the router is shut down."""
    try:
        events = routes.receivers._await(None, alone=True)
    except EndpointClosed:
        return False
    events.reverse()
    while events:
        _handle(routes, events.pop())
    return True


def _handle(routes: _Routes, event: Event) -> None:
    if isinstance(event, MessageReceived):
        route = routes.get(event.id)
        if route is None:
            event.message.close()
        else:
            route._deliver(event.message)
    elif isinstance(event, ChannelClosed):
        route = routes.ended(event.id)
        if route is not None:
            route._end()


def _put_error(put: Callable[[Any], object], error: Exception) -> None:
    put(error)


def _put_end(put: Callable[[Any], object]) -> None:
    put(Disconnected("every sender is gone, and all messages have been received"))


_lock = threading.Lock()
_process_wide: Router | None = None


def router() -> Router:
    """The router of this process, made when first asked for; a forked child has its own. Shut down, it stays so."""
    global _process_wide
    with _lock:
        if _process_wide is None:
            _process_wide = Router()
        return _process_wide


_all_routes: weakref.WeakSet[_Routes] = weakref.WeakSet()


def _reset_after_fork() -> None:
    global _lock, _process_wide
    _lock = threading.Lock()
    _process_wide = None
    for routes in list(_all_routes):
        routes.reset_after_fork()


os.register_at_fork(after_in_child=_reset_after_fork)
