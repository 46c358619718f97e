"""Conformance 2.1 and 3: channels in coroutines. Each test is named after its row.

Every test runs on asyncio, on trio and on uvloop, where these are installed; what they do differently is in ``Loop``.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from typing import Any

import pytest

from mp_ipcchan import (
    Disconnected,
    Empty,
    EndpointClosed,
    EndpointMoved,
    Full,
    Receiver,
    ReceiverGone,
    Sender,
    SerializationError,
    bytes_channel,
    channel,
)

from ._support import (
    LIMIT,
    PERSON,
    SEVEN,
    F,
    InThread,
    MakePair,
    both_kinds,
    fork,
    open_descriptors,
    pattern,
)


class Task:
    """A coroutine that runs beside the test: what it returned or raised, once it has ended."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self.cancelled = False
        self.cancel: Callable[[], object] = lambda: None

    async def run(self, call: Callable[..., Awaitable[Any]], *args: object) -> None:
        try:
            self.result = await call(*args)
        except Exception as error:
            self.error = error.with_traceback(None)
        except BaseException:
            self.cancelled = True
            raise
        finally:
            self.ended = True


#: Starts a call, with its arguments.
Start = Callable[..., Task]


class Loop:
    """What the libraries do differently."""

    def run(self, function: Callable[[Loop], Coroutine[Any, Any, None]]) -> None:
        raise NotImplementedError

    def tasks(self) -> AbstractAsyncContextManager[Start]:
        """For a block, at whose end all tasks that it started have ended."""
        raise NotImplementedError

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError

    async def settle(self, until: Callable[[], bool] | None = None) -> None:
        """Let the others go as far as they can, or until that is true."""
        for number in range(5000):
            if number >= 20 and (until is None or until()):
                return
            await self.sleep(0 if until is None or number < 100 else 0.001)
        pytest.fail("nothing came of it")


class Asyncio(Loop):
    def run(self, function: Callable[[Loop], Coroutine[Any, Any, None]]) -> None:
        asyncio.run(asyncio.wait_for(function(self), LIMIT))

    @asynccontextmanager
    async def tasks(self) -> AsyncIterator[Start]:
        started = []

        def start(call: Callable[..., Awaitable[Any]], *args: object) -> Task:
            task = Task()
            running = asyncio.ensure_future(task.run(call, *args))
            task.cancel = running.cancel
            started.append(running)
            return task

        yield start
        await asyncio.gather(*started, return_exceptions=True)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Uvloop(Asyncio):
    def run(self, function: Callable[[Loop], Coroutine[Any, Any, None]]) -> None:
        import uvloop

        loop = uvloop.new_event_loop()
        try:
            loop.run_until_complete(asyncio.wait_for(function(self), LIMIT))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()


class Trio(Loop):
    def run(self, function: Callable[[Loop], Coroutine[Any, Any, None]]) -> None:
        import trio

        async def limited() -> None:
            with trio.fail_after(LIMIT):
                await function(self)

        trio.run(limited)

    @asynccontextmanager
    async def tasks(self) -> AsyncIterator[Start]:
        import trio

        async with trio.open_nursery() as nursery:

            def start(call: Callable[..., Awaitable[Any]], *args: object) -> Task:
                task = Task()
                scope = trio.CancelScope()
                task.cancel = scope.cancel

                async def run() -> None:
                    with scope:
                        await task.run(call, *args)

                nursery.start_soon(run)
                return task

            yield start

    async def sleep(self, seconds: float) -> None:
        import trio

        await trio.sleep(seconds)


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    """What a library keeps for the process from its first loop on belongs to the world as found."""

    async def nothing(_: Loop) -> None: ...

    for name, made in LOOPS.items():
        if find_spec(name):
            made().run(nothing)


LOOPS: dict[str, type[Loop]] = {"asyncio": Asyncio, "trio": Trio, "uvloop": Uvloop}


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> Loop:
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return LOOPS[request.param]()


class Counted:
    """Awaits a coroutine and counts how often it is suspended."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine
        self.suspended = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._coroutine.__await__()
        sent: Any = None
        while True:
            try:
                step = steps.send(sent)
            except StopIteration as end:
                return end.value
            self.suspended += 1
            sent = yield step


# -- the rows -----------------------------------------------------------------------------------


def test_H25_receiver_stream() -> None:
    """Who awaits a message is not woken before it is there, and then once."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        with tx, rx:
            waiting = Counted(rx.recv_async())
            async with loop.tasks() as start:
                task = start(lambda: waiting)
                await loop.settle(lambda: waiting.suspended == 1)
                assert not task.ended
                tx.send(5)
                await loop.settle(lambda: task.ended)
                assert task.result == 5
                assert waiting.suspended == 1

    Asyncio().run(main)


