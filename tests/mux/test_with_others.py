"""Channels of a mux with all else that takes channels: types, opaque ends, sets, routers, coroutines, memory, files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from mp_ipcchan import (
    ChannelClosed,
    Disconnected,
    Empty,
    EndpointClosed,
    Fd,
    Full,
    MessageReceived,
    Mux,
    OpaqueReceiver,
    OpaqueSender,
    ProtocolError,
    Receiver,
    ReceiverGone,
    ReceiverSet,
    Router,
    Sender,
    SerializationError,
    SharedMemory,
    _async,
    channel,
)
from mp_ipcchan._typed_codec import codec_of

from ..conformance._support import LIMIT, InThread, bare_fork, open_descriptors
from ..conformance.test_async import Loop, _started, loop  # noqa: F401  (fixtures)
from ..queues._support import until
from ._support import MANY, both_ends, crossing, moved

msgspec = pytest.importorskip("msgspec")


class Offer(msgspec.Struct):
    name: str
    sender: Sender[int]
    receiver: Receiver[int]


class Demand(msgspec.Struct):
    """What an ``Offer`` looks like to who wants another thing."""

    sender: Receiver[int]


class Deaf(msgspec.Struct):
    """To who wants less of it."""

    name: str


@pytest.fixture
def ends() -> Iterator[tuple[Mux, Mux]]:
    with both_ends() as pair:
        yield pair


def typed(mux: tuple[Mux, Mux], of: Any, **options: Any) -> tuple[Sender[Any], Receiver[Any]]:
    """A typed channel from one end to the other."""
    tx, rx = mux[0].channel(of, **options)
    return tx, moved(*mux, rx)


# -- typed channels ----------------------------------------------------------------------------


def test_typed(ends: tuple[Mux, Mux]) -> None:
    """Messages are checked where they are sent, and the type arrives with the end."""
    tx, rx = typed(ends, int, max_size=16)
    sender = moved(*ends, tx)
    with tx, rx, sender:
        for one in (tx, sender):
            with pytest.raises(SerializationError, match="int"):
                one.send("text")
            one.send(5)
            assert rx.recv(LIMIT) == 5
    tx, rx = typed(ends, str, max_size=16)
    with tx, rx, pytest.raises(SerializationError, match="max_size"):
        tx.send("long" * 10)


def test_typed_endpoints_take_no_descriptor(ends: tuple[Mux, Mux]) -> None:
    tx, rx = typed(ends, Offer)
    inner_tx, inner_rx = ends[0].channel(int)
    other_tx, other_rx = ends[0].channel(int)
    with tx, rx, inner_rx, other_tx:
        before = open_descriptors()
        with inner_tx:
            tx.send(Offer("two ends", inner_tx, other_rx))
        offer = rx.recv(LIMIT)
        assert open_descriptors() == before
        with offer.sender, offer.receiver:
            offer.sender.send(1)
            other_tx.send(2)
            assert (inner_rx.recv(LIMIT), offer.receiver.recv(LIMIT)) == (1, 2)


@pytest.mark.parametrize("wanted", [Demand, Deaf])
def test_refused_message_lets_go_of_the_ends_in_it(ends: tuple[Mux, Mux], wanted: Any) -> None:
    """Ends of lanes have no descriptor to close, and their other sides hear of it all the same."""
    tx, rx = typed(ends, Offer)
    rx = Receiver(rx._claim(), codec_of(wanted))
    inner_tx, inner_rx = ends[0].channel(int)
    other_tx, other_rx = ends[0].channel(int)
    with tx, rx, inner_rx, other_tx:
        with inner_tx:
            tx.send(Offer("two ends", inner_tx, other_rx))
        with pytest.raises((ProtocolError, SerializationError)):
            rx.recv(LIMIT)
        with pytest.raises(Disconnected):
            inner_rx.recv(LIMIT)
        with pytest.raises(ReceiverGone):
            for _ in range(MANY):
                other_tx.send(1, LIMIT)


# -- opaque ends -------------------------------------------------------------------------------


def test_opaque(ends: tuple[Mux, Mux]) -> None:
    """They cross as opaque ends, with what waits, and become what they were."""
    tx, rx = ends[0].channel(int)
    tx.send(1)
    opaque_tx, opaque_rx = moved(*ends, (tx.to_opaque(), rx.to_opaque()))
    assert isinstance(opaque_tx, OpaqueSender)
    assert isinstance(opaque_rx, OpaqueReceiver)
    with pytest.raises(TypeError):
        opaque_rx.to(str)
    with opaque_tx.to(int) as tx, opaque_rx.to(int) as rx:
        tx.send(2)
        assert [rx.recv(LIMIT), rx.recv(LIMIT)] == [1, 2]


# -- sets and routers --------------------------------------------------------------------------


def test_members_of_a_set(ends: tuple[Mux, Mux]) -> None:
    """Lanes beside a plain channel: what is there now, what comes while the set waits, and each end."""
    with ExitStack() as stack, ReceiverSet() as receivers:
        pairs = [crossing(*ends) for _ in range(20)] + [channel()]
        for tx, rx in pairs:
            stack.enter_context(tx)
            receivers.add(rx)
        with pytest.raises(Empty):
            receivers.try_select()
        pairs[3][0].send("now")
        [event] = receivers.try_select()
        assert isinstance(event, MessageReceived)
        assert (event.id, event.message.to()) == (3, "now")
        selecting = InThread(receivers.select, LIMIT)
        pairs[7][0].send("later")
        [event] = selecting.result()
        assert isinstance(event, MessageReceived)
        assert (event.id, event.message.to()) == (7, "later")
        for tx, _ in pairs:
            tx.send_many(range(50))
            tx.close()
        found: dict[int, list[Any]] = {}
        while len(receivers):
            for event in receivers.select(LIMIT):
                assert isinstance(event, (MessageReceived, ChannelClosed))
                found.setdefault(event.id, []).append(
                    event.message.to() if isinstance(event, MessageReceived) else None
                )
        assert found == {number: [*range(50), None] for number in range(21)}


def test_member_is_given_back(ends: tuple[Mux, Mux]) -> None:
    tx, rx = crossing(*ends)
    with tx, ReceiverSet() as receivers:
        number = receivers.add(rx.to_opaque())
        tx.send("one")
        assert [event.id for event in receivers.select(LIMIT)] == [number]
        tx.send("two")
        with receivers.remove(number).to() as rx:
            assert rx.recv(LIMIT) == "two"


def _has_come(inlet: Any, ended: bool) -> bool:
    return len(inlet.ready) == 1 and inlet.ended == ended


@pytest.mark.parametrize("arrived", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_members_in_a_forked_child(ends: tuple[Mux, Mux], arrived: bool, closed: bool) -> None:
    """There they have ended, whatever waited in them; here the set is as it was."""
    pairs = [crossing(*ends) for _ in range(3)]
    with ExitStack() as stack, ReceiverSet() as receivers:
        for number, (tx, rx) in enumerate(pairs):
            stack.enter_context(tx)
            inlet = rx._open_link().inlet
            receivers.add(rx)
            tx.send(number)
            if closed:
                tx.close()
            if arrived:
                until(partial(_has_come, inlet, closed))

        def in_child() -> None:
            while len(receivers):
                for event in receivers.select(LIMIT):
                    assert isinstance(event, ChannelClosed)

        with bare_fork(in_child) as child:
            assert child.join() == 0
        found: list[Any] = []
        while len(found) < 3:
            found += [event.message.to() for event in receivers.select(LIMIT) if isinstance(event, MessageReceived)]
        assert sorted(found) == [0, 1, 2]


def test_undecoded_message_lets_go_of_the_ends_in_it(ends: tuple[Mux, Mux]) -> None:
    tx, rx = crossing(*ends)
    inner_tx, inner_rx = ends[0].channel()
    with tx, inner_rx, ReceiverSet() as receivers:
        receivers.add(rx)
        with inner_tx:
            tx.send(inner_tx)
        [event] = receivers.select(LIMIT)
        assert isinstance(event, MessageReceived)
        event.message.close()
        with pytest.raises(Disconnected):
            inner_rx.recv(LIMIT)


def test_router(ends: tuple[Mux, Mux]) -> None:
    """Routes of lanes are called for each message, and hear of the end."""
    with Router() as router:
        lanes = [crossing(*ends) for _ in range(5)]
        queues = [router.route_to_queue(rx) for _, rx in lanes]
        for number, (tx, _) in enumerate(lanes):
            tx.send(number)
            tx.close()
        for number, got in enumerate(queues):
            assert got.get(timeout=LIMIT) == number
            assert isinstance(got.get(timeout=LIMIT), Disconnected)
        assert router.shutdown(LIMIT)


# -- coroutines --------------------------------------------------------------------------------


def test_awaited_messages(ends: tuple[Mux, Mux], loop: Loop) -> None:  # noqa: F811
    """They come to who awaits them, from another thread too, until the last sender is gone."""

    async def main(loop: Loop) -> None:
        tx, rx = crossing(*ends)
        found: list[Any] = []

        async def receive() -> None:
            async for message in rx:
                found.append(message)  # noqa: PERF401  (looked at from outside)

        with rx:
            async with loop.tasks() as start:
                task = start(receive)
                await loop.settle()
                tx.send(1)
                await loop.settle(lambda: found == [1])
                InThread(tx.send, 2).result()
                await loop.settle(lambda: found == [1, 2])
                tx.close()
                await loop.settle(lambda: task.ended)
                assert task.error is None

    loop.run(main)


def test_awaited_room(ends: tuple[Mux, Mux], loop: Loop) -> None:  # noqa: F811
    """A sender goes on when the other side has read, loses nothing, and being cancelled sends nothing."""

    async def main(loop: Loop) -> None:
        tx, rx = crossing(*ends)
        sent: list[int] = []

        async def send_all() -> None:
            for number in range(MANY):
                await tx.send_async(number)
                sent.append(number)
            tx.close()

        with tx, rx:
            async with loop.tasks() as start:
                task = start(send_all)
                count = -1
                while count != len(sent):
                    count = len(sent)
                    await loop.settle()
                assert 0 < count < MANY
                cancelled = start(tx.send_async, "never")
                await loop.settle()
                cancelled.cancel()
                await loop.settle(lambda: cancelled.ended)
                assert [message async for message in rx] == [*range(MANY)]
                await loop.settle(lambda: task.ended)
                assert task.error is None

    loop.run(main)


def test_awaited_room_takes_no_descriptor(ends: tuple[Mux, Mux], loop: Loop) -> None:  # noqa: F811
    """However many wait; what there is at most is the thread's that listens for them."""

    async def main(loop: Loop) -> None:
        lanes = [crossing(*ends) for _ in range(50)]
        await loop.settle()
        before = len(os.listdir("/proc/self/fd"))
        async with loop.tasks() as start:

            async def fill(tx: Sender[Any]) -> None:
                for number in range(10):
                    # Four of these are a window.
                    await tx.send_async((number, bytes(40_000)))
                tx.close()

            tasks = [start(fill, tx) for tx, _ in lanes]
            await loop.settle()
            assert not any(task.ended for task in tasks)
            assert len(os.listdir("/proc/self/fd")) < before + len(lanes) // 2
            for _, rx in lanes:
                assert [message[0] async for message in rx] == [*range(10)]
                rx.close()
            await loop.settle(lambda: all(task.ended for task in tasks))
            assert not any(task.error for task in tasks)

    loop.run(main)


