"""Conformance 2.1, 2.3, 3.32: shared memory. Each test is named after its row."""

from __future__ import annotations

import copy
import fcntl
import os

import pytest

from mp_ipcchan import EndpointMoved, SharedMemory, channel

from ._support import LIMIT, MIB, PERSON, SEVEN, bare_fork, open_descriptors

BYTE = 0xBA


def test_H20_shared_memory() -> None:
    """A value and 1 MiB of memory, sent as a clone, are equal here and there."""
    tx, rx = channel()
    with tx, rx, SharedMemory.filled(BYTE, MIB) as memory:
        tx.send((PERSON, memory.clone()))
        person, received = rx.recv(LIMIT)
        with received:
            assert person == PERSON
            assert bytes(memory) == bytes(received.buf) == bytes([BYTE]) * MIB


def test_H21_shared_memory_slice() -> None:
    """Memory of size 0, made in either way, and three bytes arrive as they were."""
    tx, rx = channel()
    with tx, rx:
        for made in (SharedMemory.filled(1, 0), SharedMemory.from_bytes(b""), SharedMemory.from_bytes(b"\4\2\x2a")):
            tx.send(made)
            with rx.recv(LIMIT) as received:
                assert received == made
                assert (len(received), bytes(received)) == (len(made), bytes(made))
        assert bytes(made) == b"\4\2\x2a"


def test_H22_shared_memory_object_equality() -> None:
    """A tuple with 1 MiB of memory in it compares equal after its transfer."""
    tx, rx = channel()
    with tx, rx:
        sent = (PERSON, SharedMemory.filled(BYTE, MIB))
        tx.send(sent)
        assert rx.recv(LIMIT) == sent


def test_H23_shared_memory_take() -> None:
    """The content of received memory, taken out, is exactly what was filled in; it is used up then."""
    tx, rx = channel()
    with tx, rx, SharedMemory.filled(BYTE, MIB) as memory:
        tx.send(memory)
        received = rx.recv(LIMIT)
        assert received.take() == bytes([BYTE]) * MIB
        for use in (received.take, received.clone, received.writable, lambda: received.buf, lambda: tx.send(received)):
            with pytest.raises(EndpointMoved):
                use()
        assert memory[0] == BYTE


def test_H24_shared_memory_take_empty() -> None:
    """Taking the content of empty memory gives no bytes, and is no error."""
    tx, rx = channel()
    with tx, rx:
        tx.send(SharedMemory.from_bytes(b""))
        assert rx.recv(LIMIT).take() == b""


def test_P35_shared_memory() -> None:
    """Seven bytes and a region of 1 MiB arrive together."""
    tx, rx = channel()
    with tx, rx:
        tx.send((SEVEN, [], [SharedMemory.filled(BYTE, MIB)]))
        data, endpoints, (region,) = rx.recv(LIMIT)
        assert (data, endpoints, len(region)) == (SEVEN, [], MIB)
        assert region.buf == bytes([BYTE]) * MIB


def test_P36_shared_memory_clone() -> None:
    """A clone has the same content, outlives what it was cloned from, and takes no descriptor."""
    memory = SharedMemory.filled(BYTE, MIB)
    before = open_descriptors()
    for clone in (memory.clone(), copy.copy(memory)):
        assert clone == memory
        clone.close()
    last = memory.clone()
    assert open_descriptors() == before
    memory.close()
    assert last.buf == bytes([BYTE]) * MIB
    last.close()
    assert open_descriptors() < before


def test_S32_sender_keeps_access() -> None:
    """Clones and transferred copies are one memory: a late write, by whichever side, is seen by all."""
    tx, rx = channel()
    with tx, rx, SharedMemory.zeros(3) as memory, memory.clone() as clone:
        tx.send(memory)
        with rx.recv(LIMIT) as received:
            view = memory.buf
            memory.writable()[0] = 1
            clone.writable()[1] = 2
            received.writable()[2] = 3
            for one in (memory, clone, received):
                assert bytes(one) == b"\1\2\3"
            assert view == b"\1\2\3"


def test_S32_writes_cross_processes() -> None:
    """What another process writes to the memory is seen here, and stays when it has ended."""
    memory = SharedMemory.zeros(8)
    tx, rx = channel()
    with tx, rx, memory:
        tx.send(memory)

        def write() -> None:
            rx.recv(LIMIT).writable()[:] = b"written!"

        with bare_fork(write) as child:
            assert child.join() == 0
        assert bytes(memory) == b"written!"


def test_S32_equality_is_by_content() -> None:
    """Two memories of the same content are equal; other sizes or bytes, anywhere, are not."""
    content = bytes(range(256)) * 5000
    with SharedMemory.from_bytes(content) as one, SharedMemory.from_bytes(bytearray(content)) as other:
        assert one == other
        assert one == content
        assert one == memoryview(content)
        assert one != content[:-1]
        assert one != SharedMemory.from_bytes(content[:-1])
        other.writable()[-1] ^= 1
        assert one != other
        assert one != "text"
        with pytest.raises(TypeError, match="unhashable"):
            hash(one)


def test_S32_nobody_can_truncate_it() -> None:
    """No holder can make it shorter, larger, or change its seals: no reader dies of a bus error."""
    before = open_descriptors()
    with SharedMemory.zeros(MIB) as memory:
        (fd,) = open_descriptors() - before
        for size in (0, MIB - 1, MIB + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert memory.buf[MIB - 1] == 0