@both_kinds
def test_S34_stream_ends_with_the_senders(loop: Loop, make_pair: MakePair) -> None:
    """``async for`` gives all messages in order, ends when the last sender is gone, and stays ended."""
    payloads = [b"%d" % number for number in range(500)]

    async def main(loop: Loop) -> None:
        tx, rx = make_pair()
        other = tx.clone()
        with rx:
            found: list[Any] = []

            async def receive() -> None:
                async for message in rx:
                    found.append(message)  # noqa: PERF401  (looked at from outside)

            async with loop.tasks() as start:
                task = start(receive)
                for payload in payloads[:250]:
                    tx.send(payload)
                tx.close()
                await loop.settle(lambda: len(found) == 250)
                assert not task.ended
                other.send_many(payloads[250:])
                other.close()
                await loop.settle(lambda: task.ended)
                assert task.error is None
            assert found == payloads
            assert [message async for message in rx] == []
            with pytest.raises(Disconnected):
                await rx.recv_async()

    loop.run(main)


class Undecodable:
    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise RuntimeError("not today")


def test_S34_a_message_that_is_no_good_is_not_the_end(loop: Loop) -> None:
    async def main(loop: Loop) -> None:
        tx, rx = channel()
        with tx, rx:
            tx.send(Undecodable())
            tx.send("next")
            with pytest.raises(SerializationError):
                await rx.recv_async()
            assert await rx.recv_async() == "next"

    loop.run(main)


def test_S34_messages_in_user_space(loop: Loop) -> None:
    """What waits in this process, packed or in a receiver that moved, is received at once, by whoever waits."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        carrier_tx, carrier_rx = channel()
        with tx, carrier_tx, carrier_rx:
            tx.send_many(range(100))
            assert rx.recv(LIMIT) == 0
            carrier_tx.send(rx)
            with await carrier_rx.recv_async() as moved:
                assert [await moved.recv_async() for _ in range(99)] == list(range(1, 100))
                async with loop.tasks() as start:
                    tasks = [start(moved.recv_async) for _ in range(100)]
                    await loop.settle()
                    tx.send_many(range(100))
                    await loop.settle(lambda: all(task.ended for task in tasks))
                assert sorted(task.result for task in tasks) == list(range(100))

    loop.run(main)


# -- many tasks -----------------------------------------------------------------------------------


def test_S34_first_come_first_served(loop: Loop) -> None:
    """Of many tasks that wait for one receiver, each gets one message, the first the first."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        with tx, rx:
            tasks = []
            async with loop.tasks() as start:
                for _ in range(50):
                    tasks.append(start(rx.recv_async))
                    await loop.sleep(0)
                await loop.settle()
                for number in range(50):
                    tx.send(number)
                    if number % 7 == 0:
                        await loop.settle(lambda number=number: tasks[number].ended)
                await loop.settle(lambda: all(task.ended for task in tasks))
            assert [task.result for task in tasks] == list(range(50))

    loop.run(main)


def test_S34_all_waiting_tasks_hear_of_the_end(loop: Loop) -> None:
    async def main(loop: Loop) -> None:
        tx, rx = channel()
        with rx:
            async with loop.tasks() as start:
                tasks = [start(rx.recv_async) for _ in range(10)]
                await loop.settle()
                tx.close()
                await loop.settle(lambda: all(task.ended for task in tasks))
            assert all(isinstance(task.error, Disconnected) for task in tasks)

    loop.run(main)


