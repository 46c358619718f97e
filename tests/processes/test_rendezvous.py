"""Programs that don't know each other meet by a name; and a default timeout for sockets disturbs nothing."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from mp_ipcchan import (
    Disconnected,
    Empty,
    EndpointClosed,
    Fd,
    OneShotServer,
    Pipe,
    Queue,
    ReceiverGone,
    channel,
    connect,
)

from ..conformance._support import LIMIT, InThread, pattern
from ._support import context_of, finish, program, started

SERVER = """
from mp_ipcchan import OneShotServer, channel
with OneShotServer() as server:
    print(server.name, flush=True)
    rx, (first, tx) = server.accept(30)
    assert first == "hello"
    mine, mine_rx = channel()
    tx.send(mine)
    mine.close()
    with rx, tx, mine_rx:
        assert list(rx) == list(range(1000))
        assert mine_rx.recv(30) == "by the server's own channel"
        tx.send("goodbye")
"""

CLIENT = """
import sys
from mp_ipcchan import channel, connect
tx = connect(sys.argv[1], 30)
back, rx = channel()
tx.send(("hello", back))
back.close()
with rx.recv(30) as theirs:
    tx.send_many(range(1000))
    tx.close()
    theirs.send("by the server's own channel")
assert list(rx) == ["goodbye"]
"""


def test_two_programs(tmp_path: Path) -> None:
    """Two programs, a name on a command line, and channels both ways from there on."""
    with program(tmp_path / "server.py", SERVER) as server:
        assert server.stdout is not None
        name = server.stdout.readline().strip()
        with program(tmp_path / "client.py", CLIENT, name) as client:
            finish(client)
        finish(server)
    assert not os.path.lexists(name)
    assert not os.path.lexists(os.path.dirname(name))


def test_accept_timeout() -> None:
    """Nobody in time is ``Empty``, and the server still serves."""
    with OneShotServer() as server:
        for timeout in (0, 0.01, -1):
            with pytest.raises(Empty):
                server.accept(timeout)
        with connect(server.name, LIMIT) as tx:
            tx.send("late")
        rx, first = server.accept(LIMIT)
        with rx:
            assert first == "late"


def test_silent_client() -> None:
    """A client that says nothing is waited for no longer than was asked, and may speak later."""
    with OneShotServer() as server, connect(server.name, LIMIT) as tx:
        for _ in range(3):
            with pytest.raises(Empty):
                server.accept(0.01)
        tx.send("at last")
        rx, first = server.accept(LIMIT)
        with rx:
            assert first == "at last"
            tx.send("more")
            assert rx.recv(LIMIT) == "more"


def test_client_that_leaves_without_a_word() -> None:
    """It is ``Disconnected`` that tells."""
    with OneShotServer() as server:
        connect(server.name, LIMIT).close()
        with pytest.raises(Disconnected):
            server.accept(LIMIT)


def test_silent_client_and_a_server_that_closes() -> None:
    """A server that is closed lets its silent client know, and has no name left."""
    server = OneShotServer()
    with connect(server.name, LIMIT) as tx:
        with pytest.raises(Empty):
            server.accept(0.01)
        server.close()
        with pytest.raises(EndpointClosed):
            server.accept(0.01)
        with pytest.raises(ReceiverGone):
            tx.send("nobody")


def test_client_that_was_never_accepted() -> None:
    """So does one that has accepted nobody."""
    server = OneShotServer()
    with connect(server.name, LIMIT) as tx:
        server.close()
        with pytest.raises(ReceiverGone):
            tx.send("nobody")


def test_accept_twice() -> None:
    """A server has one client: ``accept`` is ``EndpointClosed`` the second time, and ``connect`` an ``OSError``."""
    with OneShotServer() as server:
        with connect(server.name, LIMIT) as tx:
            tx.send(1)
        rx, _ = server.accept(LIMIT)
        with rx:
            with pytest.raises(EndpointClosed):
                server.accept(LIMIT)
            with pytest.raises(OSError, match="No such file"):
                connect(server.name, LIMIT)


def test_name_is_removed() -> None:
    """After accept, and after close, there is nothing left of the name; closing twice does nothing."""
    for accepts in (True, False):
        server = OneShotServer()
        assert os.path.exists(server.name)
        if accepts:
            with connect(server.name, LIMIT) as tx:
                tx.send(1)
            server.accept(LIMIT)[0].close()
        else:
            server.close()
        assert not os.path.exists(os.path.dirname(server.name))
        server.close()
        assert server.closed


def test_connect_to_nobody(tmp_path: Path) -> None:
    """A name of nobody, whatever it looks like, is an ``OSError``."""
    (tmp_path / "file").touch()
    for name in (tmp_path / "nothing", tmp_path / "file", tmp_path, tmp_path / ("x" * 200)):
        with pytest.raises(OSError, match=r".+"):
            connect(str(name), LIMIT)
    with pytest.raises(OSError, match=r".+"):
        connect("", LIMIT)


def test_connect_to_a_dead_name(tmp_path: Path) -> None:
    """A socket file whose server is gone refuses."""
    name = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
    with pytest.raises(ConnectionRefusedError):
        connect(name, LIMIT)


def test_connect_timeout(tmp_path: Path) -> None:
    """A server whose queue is full is waited for no longer than was asked."""
    name = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen(0)
        with connect(name, LIMIT):
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                connect(name, 0.05)
            assert 0.04 < time.monotonic() - start < LIMIT


def test_long_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the temporary directory's path is too long for a socket, the name is elsewhere, and is removed, too."""
    directory = tmp_path / ("long" * 25)
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    with OneShotServer() as server:
        with connect(server.name, LIMIT) as tx:
            tx.send(1)
        rx, _ = server.accept(LIMIT)
        rx.close()
    assert not os.path.lexists(os.path.dirname(server.name))
    assert not list(directory.iterdir())


