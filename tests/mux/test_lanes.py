"""Channels of a mux are channels: order, end, moves, errors. Both ends of the mux are in this process here."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import select
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count, repeat, starmap
from typing import Any

import pytest

from mp_ipcchan import (
    BytesReceiver,
    BytesSender,
    Disconnected,
    Empty,
    EndpointClosed,
    EndpointMoved,
    Fd,
    Full,
    Mux,
    Receiver,
    ReceiverGone,
    Sender,
    SerializationError,
    channel,
)
from mp_ipcchan._lanes import _switchboard
from mp_ipcchan._lanes._lane_outlet import LaneOutlet

from ..conformance._support import LIMIT, InThread, attempts, open_descriptors, pattern
from ..conformance._support import interrupted as interrupted_finalisers
from ..queues.test_signals import Interrupter, handling, interrupted_at, needs_returns_unwatched
from ._support import MANY, both_ends, crossing, moved


@pytest.fixture
def ends() -> Iterator[tuple[Mux, Mux]]:
    with both_ends() as pair:
        yield pair


@pytest.fixture
def interrupter() -> Iterator[Interrupter]:
    interrupter = Interrupter()
    with handling(interrupter.handle):
        yield interrupter


def _all_of(rx: Receiver[Any]) -> list[Any]:
    """What comes until the end, which must come."""
    found = []
    for _ in attempts():
        try:
            found.append(rx.recv(LIMIT))
        except Disconnected:
            return found
    raise AssertionError


def test_endpoints_are_the_usual_ones(ends: tuple[Mux, Mux]) -> None:
    left, _ = ends
    with (
        left.channel()[0] as tx,
        left.channel()[1] as rx,
        left.bytes_channel()[0] as btx,
        left.bytes_channel()[1] as brx,
    ):
        assert isinstance(tx, Sender)
        assert isinstance(rx, Receiver)
        assert isinstance(btx, BytesSender)
        assert isinstance(brx, BytesReceiver)


def test_both_ends_of_a_channel_here(ends: tuple[Mux, Mux]) -> None:
    """Before one of its ends was sent, and if it never is."""
    tx, rx = ends[0].channel()
    with pytest.raises(Empty):
        rx.try_recv()
    tx.send(1)
    tx.send_many([2, 3])
    tx.try_send(pattern(100_000))
    assert [rx.recv(), rx.recv(), rx.recv()] == [1, 2, 3]
    assert rx.recv() == pattern(100_000)
    waiting = InThread(rx.recv)
    tx.send("to one who waits")
    assert waiting.result() == "to one who waits"
    tx.close()
    with pytest.raises(Disconnected):
        rx.recv()
    rx.close()


def test_descriptors_and_endpoints_in_a_message_that_stays_here(ends: tuple[Mux, Mux]) -> None:
    tx, rx = ends[0].channel()
    inner_tx, inner_rx = ends[0].channel()
    plain_tx, plain_rx = channel()
    with open(os.devnull, "rb") as file, Fd(file) as fd:
        tx.send((inner_tx, inner_rx, plain_rx, fd))
    with pytest.raises(EndpointMoved):
        inner_rx.recv()
    got_tx, got_rx, got_plain, got_fd = rx.recv()
    got_tx.send("copy")
    inner_tx.send("first")
    plain_tx.send("plain")
    assert [got_rx.recv(), got_rx.recv(), got_plain.recv()] == ["copy", "first", "plain"]
    assert os.fstat(got_fd.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    for end in (tx, rx, inner_tx, plain_tx, got_tx, got_rx, got_plain, got_fd):
        end.close()


def test_receiver_moves_with_what_waits_and_what_comes(ends: tuple[Mux, Mux]) -> None:
    left, right = ends
    tx, rx = left.channel()
    tx.send_many(range(10))
    assert rx.recv() == 0
    far = moved(left, right, rx)
    with pytest.raises(EndpointMoved):
        rx.recv()
    tx.send_many(range(10, MANY))
    tx.close()
    assert _all_of(far) == list(range(1, MANY))
    far.close()


def test_sender_is_copied(ends: tuple[Mux, Mux]) -> None:
    left, right = ends
    tx, rx = left.channel()
    tx.send("here first")
    far = moved(left, right, tx)
    far.send("there")
    clone = copy.copy(far)
    far.close()
    clone.send("clone")
    tx.send("here")
    tx.close()
    assert rx.recv(LIMIT) == "here first"
    assert {rx.recv(LIMIT) for _ in range(3)} == {"there", "clone", "here"}
    with pytest.raises(Empty):
        rx.recv(0)
    clone.close()
    with pytest.raises(Disconnected):
        rx.recv(LIMIT)
    rx.close()


def test_both_sides_make_channels_without_asking(ends: tuple[Mux, Mux]) -> None:
    left, right = ends
    made = [end.channel() for end in ends for _ in range(50)]
    for number, (tx, rx) in enumerate(made):
        (left if number < 50 else right).tx.send(rx)
        tx.send(number)
    for number, (tx, _) in enumerate(made):
        with (right if number < 50 else left).rx.recv(LIMIT) as far:
            assert far.recv(LIMIT) == number
        tx.close()


def test_receiver_goes_there_and_back_again(ends: tuple[Mux, Mux]) -> None:
    """However often, with messages under way in each stage; and the end comes through all of them."""
    left, right = ends
    tx, rx = left.channel()
    sent = 0
    for _ in range(20):
        for a, b in ((left, right), (right, left)):
            tx.send(sent)
            sent += 1
            rx = moved(a, b, rx)
            tx.send(sent)
            sent += 1
    tx.close()
    assert _all_of(rx) == list(range(sent))
    rx.close()


def test_sender_goes_there_and_back_again(ends: tuple[Mux, Mux]) -> None:
    left, right = ends
    tx, rx = left.channel()
    for number in range(20):
        tx.send(number)
        with tx:
            tx = moved(*(ends if number % 2 == 0 else reversed(ends)), tx)
    tx.close()
    assert _all_of(rx) == list(range(20))
    # The other way: the receiver goes, and everybody before hears of it.
    tx, rx = left.channel()
    far = moved(left, right, tx)
    near = moved(right, left, far)
    rx.close()
    for sender in (tx, far, near):
        with pytest.raises(ReceiverGone):
            for _ in attempts():
                sender.send(1)
        sender.close()


def test_endpoint_through_a_channel_of_the_mux_that_is_its_own(ends: tuple[Mux, Mux]) -> None:
    """Over one lane after the other: the crossing channel carries the next one's ends."""
    left, right = ends
    tx, rx = crossing(left, right)
    for number in range(50):
        next_tx, next_rx = left.channel()
        tx.send(next_rx)
        next_tx.send(number)
        tx.close()
        following = rx.recv(LIMIT)
        rx.close()
        tx, rx = next_tx, following
        assert rx.recv(LIMIT) == number
    tx.close()
    rx.close()


