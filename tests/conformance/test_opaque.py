"""Conformance 2.1: endpoints that don't say what goes through them. Each test is named after its row."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from typing import Any

import pytest

from mp_ipcchan import (
    Disconnected,
    EndpointClosed,
    EndpointMoved,
    OpaqueReceiver,
    OpaqueSender,
    Receiver,
    ReceiverGone,
    ReceiverSet,
    Sender,
    SerializationError,
    bytes_channel,
    channel,
)

from ._support import LIMIT, PERSON, SEVEN, MakePair, both_kinds, open_descriptors


def test_H11_opaque_sender() -> None:
    """A sender made opaque and a sender again sends."""
    tx, rx = channel()
    with rx, tx.to_opaque().to() as again:
        again.send(PERSON)
        assert rx.recv(LIMIT) == PERSON


def test_H12_embedded_opaque_senders() -> None:
    """An opaque sender inside a message is made a sender where it is received."""
    sub_tx, sub_rx = channel()
    super_tx, super_rx = channel()
    with sub_rx, super_tx, super_rx, sub_tx.to_opaque() as opaque:
        super_tx.send((PERSON, opaque))
        person, received = super_rx.recv(LIMIT)
        assert person == PERSON
        assert isinstance(received, OpaqueSender)
        with received.to() as received_tx:
            received_tx.send(PERSON)
            assert sub_rx.recv(LIMIT) == PERSON


@both_kinds
def test_H12_embedded_opaque_receivers(make_pair: MakePair) -> None:
    """An opaque receiver moves, with what waits in it, and is what it was when ``to`` is called."""
    tx, rx = make_pair()
    kind = type(rx)
    super_tx, super_rx = channel()
    with tx, super_tx, super_rx:
        tx.send_many([b"%d" % number for number in range(10)])
        assert rx.recv(LIMIT) == b"0"
        opaque = rx.to_opaque()
        super_tx.send([opaque])
        [received] = super_rx.recv(LIMIT)
        assert isinstance(received, OpaqueReceiver)
        with received.to() as received_rx:
            assert type(received_rx) is kind
            assert [received_rx.recv(LIMIT) for _ in range(9)] == [b"%d" % number for number in range(1, 10)]
            tx.send(SEVEN)
            assert received_rx.recv(LIMIT) == SEVEN


@both_kinds
def test_H11_conversion_consumes(make_pair: MakePair) -> None:
    """The handle that was converted is dead, each time, and closing it does nothing; no descriptor is made."""
    before = open_descriptors()
    tx, rx = make_pair()
    with_channel = open_descriptors()
    opaque_tx, opaque_rx = tx.to_opaque(), rx.to_opaque()
    tx.close()
    rx.close()
    for use in (tx.to_opaque, tx.clone, lambda: tx.send(b""), rx.to_opaque, rx.try_recv):
        with pytest.raises(EndpointMoved):
            use()
    again_tx, again_rx = opaque_tx.to(), opaque_rx.to()
    for conversion in (opaque_tx.to, opaque_tx.clone, opaque_rx.to, opaque_rx.fileno):
        with pytest.raises(EndpointMoved):
            conversion()
    assert open_descriptors() == with_channel
    again_tx.send(SEVEN)
    assert again_rx.recv(LIMIT) == SEVEN
    again_tx.close()
    with pytest.raises(Disconnected):
        again_rx.recv(LIMIT)
    again_rx.close()
    with pytest.raises(EndpointClosed):
        again_rx.to_opaque()
    assert open_descriptors() == before


def test_H11_opaque_senders_are_copied_and_receivers_not() -> None:
    """A clone is a handle of its own, and keeps the channel open; an opaque receiver stays one."""
    tx, rx = channel()
    with rx:
        opaque = tx.to_opaque()
        with opaque.clone() as cloned, copy.copy(cloned).to() as copied:
            opaque.close()
            assert not cloned.closed
            copied.send(1)
            assert rx.recv(LIMIT) == 1
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)
    tx, rx = channel()
    with tx, rx.to_opaque() as opaque_rx:
        for copying in (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="can't be copied"):
                copying(opaque_rx)
        with pytest.raises(TypeError, match="send them"):
            pickle.dumps(opaque_rx)
        assert not hasattr(opaque_rx, "recv")
        opaque_rx.close()
        with pytest.raises(ReceiverGone):
            tx.send(1)


def answer(opaque_rx: OpaqueReceiver, opaque_tx: OpaqueSender) -> None:
    tx: Sender[Any] = opaque_tx.to()
    rx: Receiver[Any] = opaque_rx.to()
    for message in rx:
        tx.send(message)


def test_X04_opaque_endpoints_as_arguments(start_method: str) -> None:
    """Passed to a process, the receiver moves and the sender is copied, whichever way it is started."""
    tx, child_rx = bytes_channel()
    child_tx, rx = channel()
    opaque_rx, opaque_tx = child_rx.to_opaque(), child_tx.to_opaque()
    context: Any = multiprocessing.get_context(f"ipcchan_{start_method}")
    process = context.Process(target=answer, args=(opaque_rx, opaque_tx))
    process.start()
    with rx, opaque_tx:
        assert opaque_rx.closed
        assert not opaque_tx.closed
        opaque_tx.close()
        with tx:
            tx.send(SEVEN)
        assert list(rx) == [SEVEN]
    process.join()
    assert process.exitcode == 0
    process.close()


def test_X04_opaque_endpoints_through_a_stock_queue() -> None:
    """The stdlib's own queue takes them, too."""
    from multiprocessing import resource_sharer

    tx, rx = channel()
    with rx, tx.to_opaque() as opaque_tx:
        queue: Any = multiprocessing.get_context("fork").Queue()
        queue.put(opaque_tx)
        with queue.get(timeout=LIMIT).to() as received:
            received.send(PERSON)
            assert rx.recv(LIMIT) == PERSON
        queue.close()
        queue.join_thread()
    # The thread that has handed out the descriptor.
    resource_sharer.stop(LIMIT)