@pytest.mark.parametrize("how", ["close", "move"])
def test_S34_waiting_for_an_end_that_goes(loop: Loop, how: str) -> None:
    """Tasks that wait for a receiver which is closed, or sent away, are told; so is one that waits for room."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        full_tx, full_rx = channel()
        carrier_tx, carrier_rx = channel()
        with tx, full_rx, carrier_tx, carrier_rx:
            fill(full_tx)
            async with loop.tasks() as start:
                tasks = [start(rx.recv_async) for _ in range(3)]
                sending = start(full_tx.send_async, "never")
                await loop.settle()
                if how == "close":
                    rx.close()
                else:
                    carrier_tx.send(rx)
                    carrier_rx.recv(LIMIT).close()
                full_tx.close()
                await loop.settle(lambda: sending.ended and all(task.ended for task in tasks))
            for task in tasks:
                assert isinstance(task.error, EndpointClosed if how == "close" else EndpointMoved)
            assert isinstance(sending.error, EndpointClosed)
            assert "never" not in list(full_rx)

    loop.run(main)


# -- cancellation ---------------------------------------------------------------------------------


def fill(tx: Any) -> int:
    """Send until the kernel takes no more; how many it took."""
    count = 0
    while True:
        try:
            tx.try_send(b"%d" % count)
        except Full:
            return count
        count += 1


def test_S14_cancelled_receive_loses_nothing(loop: Loop) -> None:
    """Tasks are cancelled while messages come, before, with and after being woken: each message is received once."""
    count = 2000

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        found: list[int] = []

        async def receive() -> None:
            found.append(await rx.recv_async())

        with tx, rx:
            cancelled = 0
            async with loop.tasks() as start:
                for number in range(count):
                    tasks = [start(receive) for _ in range(3)]
                    if number % 3:
                        await loop.sleep(0)
                    tx.send(number)
                    for _ in range(number % 5):
                        await loop.sleep(0)
                    for task in tasks[: 1 + number % 3]:
                        task.cancel()
                    for task in tasks:
                        if number % 2:
                            task.cancel()
                    await loop.sleep(0)
                    cancelled += sum(task.cancelled for task in tasks)
                # Those that still wait, and may have been woken, go.
                while True:
                    try:
                        found.append(rx.try_recv())
                    except Empty:
                        break
                rx.close()
            assert cancelled > count // 10
        assert sorted(found) == list(range(count))

    loop.run(main)


def test_S14_cancelled_send_sends_nothing(loop: Loop) -> None:
    """A send that is cancelled while it waits for room has sent nothing, and what it was to take along works."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        sub_tx, sub_rx = channel()
        with tx, rx, sub_tx, sub_rx:
            kernel_has = fill(tx)
            async with loop.tasks() as start:
                tasks = [start(tx.send_async, ("never", sub_rx)), start(tx.send_async, "second")]
                await loop.settle()
                assert not any(task.ended for task in tasks)
                with pytest.raises(EndpointMoved):
                    sub_rx.try_recv()
                tasks[0].cancel()
                await loop.settle(lambda: tasks[0].ended)
                sub_tx.send(1)
                assert sub_rx.recv(LIMIT) == 1
                assert [rx.recv(LIMIT) for _ in range(kernel_has)] == [b"%d" % number for number in range(kernel_has)]
                assert await rx.recv_async() == "second"
            with pytest.raises(Empty):
                rx.try_recv()

    loop.run(main)


@pytest.mark.parametrize("size", [0, F + 1], ids=["small", "large"])
def test_S09_send_async_waits_for_room(loop: Loop, size: int) -> None:
    """Back-pressure: a fast sender is never further ahead than the kernel's buffer; order is kept."""
    count = 1000 if size == 0 else 100

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        sent = received = 0
        ahead = 0

        async def send() -> None:
            nonlocal sent
            for number in range(count):
                await tx.send_async((number, bytes(size)))
                sent += 1
            tx.close()

        with rx:
            async with loop.tasks() as start:
                start(send)
                await loop.settle()
                assert sent < count if size == 0 else sent <= count
                async for number, _ in rx:
                    assert number == received
                    ahead = max(ahead, sent - received)
                    received += 1
        assert received == count
        assert ahead < 600

    loop.run(main)


def test_S09_send_async_behind_a_backlog(loop: Loop) -> None:
    """What ``send`` has accepted goes first."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        with rx:
            for number in range(2000):
                tx.send(number)
            async with loop.tasks() as start:
                start(tx.send_async, 2000)
                await loop.settle()
                assert [await rx.recv_async() for _ in range(2001)] == list(range(2001))
            tx.close()

    loop.run(main)


def test_S08_send_async_without_receiver(loop: Loop) -> None:
    """A receiver that is gone, or goes while somebody waits for room, is ReceiverGone; bad objects cost nothing."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        with tx:
            with pytest.raises(SerializationError):
                await tx.send_async(lambda: None)
            await tx.send_async(PERSON)
            assert await rx.recv_async() == PERSON
            fill(tx)
            async with loop.tasks() as start:
                task = start(tx.send_async, 1)
                await loop.settle()
                rx.close()
                await loop.settle(lambda: task.ended)
                assert isinstance(task.error, ReceiverGone)
            with pytest.raises(ReceiverGone):
                await tx.send_async(2)
        with pytest.raises(EndpointClosed):
            await tx.send_async(3)
        with pytest.raises(EndpointClosed):
            await rx.recv_async()

    loop.run(main)


# -- others -----------------------------------------------------------------------------------------