def test_arrays_and_descriptors_cross(ends: tuple[Mux, Mux]) -> None:
    np = pytest.importorskip("numpy")
    tx, rx = crossing(*ends)
    array = np.arange(200_000)
    plain_tx, plain_rx = channel()
    for _ in range(20):
        # More than the window takes, so that some of it waits.
        tx.send((array, plain_tx))
    array[:] = 0
    for _ in range(20):
        got, got_tx = rx.recv(LIMIT)
        assert (got == np.arange(200_000)).all()
        got[0] = 1
        got_tx.send("through")
        assert plain_rx.recv(LIMIT) == "through"
        got_tx.close()
    for end in (tx, rx, plain_tx, plain_rx):
        end.close()


def test_bytes(ends: tuple[Mux, Mux]) -> None:
    left, right = ends
    tx, rx = left.bytes_channel()
    far = moved(left, right, rx)
    sizes = (0, 1, 65500, 65519, 65520, 65521, 65529, 65530, 1 << 20)
    for size in sizes:
        tx.send(pattern(size))
    for size in sizes:
        assert far.recv(LIMIT) == pattern(size)
    tx.send(b"12345")
    buffer = bytearray(8)
    assert far.recv_into(buffer) == 5
    tx.close()
    far.close()


def test_unbounded_and_back_pressure(ends: tuple[Mux, Mux]) -> None:
    """``send`` takes all, ``try_send`` and a timeout tell when the window is used up; a reader makes room."""
    tx, rx = crossing(*ends)
    sent = 0
    with pytest.raises(Full):
        for _ in attempts():
            tx.try_send(sent)
            sent += 1
    assert sent > 100
    with pytest.raises(Full):
        tx.send(sent, timeout=0)
    sending = InThread(tx.send, sent, LIMIT)
    assert [rx.recv(LIMIT) for _ in range(sent + 1)] == list(range(sent + 1))
    sending.result()
    for number in range(3 * MANY):
        tx.send(number)
    with pytest.raises(Full):
        tx.try_send(0)
    tx.close()
    assert rx.recv_many(100, LIMIT) == list(range(100))
    assert _all_of(rx) == list(range(100, 3 * MANY))
    rx.close()