def test_directory_is_private() -> None:
    """Nobody else can look at the name."""
    with OneShotServer() as server:
        assert os.stat(os.path.dirname(server.name)).st_mode & 0o777 == 0o700


def leave_by_name(name: str) -> None:
    with connect(name, LIMIT) as tx:
        tx.send(os.getpid())


def test_child_leaves_the_name_to_its_parent(start_method: str) -> None:
    """A child that ends, forked with the server in it, doesn't take the name away."""
    with OneShotServer() as server:
        with started(context_of(start_method), os.getpid):
            pass
        assert os.path.exists(server.name)
        with started(context_of(start_method), leave_by_name, server.name) as client:
            rx, pid = server.accept(LIMIT)
            assert pid == client.pid
            rx.close()


@pytest.fixture
def _default_timeout() -> Iterator[None]:
    socket.setdefaulttimeout(0.01)
    yield
    socket.setdefaulttimeout(None)


def echo_late(rx: object, tx: object, queue: object, connection: object) -> None:
    """Answer by each way, later than the timeout."""
    socket.setdefaulttimeout(0.01)
    for message in rx:  # type: ignore[attr-defined]
        time.sleep(0.05)
        tx.send(message)  # type: ignore[attr-defined]
    time.sleep(0.05)
    queue.put("late")  # type: ignore[attr-defined]
    time.sleep(0.05)
    connection.send("late")  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_default_timeout")
def test_default_timeout_of_sockets(start_method: str) -> None:
    """Channels, queues, pipes and processes wait as long as they should."""
    context = context_of(start_method)
    tx, moved = channel()
    copied, rx = channel()
    queue: Queue[str] = Queue()
    near, far = Pipe()
    with rx, near, started(context, echo_late, moved, copied, queue, far):
        copied.close()
        far.close()
        big = pattern(200_000)
        with open(os.devnull) as file, Fd(file) as fd, tx:
            for message in (1, big, fd):
                tx.send(message)
            assert rx.recv() == 1
            assert rx.recv(LIMIT) == big
            rx.recv().close()
        assert queue.get() == "late"
        assert near.recv() == "late"
        with pytest.raises(Disconnected):
            rx.recv()
        with pytest.raises(EOFError):
            near.recv()
    queue.close()


@pytest.mark.usefixtures("_default_timeout")
def test_default_timeout_and_servers() -> None:
    """So do servers and clients, and a connection's ``send`` to one who reads late."""

    def come_late(name: str) -> None:
        time.sleep(0.05)
        with connect(name) as tx:
            time.sleep(0.05)
            tx.send("first")
            time.sleep(0.05)
            tx.send("second")

    with OneShotServer() as server:
        client = InThread(lambda: come_late(server.name))
        rx, first = server.accept()
        with rx:
            assert (first, rx.recv()) == ("first", "second")
        client.result()
    near, far = Pipe()
    with near, far:
        writer = InThread(lambda: deque(map(near.send, range(5000)), maxlen=0))
        time.sleep(0.05)
        assert [far.recv() for _ in range(5000)] == list(range(5000))
        writer.result()
