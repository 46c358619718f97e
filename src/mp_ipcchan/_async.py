"""Receiving and sending in coroutines, on asyncio and trio: on the descriptor itself, without a thread.

Guarantees: a coroutine that is cancelled takes no message with it, and has sent its own or not: it waits until
the descriptor is ready, and then takes or sends within one step, in which nothing is awaited. Of several that wait
at one end, the first comes first, and one is woken for a message. Whoever waits for an end that is closed hears of it.

Relies on: each wait is for a duplicate of the descriptor, its own. Loops know one callback a descriptor and
direction, users may have theirs there, and a descriptor that a loop waits for must not be closed under it.

Neither library is imported, nor needed: the one that runs the caller has been imported.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ._link import Link
from ._message import Message, Outgoing
from ._outlet import Outlet
from .errors import Disconnected, Empty, ReceiverGone

if TYPE_CHECKING:
    from typing_extensions import Self

T_co = TypeVar("T_co", covariant=True)

#: After so many steps without a wait a coroutine lets others run.
_MOST_STEPS = 16


class Lock(Protocol):
    """What the locks of both libraries have; whoever waits longest is next."""

    async def acquire(self) -> object: ...
    def release(self) -> None: ...
    def locked(self) -> bool: ...


class Host(Protocol):
    """What runs the calling coroutine."""

    #: Tells one loop, or run, from another.
    key: object

    def make_lock(self) -> Lock: ...
    async def checkpoint(self, waits: Waits) -> None:
        """Let others run now and then; here, before anything is done, the caller may be cancelled."""

    async def ready(self, fd: int, writing: bool, waits: Waits) -> None:
        """Wait until ``fd``, which is private to the caller, is readable or writable, or until ``waits`` is woken."""

    async def called(self, came: Callable[[], bool], waits: Waits) -> None:
        """Wait until ``waits`` is woken, unless ``came`` says that it isn't to be waited for."""

    async def sleep(self, seconds: float) -> None: ...


#: Held while a link gets its ``Waits``: loops of several threads may want one.
_lock = threading.Lock()


class Waits:
    """The coroutines that wait at one link, of whatever loops."""

    __slots__ = ("_turn", "steps", "wakers")

    def __init__(self) -> None:
        #: Each wakes one of them, from any thread.
        self.wakers: list[Callable[[], None]] = []
        #: How often in a row nothing was awaited.
        self.steps = 0
        #: The lock of those in one loop, mostly the only one. In several, they merely wait side by side.
        self._turn: tuple[object, Lock] | None = None

    @classmethod
    def at(cls, link: Link) -> Waits:
        if link.waits is None:
            with _lock:
                link.waits = link.waits or cls()
        assert isinstance(link.waits, cls)
        return link.waits

    def turn(self, host: Host) -> Lock:
        if self._turn is None or self._turn[0] is not host.key:
            self._turn = host.key, host.make_lock()
        return self._turn[1]

    def close(self) -> None:
        """The link closes, or says that something has come: wake everybody."""
        for wake in list(self.wakers):
            wake()


# -- the two libraries -----------------------------------------------------------------------


class _Asyncio:
    __slots__ = ("_asyncio", "key")

    def __init__(self, asyncio: Any, loop: Any) -> None:
        self._asyncio = asyncio
        self.key: Any = loop

    def make_lock(self) -> Lock:
        lock: Lock = self._asyncio.Lock()
        return lock

    async def checkpoint(self, waits: Waits) -> None:
        if waits.steps >= _MOST_STEPS:
            waits.steps = 0
            await self._asyncio.sleep(0)

    async def ready(self, fd: int, writing: bool, waits: Waits) -> None:
        loop = self.key
        with self._woken(waits) as (woken, wake):
            try:
                (loop.add_writer if writing else loop.add_reader)(fd, wake)
                await woken
            finally:
                (loop.remove_writer if writing else loop.remove_reader)(fd)

    async def called(self, came: Callable[[], bool], waits: Waits) -> None:
        with self._woken(waits) as (woken, _):
            if not came():
                await woken

    @contextmanager
    def _woken(self, waits: Waits) -> Iterator[tuple[Any, Callable[[], None]]]:
        """A future that is done when ``waits`` is woken, and what does that at once."""
        loop = self.key
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        def wake_from_outside() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake)

        waits.wakers.append(wake_from_outside)
        try:
            yield woken, wake
        finally:
            waits.wakers.remove(wake_from_outside)

    async def sleep(self, seconds: float) -> None:
        await self._asyncio.sleep(seconds)