def test_room_that_comes_while_a_message_is_put_aside(ends: tuple[Mux, Mux], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side reads all there is between a message's refusal and its joining those that wait: it goes, too."""
    tx, rx = crossing(*ends)
    outlet = tx._open_link().outlet
    assert isinstance(outlet, LaneOutlet)
    sent = 0
    while outlet.passed < outlet.allowed:
        tx.send(sent)
        sent += 1

    def read_all(*_: object) -> bool:
        assert [rx.recv(LIMIT) for _ in range(sent)] == list(range(sent))
        _switchboard.pump_all()
        return False

    # Between the two.
    monkeypatch.setattr(LaneOutlet, "insist", read_all)
    tx.send("last")
    assert rx.recv(1) == "last"
    tx.close()
    rx.close()


def test_flooded_neighbour(ends: tuple[Mux, Mux]) -> None:
    """A channel that nobody reads delays no other, and takes a window of the reader's process, no more."""
    left, right = ends
    flood_tx, flood_rx = crossing(left, right)
    tx, rx = crossing(left, right)
    for number in range(20 * MANY):
        flood_tx.send(number)
    for number in range(MANY):
        tx.send(number)
        assert rx.recv(LIMIT) == number
    waiting = flood_rx._open_link().inlet.ready
    assert sum(map(len, waiting)) < 100_000
    assert [flood_rx.recv(LIMIT) for _ in range(MANY)] == list(range(MANY))
    for end in (flood_tx, flood_rx, tx, rx):
        end.close()


def test_flood_of_many_lanes(ends: tuple[Mux, Mux]) -> None:
    """Lanes that are flooded all at once go on side by side, whichever is read."""
    pairs = [crossing(*ends) for _ in range(20)]
    for number in range(2000):
        for tx, _ in pairs:
            tx.send(number)
    for tx, _ in pairs:
        tx.close()
    for _, rx in reversed(pairs):
        assert _all_of(rx) == list(range(2000))
        rx.close()


def test_receiver_gone(ends: tuple[Mux, Mux]) -> None:
    tx, rx = crossing(*ends)
    rx.close()
    with pytest.raises(ReceiverGone):
        for _ in attempts():
            tx.send(1)
    with pytest.raises(ReceiverGone):
        tx.try_send(1)
    tx.close()


def test_what_is_dropped_undecoded_is_closed(ends: tuple[Mux, Mux]) -> None:
    """An endpoint in a message that nobody receives is gone, and the other end hears of it."""
    left, right = ends
    tx, rx = crossing(left, right)
    a_tx, a_rx = left.channel()
    b_tx, b_rx = left.channel()
    tx.send(a_rx)
    tx.send(b_tx)
    b_tx.close()
    rx.close()
    with pytest.raises(ReceiverGone):
        for _ in attempts():
            a_tx.send(1)
    with pytest.raises(Disconnected):
        b_rx.recv(LIMIT)
    # Also where it comes after the receiver has gone, and where it was never sent.
    c_tx, c_rx = left.channel()
    try:
        tx.send(c_rx)
        tx.close()
        with pytest.raises(ReceiverGone):
            for _ in attempts():
                c_tx.send(1)
    except ReceiverGone:
        c_rx.close()
    for end in (tx, a_tx, b_rx, c_tx):
        end.close()


def test_failed_send_gives_back(ends: tuple[Mux, Mux]) -> None:
    left, right = ends
    tx, rx = left.channel()
    tx.send(1)
    with pytest.raises(SerializationError):
        left.tx.send((rx, lambda: None))
    assert rx.recv() == 1
    gone_tx, gone_rx = left.channel()
    gone_rx.close()
    tx.send(2)
    with pytest.raises(ReceiverGone):
        gone_tx.send((rx, tx))
    assert rx.recv() == 2
    # Where there is no room now, too.
    full_tx, full_rx = crossing(left, right)
    with pytest.raises(Full):
        for _ in attempts():
            full_tx.try_send(0)
    with pytest.raises(Full):
        full_tx.try_send((rx, tx))
    tx.send(3)
    tx.close()
    assert _all_of(rx) == [3]
    with pytest.raises(EndpointClosed):
        left.tx.send(tx)
    for end in (rx, gone_tx, full_tx, full_rx):
        end.close()


def test_bad_pickle_and_the_channel_goes_on(ends: tuple[Mux, Mux]) -> None:
    with pytest.raises(TypeError, match="can't be pickled by themselves"):
        pickle.dumps(ends[0].tx)
    with pytest.raises(TypeError, match="can't be pickled by themselves"):
        pickle.dumps(ends[0])
    tx, rx = ends[0].bytes_channel()
    far = moved(*ends, rx)
    tx.send(b"x")
    assert far.recv(LIMIT) == b"x"
    tx.close()
    far.close()


def test_through_another_mux(ends: tuple[Mux, Mux]) -> None:
    left, right = ends
    with both_ends() as (west, east):
        tx, rx = left.channel()
        tx.send(0)
        far = moved(west, east, rx)
        back_tx, back_rx = left.channel()
        far_tx = moved(west, east, back_tx)
        back_tx.close()
        for number in range(1, MANY):
            tx.send(number)
        tx.close()
        assert _all_of(far) == list(range(MANY))
        for number in range(MANY):
            far_tx.send(number)
        far_tx.close()
        assert _all_of(back_rx) == list(range(MANY))
        # And what crossed one goes over the other.
        tx, rx = crossing(left, right)
        rx = moved(east, west, rx)
        tx.send("over two")
        tx.close()
        assert _all_of(rx) == ["over two"]
        for end in (far, back_rx, rx):
            end.close()


def test_through_a_plain_channel(ends: tuple[Mux, Mux]) -> None:
    """There it is a real channel's, which this process bridges."""
    plain_tx, plain_rx = channel()
    tx, rx = crossing(*ends)
    tx.send(0)
    plain_tx.send((tx, rx))
    tx.close()
    far_tx, far_rx = plain_rx.recv(LIMIT)
    for number in range(1, MANY):
        far_tx.send(number)
    far_tx.close()
    assert _all_of(far_rx) == list(range(MANY))
    # Bounded on its way: what nobody reads waits with who sends it.
    tx, rx = crossing(*ends)
    plain_tx.send(rx)
    far_rx.close()
    far_rx = plain_rx.recv(LIMIT)
    with pytest.raises(Full):
        for _ in range(10 * MANY):
            tx.try_send(pattern(1000))
    far_rx.close()
    with pytest.raises(ReceiverGone):
        for _ in attempts():
            tx.send(1)
    for end in (tx, plain_tx, plain_rx):
        end.close()


def test_bridge_hears_of_the_receivers_end(ends: tuple[Mux, Mux]) -> None:
    plain_tx, plain_rx = channel()
    tx, rx = crossing(*ends)
    plain_tx.send(tx)
    tx.close()
    far = plain_rx.recv(LIMIT)
    far.send(1)
    assert rx.recv(LIMIT) == 1
    rx.close()
    with pytest.raises(ReceiverGone):
        for _ in attempts():
            far.send(1)
    for end in (far, plain_tx, plain_rx):
        end.close()


def test_fileno_is_readable_when_there_is_something(ends: tuple[Mux, Mux]) -> None:
    """For this channel alone, though nobody receives; ends, too."""
    tx, rx = crossing(*ends)
    other_tx, other_rx = crossing(*ends)
    with select.epoll() as poller:
        poller.register(rx.fileno(), select.EPOLLIN)
        other_tx.send("for another")
        assert other_rx.recv(LIMIT) == "for another"
        assert not poller.poll(0)
        tx.send(1)
        tx.send(2)
        for expected in (1, 2):
            assert poller.poll(LIMIT)
            assert rx.recv(0) == expected
        assert not poller.poll(0)
        # One at a time, through many windows.
        sending = InThread(tx.send_many, range(MANY))
        for expected in range(MANY):
            assert poller.poll(LIMIT)
            assert rx.recv(0) == expected
        sending.result()
        tx.close()
        assert poller.poll(LIMIT)
        with pytest.raises(Disconnected):
            rx.recv(0)
    for end in (rx, other_tx, other_rx):
        end.close()


def test_threads_wait_each_for_their_own(ends: tuple[Mux, Mux]) -> None:
    """Of several who wait one listens for all; when it leaves, another does."""
    pairs = [crossing(*ends) for _ in range(8)]

    def echo(rx: Receiver[Any], back: Sender[Any]) -> None:
        for message in rx:
            back.send(message)
        back.close()

    back = [ends[1].channel() for _ in pairs]
    threads = []
    for (_, rx), (back_tx, _) in zip(pairs, back, strict=True):
        threads.append(InThread(echo, rx, back_tx))
    for number in range(100):
        for tx, _ in pairs:
            tx.send(number)
        for _, back_rx in back:
            assert back_rx.recv(LIMIT) == number
    for tx, _ in reversed(pairs):
        tx.close()
    for thread in threads:
        thread.result()
    for (_, rx), (_, back_rx) in zip(pairs, back, strict=True):
        with pytest.raises(Disconnected):
            back_rx.recv(LIMIT)
        back_rx.close()
        rx.close()


def test_senders_in_threads_keep_their_order(ends: tuple[Mux, Mux]) -> None:
    tx, rx = crossing(*ends)

    def send(sender: int) -> None:
        for number in range(2000):
            tx.send((sender, number))

    threads = [InThread(send, sender) for sender in range(4)]
    found: list[list[int]] = [[], [], [], []]
    for _ in range(8000):
        sender, number = rx.recv(LIMIT)
        found[sender].append(number)
    assert found == [list(range(2000))] * 4
    for thread in threads:
        thread.result()
    tx.close()
    rx.close()


#: Behind all numbers.
END = -1


@needs_returns_unwatched
def test_interrupted_calls_lose_and_double_nothing(ends: tuple[Mux, Mux], interrupter: Interrupter) -> None:
    """What a signal's handler that raises interrupts is done, or not done; it hands out for others, too."""
    (tx, rx), (other_tx, other_rx) = crossing(*ends), crossing(*ends)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        sent: list[int] = []
        interrupter.interrupt(lambda: [(tx.send(n), other_tx.send(n), sent.append(n)) for n in range(200)], 2e-3)  # noqa: B023
        got: list[int] = []
        others: list[int] = []
        for into, source in ((got, rx), (others, other_rx)):
            # Received and kept by one C call each.
            with suppress(Empty):
                interrupter.interrupt(partial(into.extend, starmap(source.recv, repeat((0,), 1000))), 1e-3)
        for into, sender, source in ((got, tx, rx), (others, other_tx, other_rx)):
            sender.send(END)
            if END not in into:
                into.extend(iter(partial(source.recv, LIMIT), END))
            # The one that was interrupted may have gone, or not.
            assert into in (list(range(len(sent))), list(range(len(sent) + 1)))
    for one in (tx, rx, other_tx, other_rx):
        one.close()


@pytest.mark.parametrize("again", [True, False], ids=["closed again", "dropped"])
@pytest.mark.parametrize("which", [0, 1], ids=["sender", "receiver"])
@needs_returns_unwatched
@interrupted_finalisers
def test_interrupted_closing_leaves_no_channel_open(ends: tuple[Mux, Mux], which: int, again: bool) -> None:
    """Wherever a signal's handler raises in ``close``, the end is still there to be closed, or is being closed."""
    ends[0].tx.send("used")
    assert ends[1].rx.recv(LIMIT) == "used"

    def streams() -> int:
        trunks = [mux._trunk for mux in ends]
        return sum(len(trunk.sending) + len(trunk.receiving) for trunk in trunks if trunk is not None)

    before = streams()
    for place in count(1):
        pair = [*crossing(*ends)]
        assert streams() == before + 2
        end = pair.pop(which)
        interrupted = interrupted_at(place, end.close)
        if again:
            end.close()
        del end
        for _ in attempts():
            # Of the other end, which closes by itself, or says that there is nobody.
            _switchboard.pump_all()
            if streams() == before:
                break
        pair.pop().close()
        if not interrupted:
            assert place > 5
            break


@needs_returns_unwatched
@interrupted_finalisers
def test_interrupted_closing_of_a_mux() -> None:
    """As that of a channel's end: closed again, nothing of it is left."""
    before = open_descriptors()
    for place in count(1):
        with both_ends() as (left, right):
            left.tx.send("used")
            assert right.rx.recv(LIMIT) == "used"
            interrupted = interrupted_at(place, left.close)
        for _ in attempts():
            _switchboard.pump_all()
            if open_descriptors() == before:
                break
        if not interrupted:
            assert place > 5
            break


def test_mux_closes_when_its_channels_have(ends: tuple[Mux, Mux]) -> None:
    """The socket stays while a channel needs it, and goes with the last, on both sides."""
    left, right = ends
    tx, rx = crossing(left, right)
    before = len(os.listdir("/proc/self/fd"))
    left.close()
    right.close()
    with pytest.raises(EndpointClosed):
        left.channel()
    tx.send("still")
    tx.close()
    assert _all_of(rx) == ["still"]
    rx.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < before


def test_mux_that_is_in_use_stays(ends: tuple[Mux, Mux]) -> None:
    tx, rx = channel()
    ends[0].tx.send(1)
    with pytest.raises(SerializationError, match="in use"):
        tx.send(ends[0])
    with pytest.raises(TypeError, match="can't be copied"):
        copy.copy(ends[0])
    tx.send(ends[1])
    with pytest.raises(EndpointMoved):
        _ = ends[1].rx
    with rx.recv(LIMIT) as far:
        assert far.rx.recv(LIMIT) == 1
    tx.close()
    rx.close()


@pytest.fixture
def threads_come_between() -> Iterator[None]:
    """They do so in each other's steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_come_between")
def test_sent_while_the_receiver_moves(ends: tuple[Mux, Mux]) -> None:
    """What had waited in it goes ahead of what is sent meanwhile, though it goes message by message."""
    left, right = ends

    def receive_the_end() -> Receiver[int]:
        for message in right.rx:
            if message is not None:
                return message
        raise AssertionError

    for _ in range(20):
        tx, rx = left.channel()
        # More than the other side takes before it reads: so the receiver leaves later, by another thread.
        for _ in range(1000):
            left.tx.send(None)
        left.tx.send(rx)
        receiving = InThread(receive_the_end)
        for number in range(2000):
            tx.send(number)
        there = receiving.result()
        assert [there.recv(LIMIT) for _ in range(2000)] == [*range(2000)]
        tx.close()
        there.close()