def test_room_that_comes_and_goes_before_it_is_awaited(
    ends: tuple[Mux, Mux],
    loop: Loop,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread's send takes it: the coroutine hears of the next."""

    async def main(loop: Loop) -> None:
        tx, rx = crossing(*ends)
        host: Any = type(_async._host())
        called = host.called
        others: list[int] = []

        def fill() -> None:
            with pytest.raises(Full):
                while True:
                    tx.try_send(bytes(1000))
                    others.append(0)

        def empty() -> None:
            with pytest.raises(Empty):
                while True:
                    rx.recv(0.05)
                    others.pop()

        async def late(self: Any, came: Any, waits: Any) -> None:
            monkeypatch.setattr(host, "called", called)
            empty()
            fill()
            await called(self, came, waits)

        fill()
        monkeypatch.setattr(host, "called", late)
        async with loop.tasks() as start:
            task = start(tx.send_async, b"mine")
            await loop.settle()
            assert not task.ended
            while others:
                assert len(rx.recv(LIMIT)) == 1000
                others.pop()
            await loop.settle(lambda: task.ended)
            assert task.error is None
        assert rx.recv(LIMIT) == b"mine"
        tx.close()
        rx.close()

    loop.run(main)


def test_awaiting_ends_that_close(ends: tuple[Mux, Mux], loop: Loop) -> None:  # noqa: F811
    """Who waits hears of its end's closing, and a sender of its receiver's."""

    async def main(loop: Loop) -> None:
        tx, rx = crossing(*ends)
        async with loop.tasks() as start:
            waiting = start(rx.recv_async)
            await loop.settle()
            rx.close()
            await loop.settle(lambda: waiting.ended)
            assert isinstance(waiting.error, EndpointClosed)
        tx.close()
        tx, rx = crossing(*ends)

        async def flood() -> None:
            while True:
                await tx.send_async("more")

        async with loop.tasks() as start:
            flooding = start(flood)
            await loop.settle()
            rx.close()
            await loop.settle(lambda: flooding.ended)
            assert isinstance(flooding.error, ReceiverGone)
        tx.close()

    loop.run(main)


# -- what has descriptors ----------------------------------------------------------------------


def test_a_receiver_through_its_own_channel(ends: tuple[Mux, Mux]) -> None:
    """While both ends are in one process that is an error; the receiver works as before."""
    tx, rx = ends[0].channel()
    with tx, rx:
        with pytest.raises(SerializationError, match="its own channel"):
            tx.send(rx)
        tx.send("still there")
        assert rx.recv(LIMIT) == "still there"


def test_memory_and_files(ends: tuple[Mux, Mux]) -> None:
    """Memory is shared by both sides, not copied; files arrive open."""
    tx, rx = crossing(*ends)
    with tx, rx, SharedMemory.zeros(100_000) as memory, open(os.devnull, "rb") as file, Fd(file) as fd:
        tx.send((memory, fd))
        there, fd_there = rx.recv(LIMIT)
        with there, fd_there:
            memory.writable()[50_000] = 7
            assert there.buf[50_000] == 7
            there.writable()[0] = 9
            assert memory.buf[0] == 9
            assert os.fstat(fd_there.fileno()).st_rdev == os.stat(os.devnull).st_rdev


def test_files_through_a_receiver_that_left_the_mux(ends: tuple[Mux, Mux]) -> None:
    """They wait in the socket's backlog then, and are open until they have left."""
    tx, rx = ends[0].channel()
    carrier_tx, carrier_rx = channel()
    with tx, carrier_tx, carrier_rx:
        carrier_tx.send(rx)
        with carrier_rx.recv(LIMIT) as there:
            for number in range(400):
                with open(os.devnull, "rb") as file, Fd(file) as fd:
                    tx.send((number, fd))
            for number in range(400):
                got, fd = there.recv(LIMIT)
                with fd:
                    assert got == number
                    assert os.fstat(fd.fileno()).st_rdev == os.stat(os.devnull).st_rdev