def test_typed_ends_stay_typed() -> None:
    """Opaque or not, in a message or not: what the messages of a channel are held against goes along."""
    tx, rx = channel(type=int)
    super_tx, super_rx = channel()
    with super_tx, super_rx, rx:
        super_tx.send(tx.to_opaque())
        with super_rx.recv(LIMIT).to(int) as again:
            again.send(5)
            with pytest.raises(SerializationError):
                again.send("five")
        super_tx.send(rx.to_opaque())
        received = super_rx.recv(LIMIT)
        with pytest.raises(TypeError, match="of a channel of"):
            received.to(str)
        with received.to() as again_rx:
            assert again_rx.recv(LIMIT) == 5


def test_typed_members_of_a_set() -> None:
    """A set decodes the messages of typed channels, opaque or not, as their receivers would."""
    with ReceiverSet() as receivers:
        for opaque in (False, True):
            tx, rx = channel(type=list[int])
            with tx:
                number = receivers.add(rx.to_opaque() if opaque else rx)
                tx.send([1])
                [event] = receivers.select(LIMIT)
                assert event.id == number
                with pytest.raises(TypeError, match="came through a channel of"):
                    event.message.to(dict)
                assert event.message.to(list[int]) == [1]
                receivers.remove(number).close()


def test_class_of_a_pickle() -> None:
    """Of a message that is a pickle, ``to`` checks the class that it is told."""
    tx, rx = channel()
    with tx, ReceiverSet() as receivers:
        receivers.add(rx)
        tx.send_many([{"a": 1}, {"a": 1}])
        events = []
        for _ in range(2):
            events += receivers.select(LIMIT) if len(events) < 2 else []
        first, second = (event.message for event in events)
        assert first.to(dict[str, int]) == {"a": 1}
        with pytest.raises(SerializationError, match="dict"):
            second.to(str)