class _Trio:
    __slots__ = ("_trio", "key")

    def __init__(self, trio: Any) -> None:
        self._trio = trio
        self.key: Any = trio.lowlevel.current_trio_token()

    def make_lock(self) -> Lock:
        lock: Lock = self._trio.Lock()
        return lock

    async def checkpoint(self, waits: Waits) -> None:  # noqa: ARG002  (trio's rule is: each time)
        await self._trio.lowlevel.checkpoint()

    async def ready(self, fd: int, writing: bool, waits: Waits) -> None:
        with self._woken(waits):
            await (self._trio.lowlevel.wait_writable if writing else self._trio.lowlevel.wait_readable)(fd)

    async def called(self, came: Callable[[], bool], waits: Waits) -> None:
        with self._woken(waits):
            if not came():
                await self._trio.sleep_forever()

    @contextmanager
    def _woken(self, waits: Waits) -> Iterator[None]:
        """For a block that ends when ``waits`` is woken."""
        trio, token = self._trio, self.key
        with trio.CancelScope() as scope:

            def wake_from_outside() -> None:
                try:
                    token.run_sync_soon(scope.cancel)
                except trio.RunFinishedError:
                    pass

            waits.wakers.append(wake_from_outside)
            try:
                yield
            finally:
                waits.wakers.remove(wake_from_outside)

    async def sleep(self, seconds: float) -> None:
        await self._trio.sleep(seconds)


def _host() -> Host:
    """Whatever runs the caller. ``RuntimeError`` where that is neither library."""
    trio: Any = sys.modules.get("trio")
    if trio is not None:
        # First: its guest mode runs within an asyncio loop.
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            pass
        else:
            return _Trio(trio)
    asyncio: Any = sys.modules.get("asyncio")
    loop = asyncio._get_running_loop() if asyncio is not None else None
    if loop is None:
        raise RuntimeError("what can be awaited here needs a task of asyncio or trio to run in")
    return _Asyncio(asyncio, loop)


async def _ready(host: Host, fd: int, writing: bool, waits: Waits) -> None:
    waits.steps = 0
    private = os.dup(fd)
    try:
        await host.ready(private, writing, waits)
    finally:
        os.close(private)


async def readable(fd: int) -> None:
    """Wait until ``fd`` is readable. Several may wait for the same, and it may be closed meanwhile."""
    await _ready(_host(), fd, False, Waits())


async def pause(seconds: float) -> None:
    """Let others run for ``seconds``."""
    await _host().sleep(seconds)


# -- receiving -------------------------------------------------------------------------------


class Source(Protocol[T_co]):
    """A receiver, as seen from here."""

    def _open_link(self) -> Link: ...
    def try_recv(self) -> T_co: ...
    def fileno(self) -> int: ...


async def receive(source: Source[T_co]) -> T_co:
    """The next message, once it is there. Raises what ``try_recv`` does, but for ``Empty``."""
    host = _host()
    waits = Waits.at(source._open_link())
    await host.checkpoint(waits)
    turn = waits.turn(host)
    if not turn.locked():
        waits.steps += 1
        try:
            return source.try_recv()
        except Empty:
            pass
    await turn.acquire()
    try:
        while True:
            try:
                return source.try_recv()
            except Empty:
                await _arrival(host, source, waits)
    finally:
        turn.release()


async def _arrival(host: Host, source: Source[Any], waits: Waits) -> None:
    inlet = source._open_link().inlet
    if not inlet.announces:
        await _ready(host, source.fileno(), False, waits)
        return
    inlet.announce(waits.close)
    waits.steps = 0
    await host.called(lambda: inlet.holding, waits)


class Messages(Generic[T_co]):
    """What ``async for`` goes through: the messages until every sender is gone."""

    __slots__ = ("_source",)

    def __init__(self, source: Source[T_co]) -> None:
        self._source = source

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T_co:
        try:
            return await receive(self._source)
        except Disconnected:
            raise StopAsyncIteration from None


# -- sending ---------------------------------------------------------------------------------


async def send(link: Callable[[], Link], encode: Callable[[], Outgoing]) -> None:
    """Send a message once the kernel takes it. ``link`` raises where the sender is closed meanwhile."""
    host = _host()
    waits = Waits.at(link())
    await host.checkpoint(waits)
    outlet = link().outlet
    item = encode()
    try:
        turn = waits.turn(host)
        waits.steps += 1
        if not turn.locked() and outlet.drain() and outlet.try_send(item):
            return
        await turn.acquire()
        try:
            await _send_in_turn(host, link, item, waits)
        finally:
            turn.release()
    except BaseException as error:
        if isinstance(item, Message):
            item.unsent()
        if isinstance(error, (BrokenPipeError, ConnectionResetError)):
            raise ReceiverGone(error.errno, "the receiver is gone") from error
        raise


def _has_room(outlet: Outlet, waits: Waits) -> bool:
    """Asked once the waker is in its place: what is announced before could find nobody to wake."""
    outlet.announce(waits.close)
    return outlet.has_room()


async def _send_in_turn(host: Host, link: Callable[[], Link], item: Outgoing, waits: Waits) -> None:
    while True:
        outlet: Outlet = link().outlet
        if outlet.drain() and outlet.try_send(item):
            return
        pause = outlet.pause()
        if pause is not None:
            await host.sleep(pause)
        elif outlet.announces:
            waits.steps = 0
            await host.called(partial(_has_room, outlet, waits), waits)
        else:
            await _ready(host, outlet.fileno(), True, waits)


def _reset_after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)
