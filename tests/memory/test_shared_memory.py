"""SharedMemory beyond the rows: its surface, what it costs, how it travels, and what strangers pass off as it."""

from __future__ import annotations

import array
import fcntl
import mmap
import multiprocessing
import os
import pickle
import socket
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import pytest

from mp_ipcchan import (
    EndpointClosed,
    Pipe,
    ProcessPoolExecutor,
    ProtocolError,
    Queue,
    SerializationError,
    SharedMemory,
    SimpleQueue,
    channel,
)
from mp_ipcchan._segments._segment import create_blank

from ..conformance._support import LIMIT, MIB, open_descriptors, room_for
from ..processes._support import METHODS, context_of, started

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


# -- the surface ------------------------------------------------------------------------------


def test_sizes_and_items() -> None:
    """Length, size, items and slices; the views are of bytes, the plain one read-only."""
    with SharedMemory.from_bytes(b"hello") as memory:
        assert (len(memory), memory.size, memory[1], memory[-1]) == (5, 5, ord("e"), ord("o"))
        assert memory[1:3] == b"el"
        assert memory.buf.readonly
        assert memory.buf.format == "B"
        assert not memory.writable().readonly
        assert repr(memory) == "<mp_ipcchan.SharedMemory 5 bytes>"
        with pytest.raises(IndexError):
            memory[5]
        with pytest.raises(TypeError):
            memory.buf[0] = 1
        assert list(memory) == list(b"hello")
        assert memory
    assert not SharedMemory.zeros(0)


def test_received_while_the_last_other_handle_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, while this process's descriptor of the same memory is being closed."""
    close = os.close
    received: list[SharedMemory] = []
    tx, rx = channel()
    with tx, rx:
        memory = SharedMemory.filled(7, MIB)
        tx.send(memory)

        def receive_and_close(fd: int) -> None:
            monkeypatch.setattr(os, "close", close)
            received.append(rx.recv(LIMIT))
            close(fd)

        monkeypatch.setattr(os, "close", receive_and_close)
        memory.close()
    with received.pop() as again:
        assert again.buf == bytes([7]) * MIB


def test_buffers_of_any_shape() -> None:
    """Made from items of any size, and from strided views, in C order."""
    whole = np.arange(12, dtype="i4").reshape(3, 4)
    for buffer in (whole, whole.T, whole[:, ::2], array.array("d", [1, 2]), memoryview(b"abcdef")[::2]):
        assert bytes(SharedMemory.from_bytes(buffer)) == memoryview(buffer).tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 5])
@pytest.mark.parametrize("byte", [0, 7, 255])
def test_filled(byte: int, size: int) -> None:
    assert bytes(SharedMemory.filled(byte, size)) == bytes([byte]) * size