def test_S34_busy_streams_let_others_run(loop: Loop) -> None:
    """A sender that is always ahead, or a receiver that always has room, doesn't keep the loop to itself."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        with tx, rx:
            turns = 0

            async def others() -> None:
                nonlocal turns
                while turns >= 0:
                    turns += 1
                    await loop.sleep(0)

            async with loop.tasks() as start:
                start(others)
                await loop.sleep(0)
                tx.send_many(range(1000))
                before = turns
                for _ in range(1000):
                    await rx.recv_async()
                assert turns - before >= 10
                before = turns
                for number in range(1000):
                    await tx.send_async(number)
                    rx.try_recv()
                assert turns - before >= 10
                turns = -10

    loop.run(main)


def echo(rx: Receiver[Any], tx: Sender[Any]) -> None:
    for message in rx:
        tx.send(message)


def test_X04_between_processes(loop: Loop) -> None:
    """Both directions with another process, large messages among them."""
    tx, child_rx = channel()
    child_tx, rx = channel()
    payloads = [pattern(size) for size in (0, 10, F, F + 1, 1 << 20)] * 10

    async def main(loop: Loop) -> None:
        async with loop.tasks() as start:

            async def send() -> None:
                for payload in payloads:
                    await tx.send_async(payload)
                tx.close()

            start(send)
            assert [message async for message in rx] == payloads

    with rx, fork(echo, child_rx, child_tx) as child:
        child_tx.close()
        loop.run(main)
        assert child.join() == 0


def test_S06_sender_killed_while_awaited(loop: Loop) -> None:
    tx, rx = channel()
    ready_tx, ready_rx = channel()

    def send_and_wait(tx: Sender[Any], ready_tx: Sender[Any]) -> None:
        tx.send("before")
        ready_tx.send(None)
        threading.Event().wait(LIMIT)

    async def main(loop: Loop) -> None:
        assert await rx.recv_async() == "before"
        async with loop.tasks() as start:
            task = start(rx.recv_async)
            await loop.settle()
            child.kill()
            await loop.settle(lambda: task.ended)
            assert isinstance(task.error, Disconnected)

    with rx, ready_rx, fork(send_and_wait, tx, ready_tx) as child:
        tx.close()
        ready_tx.close()
        ready_rx.recv(LIMIT)
        loop.run(main)
        child.join()


def test_S34_loops_in_two_threads() -> None:
    """One receiver awaited in two loops at once: each message reaches one of them, and the end both."""
    tx, rx = channel()

    async def receive() -> list[Any]:
        return [message async for message in rx]

    with rx:
        threads = [InThread(asyncio.run, receive()) for _ in range(2)]
        with tx:
            for number in range(3000):
                tx.send(number)
        found = [thread.result() for thread in threads]
    assert sorted(found[0] + found[1]) == list(range(3000))


def test_S34_one_receiver_in_one_loop_after_another(loop: Loop) -> None:
    """Nothing of a loop that has ended is left behind, descriptors included."""
    tx, rx = channel()
    with tx, rx:
        rx.fileno()
        gc.collect()
        before = open_descriptors()

        async def main(loop: Loop) -> None:
            async with loop.tasks() as start:
                tasks = [start(rx.recv_async) for _ in range(2)]
                await loop.settle()
                tx.send(1)
                await loop.settle(lambda: any(task.ended for task in tasks))
                for task in tasks:
                    task.cancel()

        for _ in range(3):
            loop.run(main)
        gc.collect()
        assert open_descriptors() == before
        with pytest.raises(Empty):
            rx.try_recv()


def test_S23_fork_in_a_loop(loop: Loop) -> None:
    """A child that is forked while tasks wait leaves them to the parent."""

    async def main(loop: Loop) -> None:
        tx, rx = channel()
        with tx, rx:
            async with loop.tasks() as start:
                task = start(rx.recv_async)
                await loop.settle()
                process = multiprocessing.get_context("ipcchan_fork").Process(target=int)  # type: ignore[attr-defined]
                process.start()
                process.join()
                assert process.exitcode == 0
                process.close()
                await loop.settle()
                assert not task.ended
                tx.send("for the parent")
                await loop.settle(lambda: task.ended)
                assert task.result == "for the parent"

    loop.run(main)


def test_users_own_readers_are_left_alone() -> None:
    """A callback that the user has registered for the receiver's descriptor stays where it is."""

    async def main(loop: Loop) -> None:
        tx, rx = bytes_channel()
        seen = []
        running = asyncio.get_running_loop()
        with tx, rx:
            running.add_reader(rx, lambda: seen.append(1))
            async with loop.tasks() as start:
                task = start(rx.recv_async)
                await loop.settle()
                tx.send(SEVEN)
                await loop.settle(lambda: task.ended)
            assert seen
            assert running.remove_reader(rx)

    Asyncio().run(main)


def test_without_a_loop() -> None:
    """Outside of asyncio and trio the error says what is missing."""
    tx, rx = channel()
    with tx, rx:
        for coroutine in (rx.recv_async(), tx.send_async(1)):
            with pytest.raises(RuntimeError, match="asyncio or trio"):
                coroutine.send(None)
        with pytest.raises(Empty):
            rx.try_recv()


def test_neither_library_is_imported() -> None:
    code = "import sys, mp_ipcchan; tx, rx = mp_ipcchan.channel(); rx.recv_async().close(); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert not {"asyncio", "trio", "anyio", "sniffio"} & set(loaded)