def test_bad_arguments() -> None:
    for byte in (-1, 256):
        with pytest.raises(ValueError, match="0 to 255"):
            SharedMemory.filled(byte, 1)
    with pytest.raises(ValueError, match="negative"):
        SharedMemory.zeros(-1)
    with pytest.raises(TypeError):
        SharedMemory.zeros("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="from_bytes"):
        SharedMemory()
    before = open_descriptors()
    with pytest.raises(OverflowError):
        SharedMemory.zeros(1 << 64)
    with pytest.raises(TypeError):
        SharedMemory.from_bytes("text")  # type: ignore[arg-type]
    assert open_descriptors() == before


def test_close() -> None:
    """A closed handle says so; views and arrays made from it are valid, and others with it."""
    memory = SharedMemory.from_bytes(b"still here")
    clone, view, items = memory.clone(), memory.buf, memory.array("u1")
    memory.close()
    memory.close()
    assert memory.closed
    assert repr(memory) == "<mp_ipcchan.SharedMemory closed>"
    for use in (memory.take, memory.clone, memory.writable, lambda: len(memory), lambda: memory[0]):
        with pytest.raises(EndpointClosed):
            use()
    tx, rx = channel()
    with tx, rx, pytest.raises(EndpointClosed):
        tx.send([memory])
    assert bytes(view) == bytes(items) == bytes(clone) == b"still here"


def test_a_users_view_may_be_released() -> None:
    memory = SharedMemory.from_bytes(b"abc")
    for view in (memory.buf, memory.writable()):
        view.release()
    assert bytes(memory) == b"abc"


def test_bare_pickle_is_refused() -> None:
    for memory in (SharedMemory.zeros(0), SharedMemory.zeros(1)):
        with pytest.raises(TypeError, match="send them"):
            pickle.dumps(memory)


def test_array() -> None:
    """Writable, uncopied, seen by every holder, and it keeps the memory by itself."""
    tx, rx = channel()
    with tx, rx:
        memory = SharedMemory.zeros(8 * 6)
        tx.send(memory)
        mine, theirs = memory.array("f8", (2, 3)), rx.recv(LIMIT).array(np.float64)
        memory.close()
        mine[1, 2] = 5
        assert theirs.shape == (6,)
        assert theirs[5] == 5
        theirs += 1
        assert mine.tolist() == [[1, 1, 1], [1, 1, 6]]
        assert mine.flags.writeable
        assert mine.flags.c_contiguous


def test_array_of_a_part_and_of_nothing() -> None:
    memory = SharedMemory.from_bytes(b"abcdefg")
    assert bytes(memory.array("u1", 3)) == b"abc"
    assert memory.array("u1", ()).shape == ()
    assert memory.array("i8", (0, 5)).shape == (0, 5)
    assert SharedMemory.zeros(0).array("f8").shape == (0,)


def test_array_that_does_not_fit() -> None:
    memory = SharedMemory.zeros(15)
    with pytest.raises(ValueError, match="takes 16 bytes, there are 15"):
        memory.array("f8", 2)
    with pytest.raises(ValueError, match="say the shape"):
        memory.array("f8")
    with pytest.raises(ValueError, match="negative"):
        memory.array("u1", (-1,))
    with pytest.raises(TypeError, match="pointers"):
        memory.array(object, 1)


@pytest.mark.skipif(not hasattr(memoryview(b""), "__buffer__"), reason="Python calls __buffer__ from 3.12 on")
def test_it_is_a_buffer() -> None:
    memory = SharedMemory.from_bytes(b"abc")
    view = memoryview(memory)  # type: ignore[arg-type]
    view[0] = ord("x")
    assert bytes(memory) == b"xbc"


# -- what it costs ----------------------------------------------------------------------------


def mapped() -> int:
    """How many mappings of our memory this process has."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:mp_ipcchan" in line for line in maps)


def test_descriptors_and_mappings() -> None:
    """One descriptor while there is a handle, mapped or not; a view keeps the pages, and no descriptor."""
    before, maps = open_descriptors(), mapped()
    memory = SharedMemory.zeros(MIB)
    assert (len(open_descriptors() - before), mapped()) == (1, maps)
    view = memory.buf[5:]
    assert (len(open_descriptors() - before), mapped()) == (1, maps + 1)
    memory.close()
    assert open_descriptors() == before
    assert view[0] == 0
    assert mapped() == maps + 1
    del view
    assert mapped() == maps


def test_size_zero_is_nothing() -> None:
    before = open_descriptors()
    tx, rx = channel()
    with tx, rx:
        between = open_descriptors()
        memory = SharedMemory.zeros(0)
        tx.send([memory, memory])
        received = rx.recv(LIMIT)
        assert [bytes(one) for one in received] == [b"", b""]
        assert open_descriptors() == between
    assert open_descriptors() == before


def test_received_again_and_again() -> None:
    """Memory that arrives ten thousand times, and is kept, costs one descriptor and one mapping."""
    tx, rx = channel()
    with tx, rx:
        memory = SharedMemory.zeros(5)
        memory.writable()
        maps = mapped()
        kept = []
        with room_for(3):
            for _ in range(2000):
                tx.send([memory] * 5)
                kept += rx.recv(LIMIT)
            kept[-1].writable()[0] = 1
        assert mapped() == maps
        assert kept[0][0] == 1


def test_a_thousand_arrays_under_a_low_limit() -> None:
    """Arrays outlive their handles without a descriptor each."""
    tx, rx = channel()
    with tx, rx, room_for(16):
        arrays = []
        for number in range(1000):
            tx.send(SharedMemory.filled(number % 256, 4096))
            with rx.recv(LIMIT) as received:
                arrays.append(received.array("u1"))
        assert all(one[0] == one[-1] == number % 256 for number, one in enumerate(arrays))
        del arrays


def test_each_occurrence_costs_one_descriptor_at_most() -> None:
    """One object three times in a message is one there; it and a clone are one memory."""
    tx, rx = channel()
    with tx, rx:
        memory = SharedMemory.from_bytes(b"x")
        before = open_descriptors()
        tx.send([memory, memory, memory.clone()])
        with room_for(3):
            first, second, third = rx.recv(LIMIT)
        assert first is second is not third
        assert open_descriptors() == before


def test_a_backlog_holds_no_descriptors() -> None:
    """Memory that waits to be sent is there when its turn comes, though it was closed; it takes no descriptors."""
    tx, rx = channel()
    with tx, rx:
        before = open_descriptors()
        memory = SharedMemory.from_bytes(b"kept")
        for _ in range(1000):
            tx.send(memory)
        memory.close()
        assert len(open_descriptors() - before) < 10
        for _ in range(1000):
            assert rx.recv(LIMIT).take() == b"kept"


def test_unsent_memory_stays() -> None:
    """A send that fails leaves memory as it was."""
    tx, rx = channel()
    with tx, rx:
        memory = SharedMemory.from_bytes(b"x")
        with pytest.raises(SerializationError):
            tx.send([memory, lambda: None])
        rx.close()
        with pytest.raises(BrokenPipeError):
            tx.send(memory)
        assert bytes(memory) == b"x"


# -- how it travels ---------------------------------------------------------------------------


def increment(memory: SharedMemory) -> None:
    memory.writable()[0] += 1
    assert SharedMemory.from_bytes(b"") == SharedMemory.zeros(0)


def increment_from(source: Any) -> None:
    for memory in source.get() if hasattr(source, "get") else source.recv():
        if memory.size:
            increment(memory)


def size_of(memory: SharedMemory) -> tuple[int, SharedMemory]:
    increment(memory)
    return memory.size, memory


@pytest.mark.parametrize("method", METHODS)
def test_process_arguments(method: str) -> None:
    """Passed to a process of each start method; this one keeps it."""
    memory = SharedMemory.zeros(4)
    with started(context_of(method), increment, memory):
        pass
    assert memory[0] == 1


@pytest.mark.parametrize("make", [Queue, SimpleQueue, Pipe])
def test_queues_and_pipes(make: Any) -> None:
    ends = made if isinstance(made := make(), tuple) else (made, made)
    memory = SharedMemory.zeros(4)
    with started(context_of("fork"), increment_from, ends[0]):
        (ends[1].put if hasattr(ends[1], "put") else ends[1].send)([memory, SharedMemory.zeros(0)])
    assert memory[0] == 1
    for end in ends:
        end.close()


def test_tasks_and_results() -> None:
    """Into a worker and back, where it is the same memory again."""
    memory = SharedMemory.zeros(4)
    with ProcessPoolExecutor(1, mp_context=context_of("fork")) as executor:  # type: ignore[arg-type]
        size, back = executor.submit(size_of, memory).result(LIMIT)
        assert (size, memory[0], back[0]) == (4, 1, 1)
        back.writable()[0] = 7
        assert memory[0] == 7


@pytest.fixture
def _no_sharer() -> Iterator[None]:
    """The stdlib's thread that hands out descriptors ends with the test."""
    yield
    from multiprocessing import resource_sharer

    resource_sharer.stop(LIMIT)


@pytest.mark.usefixtures("_no_sharer")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_through_the_stdlib(method: str) -> None:
    """The stdlib's own Queue and Pipe take it to the stdlib's processes."""
    stock: BaseContext = multiprocessing.get_context(method)
    memory = SharedMemory.zeros(4)
    queue = stock.Queue()
    with started(stock, increment_from, queue):
        queue.put([memory, SharedMemory.zeros(0)])
    queue.close()
    queue.join_thread()
    near, far = stock.Pipe()
    with near, far, started(stock, increment_from, far):
        near.send([memory])
    assert memory[0] == 2


@pytest.mark.usefixtures("_no_sharer")
def test_through_a_manager() -> None:
    memory = SharedMemory.zeros(4)
    with multiprocessing.Manager() as manager:
        items = manager.list([memory])
        items[0].writable()[0] = 9
        assert memory[0] == 9


# -- what strangers pass off as it ------------------------------------------------------------


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only(size: int) -> int:
    fd = create_blank(size)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


FORGERIES = {
    "not sealed": lambda: memfd(4096, 0),
    "may shrink": lambda: memfd(4096, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL),
    "may grow": lambda: memfd(4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL),
    "seals may be added": lambda: memfd(4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
    "nobody may write": lambda: memfd(4096, SEALS | fcntl.F_SEAL_WRITE),
    "nobody may map it to write": lambda: memfd(4096, SEALS | 0x10),
    "empty": lambda: memfd(0, SEALS),
    "opened to read": lambda: read_only(4096),
    "a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "a device": lambda: os.open("/dev/zero", os.O_RDWR),
    "a pipe": lambda: os.pipe2(os.O_CLOEXEC)[0],
    "a socket": lambda: socket.socket(socket.AF_UNIX).detach(),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_forgeries_are_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that could kill its reader, or isn't memory, is refused before it is mapped; nothing is left open."""
    tx, rx = channel()
    with tx, rx:
        memory = SharedMemory.zeros(4096)
        before = open_descriptors()
        forged = FORGERIES[what]()
        others = open_descriptors() - before - {forged}
        honest = memory._region.fileno()
        monkeypatch.setattr(type(memory._region), "fileno", lambda self: forged)
        tx.send(memory)
        monkeypatch.undo()
        for fd in {forged, *others}:
            os.close(fd)
        assert honest in before
        tx.send("next")
        with pytest.raises((ProtocolError, SerializationError)):
            rx.recv(LIMIT)
        assert open_descriptors() == before
        assert rx.recv(LIMIT) == "next"


def test_a_mapping_of_pages_that_are_gone_is_an_error() -> None:
    """Where there is no room in the address space, mapping raises, and the handle goes on."""
    memory = SharedMemory.zeros(1 << 60)
    with pytest.raises((OSError, OverflowError)):
        memory.writable()
    assert memory.size == 1 << 60
    assert memory.size >= mmap.PAGESIZE


def test_as_an_array_of_numpy() -> None:
    """``numpy.asarray`` gives the same pages, and a copy only where one is needed."""
    with SharedMemory.zeros(8) as memory:
        array = np.asarray(memory)
        array[0] = 7
        assert (array.dtype, memory[0]) == (np.dtype("u1"), 7)
        assert np.asarray(memory, dtype="u2")[0] == 7
        np.array(memory)[0] = 9
        assert memory[0] == 7
