"""Servers of many clients, fit to be a service: who is let in, who is heard first, and what nobody can hold up."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest

from mp_ipcchan import (
    Disconnected,
    Empty,
    EndpointClosed,
    Fd,
    OneShotServer,
    Peer,
    Receiver,
    ReceiverGone,
    SerializationError,
    Server,
    channel,
    connect,
    peer_of,
)
from mp_ipcchan._transport import unix

from ..conformance._support import LIMIT, InThread, attempts, bare_fork, calling_often, open_descriptors, room_for
from ._support import context_of, finish, program, started

#: Users that nobody is; that they have no name doesn't matter.
STRANGER, OTHER = 54321, 54322

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def become(uid: int) -> None:
    """Be that user from here on."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def greet(name: str, word: object) -> None:
    with connect(name, LIMIT) as tx:
        tx.send(word)


def next_word(server: Server) -> object:
    """The first message of the next client, which is seen off."""
    rx, word = server.accept(LIMIT)
    rx.close()
    return word


def check_works(server: Server) -> None:
    greet(server.name, "hello")
    assert next_word(server) == "hello"


# -- clients -------------------------------------------------------------------------------


def test_many_clients_one_after_another() -> None:
    """``accept`` again and again, with each client's later messages on its own receiver."""
    with Server() as server, ExitStack() as clients:
        for number in range(10):
            tx = clients.enter_context(connect(server.name, LIMIT))
            tx.send_many([number, "more"])
            rx, first = server.accept(LIMIT)
            with rx:
                assert (first, rx.recv(LIMIT)) == (number, "more")


def test_typed(caplog: pytest.LogCaptureFixture) -> None:
    """Messages are held against the server's type on both sides; a stranger's pickle is never looked into."""
    with Server(type=dict[str, int]) as server:
        with connect(server.name, LIMIT, type=dict[str, int]) as tx:
            with pytest.raises(SerializationError):
                tx.send({"a": "one"})  # type: ignore[dict-item]
            tx.send({"a": 1})
            receiver, first = server.accept(LIMIT)
            assert first == {"a": 1}
            with receiver, connect(server.name, LIMIT) as stranger:
                stranger.send({"a": 1})
                with pytest.raises(Empty):
                    server.accept(0.05)
                tx.send({"b": 2})
                assert receiver.recv(LIMIT) == {"b": 2}
                with pytest.raises(ReceiverGone):
                    stranger.send({"a": 1})
    assert "dropped a client" in caplog.text


def test_typed_one_shot() -> None:
    with OneShotServer(type=list[int]) as server, connect(server.name, LIMIT, type=list[int]) as tx:
        tx.send([1])
        receiver, first = server.accept(LIMIT)
        with receiver:
            assert first == [1]


def test_who_speaks_first_is_served_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is heard as it comes is not ahead of one who came before and has spoken just before it."""
    accept = unix.accept

    def speak_and_accept(*args: Any) -> None:
        # Between the look at those who were silent and the one at the door.
        if not early.closed:
            early.send("early")
            early.close()
            greet(server.name, "late")
        accept(*args)

    with Server() as server, connect(server.name) as early:
        with pytest.raises(Empty):
            server.accept(0)
        monkeypatch.setattr(unix, "accept", speak_and_accept)
        for expected in ("early", "late"):
            rx, word = server.accept(LIMIT)
            rx.close()
            assert word == expected


def test_silent_client_holds_nobody_up() -> None:
    """Whoever speaks first is served first, however long others have been there."""
    with Server() as server, ExitStack() as clients:
        senders = [clients.enter_context(connect(server.name, LIMIT)) for _ in range(5)]
        with pytest.raises(Empty):
            server.accept(0)
        for number in (3, 0, 4, 1, 2):
            senders[number].send(number)
            assert next_word(server) == number


def test_order_of_those_who_have_spoken() -> None:
    """Who is in already is heard in the order of speaking."""
    with Server() as server, ExitStack() as clients:
        senders = [clients.enter_context(connect(server.name, LIMIT)) for _ in range(20)]
        with pytest.raises(Empty):
            server.accept(0)
        order = Random(1).sample(range(20), 20)
        for number in order:
            senders[number].send(number)
        assert [next_word(server) for _ in range(20)] == order


def test_clients_that_leave_without_a_word() -> None:
    """They are seen off unnoticed: ``Empty`` if nobody else comes, and no descriptor is left."""
    with Server() as server:
        with pytest.raises(Empty):
            server.accept(0)
        before = open_descriptors()
        for _ in range(100):
            connect(server.name, LIMIT).close()
        with pytest.raises(Empty):
            server.accept(0)
        assert open_descriptors() == before
        check_works(server)


class Bomb:
    """Can be sent, but not received."""

    def __reduce__(self) -> object:
        return int, ("not a number",)


def test_client_that_talks_nonsense(caplog: pytest.LogCaptureFixture) -> None:
    """It is dropped and the log tells; the others don't notice."""
    with Server() as server, connect(server.name, LIMIT) as tx:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw, caplog.at_level(logging.WARNING):
            raw.connect(server.name)
            raw.send(b"GET / HTTP/1.1")
            tx.send(Bomb())
            greet(server.name, "hello")
            assert next_word(server) == "hello"
        assert [str(os.getpid()) in record.getMessage() for record in caplog.records] == [True, True]
        assert any("not a number" in record.getMessage() for record in caplog.records)
        # A line each: strangers must not fill the log.
        assert not any(record.exc_info or "\n" in record.getMessage() for record in caplog.records)
        with pytest.raises(ReceiverGone):
            tx.send("again")


def test_one_client_that_talks_nonsense() -> None:
    """Of a one-shot server it is the client, so ``accept`` says so; it may say something better."""
    with OneShotServer() as server, connect(server.name, LIMIT) as tx:
        tx.send_many([Bomb(), "hello"])
        with pytest.raises(SerializationError):
            server.accept(LIMIT)
        rx, first = server.accept(LIMIT)
        rx.close()
        assert first == "hello"


def test_patience() -> None:
    """A client that stays silent for longer is dropped, while others are let in; who has spoken in time is served."""
    with Server(patience=0.05) as server, connect(server.name, LIMIT) as silent:
        with pytest.raises(Empty):
            server.accept(0.2)
        with pytest.raises(ReceiverGone):
            silent.send("too late")
        with connect(server.name, LIMIT) as late:
            with pytest.raises(Empty):
                server.accept(0)
            late.send("in time")
            threading.Event().wait(0.1)
            assert next_word(server) == "in time"


@pytest.mark.parametrize("patience", [-1, float("nan")])
def test_impossible_patience(patience: float) -> None:
    with pytest.raises(ValueError, match="number of seconds"):
        Server(patience=patience)


def test_several_threads_accept() -> None:
    """Each client is given to one of them."""
    with Server() as server:
        threads = [InThread(lambda: [next_word(server) for _ in range(50)]) for _ in range(4)]
        for number in range(200):
            greet(server.name, number)
        words = [word for thread in threads for word in thread.result()]
        assert sorted(map(int, map(str, words))) == list(range(200))


def test_selector() -> None:
    """A server is a member of a selector: it is readable when ``accept(0)`` has something to do."""
    with Server() as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        assert selector.select(0) == []
        with connect(server.name, LIMIT) as tx:
            assert selector.select(LIMIT)
            with pytest.raises(Empty):
                server.accept(0)
            assert selector.select(0) == []
            tx.send("hello")
            assert selector.select(LIMIT)
            rx, _ = server.accept(0)
            with rx:
                assert selector.select(0) == []


# -- the end -------------------------------------------------------------------------------


def test_closed_server() -> None:
    """It accepts nobody, lets its clients know, and has its name left to read; closing twice does nothing."""
    server = Server()
    with connect(server.name, LIMIT) as heard, connect(server.name, LIMIT) as silent, connect(server.name) as waiting:
        heard.send("hello")
        rx, _ = server.accept(LIMIT)
        with pytest.raises(Empty):
            server.accept(0)
        name = server.name
        server.close()
        server.close()
        assert server.closed
        assert server.name == name
        for call in (server.accept, server.fileno):
            with pytest.raises(EndpointClosed):
                call()
        assert list(server) == []
        for tx in (silent, waiting):
            with pytest.raises(ReceiverGone):
                tx.send("nobody")
        with pytest.raises(OSError, match="nobody serves"):
            connect(name)
        with rx:
            heard.send("still served")
            assert rx.recv(LIMIT) == "still served"


@pytest.mark.parametrize("make", [Server, OneShotServer])
def test_close_ends_a_wait(make: type[Server | OneShotServer]) -> None:
    """``close`` in another thread ends ``accept``, with a silent client or without."""
    for silent in (False, True):
        server = make()
        with ExitStack() as clients:
            if silent:
                clients.enter_context(connect(server.name, LIMIT))
                with pytest.raises(Empty):
                    server.accept(0)
            waiting = InThread(server.accept)
            while not server._waiting:
                pass
            server.close()
            with pytest.raises(EndpointClosed):
                waiting.result()


def test_handler_closes_the_server() -> None:
    """A service ends its loop from a signal's handler."""
    server = Server()
    previous = signal.signal(signal.SIGUSR1, lambda *_: server.close())
    try:
        words = []
        greet(server.name, "hello")
        for rx, word in server:
            rx.close()
            words.append(word)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        assert words == ["hello"]
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert not os.path.lexists(server.name)


def test_handler_closes_a_busy_server() -> None:
    """At whatever moment: the loop ends, and nothing else comes of it."""
    previous = signal.getsignal(signal.SIGALRM)
    done = threading.Event()

    def come(name: str) -> None:
        while not done.is_set():
            try:
                greet(name, "hello")
            except OSError:
                return

    try:
        for number in range(50):
            server = Server()
            done.clear()
            signal.signal(signal.SIGALRM, lambda *_: server.close())  # noqa: B023
            coming = InThread(come, server.name)
            signal.setitimer(signal.ITIMER_REAL, 0.001 + number / 25_000)
            for rx, _ in server:
                rx.close()
            done.set()
            coming.result()
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_server_that_is_forgotten() -> None:
    """Dropped unclosed, it leaves nothing behind."""
    before = open_descriptors()
    server = Server()
    name = server.name
    with connect(name, LIMIT):
        with pytest.raises(Empty):
            server.accept(0)
        del server
        gc.collect()
    assert open_descriptors() == before
    assert not os.path.lexists(os.path.dirname(name))


def test_a_forked_child_holds_nothing() -> None:
    """Its copy is closed: when the parent's is, clients hear of it, though the child lives."""
    server = Server()
    ready, go = channel(), channel()
    with connect(server.name, LIMIT) as silent:
        with pytest.raises(Empty):
            server.accept(0)

        def live_on() -> None:
            assert server.closed
            with pytest.raises(EndpointClosed):
                server.accept(0)
            server.close()
            ready[0].send("ready")
            go[1].recv(LIMIT)

        with bare_fork(live_on) as child:
            assert ready[1].recv(LIMIT) == "ready"
            check_works(server)
            server.close()
            with pytest.raises(ReceiverGone):
                silent.send("nobody")
            with pytest.raises(OSError, match="nobody serves"):
                connect(server.name, LIMIT)
            go[0].send("go")
            assert child.join() == 0
    for end in (*ready, *go):
        end.close()


# -- names ---------------------------------------------------------------------------------


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, also a relative one in a process that moves on; an abstract address; one of its own."""
    monkeypatch.chdir(tmp_path)
    for given, name in (
        (tmp_path / "path", str(tmp_path / "path")),
        ("relative", str(tmp_path / "relative")),
        (f"@ipcchan-test-{os.getpid()}", f"@ipcchan-test-{os.getpid()}"),
    ):
        with Server(given) as server:
            monkeypatch.chdir("/")
            assert server.name == name
            assert f"{name}>" in repr(server)
            check_works(server)
            monkeypatch.chdir(tmp_path)
        with pytest.raises(ConnectionRefusedError if name.startswith("@") else FileNotFoundError):
            connect(name, LIMIT)
    assert list(tmp_path.iterdir()) == []


def test_permissions_of_a_name(tmp_path: Path) -> None:
    """Only this user may enter, unless others are to be let in."""
    with Server(tmp_path / "own") as own, Server(tmp_path / "open", allow={STRANGER}) as others, Server() as fresh:
        modes = [os.stat(path).st_mode & 0o777 for path in (own.name, others.name, os.path.dirname(fresh.name))]
        assert modes == [0o600, 0o666, 0o700]
    with Server(allow={STRANGER}) as server:
        assert os.stat(os.path.dirname(server.name)).st_mode & 0o777 == 0o711


@pytest.mark.parametrize("abstract", [False, True])
def test_name_of_a_live_server(abstract: bool, tmp_path: Path) -> None:
    """``EADDRINUSE``, and the live one doesn't notice: no client seems to come."""
    name = f"@ipcchan-test-{os.getpid()}" if abstract else str(tmp_path / "socket")
    with Server(name) as server:
        for _ in range(3):
            with pytest.raises(OSError, match="alive") as caught:
                Server(name)
            assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(Empty):
            server.accept(0)
        assert not select.select([server], [], [], 0)[0]
        check_works(server)


def test_name_of_something_else(tmp_path: Path) -> None:
    """What no server of ours has left is not touched, nor is the socket of another program that lives."""
    path = tmp_path / "socket"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        Server(path)
    assert path.read_text() == "precious"
    path.unlink()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        Server(tmp_path / "elsewhere")
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as theirs:
            theirs.bind(str(path))
            with pytest.raises(OSError, match="alive"):
                Server(path)
        with Server(path) as server:
            check_works(server)


SERVICE = """
import sys
from mp_ipcchan import Server
with Server(sys.argv[1] if sys.argv[1:] else None) as server:
    print(server.name, flush=True)
    for rx, first in server:
        rx.close()
"""


def test_killed_server_is_succeeded(tmp_path: Path) -> None:
    """What it has left at a chosen path is taken over, however often; while it is dead, ``connect`` refuses."""
    name = str(tmp_path / "socket")
    for _ in range(2):
        with program(tmp_path / "service.py", SERVICE, name) as service:
            assert service.stdout is not None
            assert service.stdout.readline().strip() == name
            service.kill()
            service.wait()
        assert os.path.lexists(name)
        with pytest.raises(ConnectionRefusedError, match="nobody serves"):
            connect(name, LIMIT)
    with Server(name) as server:
        check_works(server)
    assert not os.path.lexists(name)


def test_killed_server_is_cleaned_up_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has left at a path of its own goes when the next program makes a server; live ones are left alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with OneShotServer() as alive, program(tmp_path / "service.py", SERVICE) as service:
        assert service.stdout is not None
        name = service.stdout.readline().strip()
        service.kill()
        service.wait()
        assert os.path.lexists(name)
        with program(
            tmp_path / "next.py", SERVICE.replace("for rx, first in server:", "for rx, _ in ():")
        ) as successor:
            finish(successor)
        assert not os.path.lexists(os.path.dirname(name))
        greet(alive.name, "hello")
        alive.accept(LIMIT)[0].close()


def test_many_start_at_a_dead_name(tmp_path: Path) -> None:
    """Exactly one takes over, whatever they do at the same time."""
    name = str(tmp_path / "socket")
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(name)
        start = threading.Barrier(4)

        def compete(start: threading.Barrier = start) -> Server | None:
            start.wait(LIMIT)
            try:
                return Server(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return None

        servers = [one.result() for one in [InThread(compete) for _ in range(4)]]
        [winner] = [server for server in servers if server is not None]
        with winner:
            check_works(winner)


def test_name_that_was_taken_away(tmp_path: Path) -> None:
    """Where somebody has removed the file, its place may be another's, which is left alone."""
    path = tmp_path / "socket"
    with Server(path) as old:
        path.unlink()
        with Server(path) as new:
            old.close()
            check_works(new)


def test_directory_that_others_may_write_to(tmp_path: Path) -> None:
    """They could take the name's place, so it is refused: wherever on the path, and with a sticky bit, too."""
    outer = tmp_path / "outer"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    for directory, mode in ((inner, 0o777), (inner, 0o770), (inner, 0o1777), (outer, 0o777)):
        directory.chmod(mode)
        with pytest.raises(PermissionError, match=r"private directory.*" + directory.name):
            Server(inner / "socket")
        directory.chmod(0o755)
    outer.chmod(0o1777)
    with Server(inner / "socket") as server:
        check_works(server)
    outer.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(inner, STRANGER, STRANGER)
        with pytest.raises(PermissionError, match="another user"):
            Server(inner / "socket")
    assert list(inner.iterdir()) == []


def test_names_that_cannot_be(tmp_path: Path) -> None:
    """Too long, in no directory, or no name at all: an ``OSError`` that says so, and nothing is left open."""
    (tmp_path / "file").touch()
    before = open_descriptors()
    for name, word in (
        (str(tmp_path / ("x" * 108)), "at most 107"),
        ("@" + "x" * 108, "at most 107"),
        (str(tmp_path / "missing" / "socket"), "make the directory first"),
        (str(tmp_path / "file" / "socket"), "make the directory first"),
        ("", "path"),
        ("@", "path"),
        ("a\0b", "path"),
    ):
        with pytest.raises(OSError, match=word):
            Server(name)
        with pytest.raises(OSError, match=r".+"):
            connect(name, LIMIT)
    assert open_descriptors() == before
    longest = "@ipcchan-".ljust(108, "x")
    with Server(longest) as server:
        check_works(server)


# -- users ---------------------------------------------------------------------------------


def test_peer() -> None:
    """The kernel tells who connected, and who serves."""
    with Server() as server, connect(server.name, LIMIT) as tx:
        tx.send(1)
        rx, _ = server.accept(LIMIT)
        with rx:
            assert peer_of(rx) == peer_of(tx) == Peer(os.getpid(), os.geteuid(), os.getegid())
        with pytest.raises(EndpointClosed):
            peer_of(rx)


def stay_out(name: str, uid: int) -> None:
    """Another user can't enter the directory, or is dropped before what it says is looked at."""
    become(uid)
    if not name.startswith("@"):
        with pytest.raises(PermissionError, match="may not connect"):
            connect(name, LIMIT)
        return
    with connect(name, LIMIT, allow={0}) as tx, pytest.raises(ReceiverGone):
        for _ in attempts():
            tx.send(Bomb())


@as_root
@pytest.mark.parametrize("abstract", [False, True])
def test_another_user(abstract: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Is refused."""
    with Server(f"@ipcchan-test-{os.getpid()}" if abstract else None) as server:
        with bare_fork(lambda: stay_out(server.name, STRANGER)) as child:
            while not select.select([child_fd := os.pidfd_open(child.pid)], [], [], 0.01)[0]:
                os.close(child_fd)
                with pytest.raises(Empty):
                    server.accept(0)
            os.close(child_fd)
            assert child.join() == 0
        assert not caplog.records
        check_works(server)


@as_root
@pytest.mark.parametrize("abstract", [False, True])
def test_user_who_is_allowed(abstract: bool) -> None:
    """Is let in beside this one; a third is not."""
    name = f"@ipcchan-test-{os.getpid()}" if abstract else None

    def come(uid: int) -> None:
        become(uid)
        with connect(server.name, LIMIT) as tx:
            tx.send(uid)

    with Server(name, allow={STRANGER}) as server:
        for uid in (OTHER, STRANGER, 0):
            with bare_fork(lambda: come(uid)) as child:  # noqa: B023
                assert child.join() == 0
        uids = []
        for uid in (STRANGER, 0):
            rx, said = server.accept(LIMIT)
            uids.append(peer_of(rx).uid)
            rx.close()
            assert said == uid
        assert uids == [STRANGER, 0]
        with pytest.raises(Empty):
            server.accept(0)


@as_root
def test_function_that_allows() -> None:
    """It is asked about everybody, with what the kernel says."""
    asked: list[Peer] = []

    def allow(pid: int, uid: int, gid: int) -> bool:
        asked.append(Peer(pid, uid, gid))
        return uid != 0

    def come() -> None:
        become(STRANGER)
        greet(server.name, os.getpid())

    with Server(allow=allow) as server, connect(server.name, LIMIT) as tx:
        with pytest.raises(Empty):
            server.accept(0)
        with pytest.raises(ReceiverGone):
            tx.send("refused")
        with bare_fork(come) as child:
            assert next_word(server) == child.pid
            assert child.join() == 0
        assert asked == [Peer(os.getpid(), 0, os.getegid()), Peer(child.pid, STRANGER, STRANGER)]


def test_function_that_fails() -> None:
    """Its error is the server's, whose client is refused."""

    def allow(pid: int, uid: int, gid: int) -> bool:
        raise LookupError("who is that?")

    with Server(allow=allow) as server, connect(server.name, LIMIT) as tx:
        with pytest.raises(LookupError):
            server.accept(LIMIT)
        with pytest.raises(ReceiverGone):
            tx.send("refused")
    for wrong in (1000, "root", ["root"]):
        with pytest.raises(TypeError, match="allow"):
            Server(allow=wrong)  # type: ignore[arg-type]


@as_root
def test_abstract_name_of_another_user() -> None:
    """Anybody could have taken it, so ``connect`` doesn't trust who has, unless told to."""
    name = f"@ipcchan-test-{os.getpid()}"
    ready_tx, ready_rx = channel()

    def serve() -> None:
        become(STRANGER)
        with Server(name, allow=lambda *_: True) as server:
            ready_tx.send("ready")
            assert next_word(server) == "trusted"

    with ready_tx, ready_rx, bare_fork(serve) as child:
        ready_rx.recv(LIMIT)
        with pytest.raises(PermissionError, match=f"uid {STRANGER} .*allow"):
            connect(name, LIMIT)
        with connect(name, LIMIT, allow={STRANGER}) as tx:
            assert peer_of(tx).uid == STRANGER
            tx.send("trusted")
        assert child.join() == 0


# -- namespaces ----------------------------------------------------------------------------


def unshared(*options: str) -> list[str]:
    """The command that runs another in namespaces of its own; skips the test where that isn't permitted."""
    command = ["unshare", *options]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, timeout=LIMIT)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no namespaces here: {error}")
    return command


def python(*args: str, inside: list[str]) -> str:
    """What a program prints that is run inside of namespaces, and ends well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [*inside, sys.executable, "-c", *args]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=2 * LIMIT
    ).stdout


SAY = "import sys; from mp_ipcchan import connect\nwith connect(sys.argv[1], 30) as tx: tx.send(sys.argv[2])"


def test_client_in_a_container() -> None:
    """A client in process, mount and user namespaces of its own, where this user is root, is this user still."""
    inside = unshared("--user", "--map-root-user", "--pid", "--fork", "--mount")
    with Server() as server:
        python(SAY, server.name, "from inside", inside=inside)
        rx, word = server.accept(LIMIT)
        with rx:
            assert word == "from inside"
            assert peer_of(rx).uid == os.geteuid()


UNKNOWN = """
import os
from mp_ipcchan import Server
try:
    Server()
except PermissionError as error:
    assert "namespace" in str(error)
with Server(allow=lambda pid, uid, gid: pid == os.getpid()) as server:
    from mp_ipcchan import connect
    with connect(server.name) as tx:
        tx.send("hello")
    print(server.accept(30)[1])
"""


def test_server_whose_user_has_no_number() -> None:
    """In such a namespace everybody looks like the server's user, so it says at once that it can't tell."""
    assert python(UNKNOWN, inside=unshared("--user")) == "hello\n"


SERVE = """
import sys
from mp_ipcchan import Empty, Server
with Server(sys.argv[1], allow={65534}) as server:
    print(flush=True)
    while sys.stdin.readline():
        try:
            print(server.accept(0)[1], flush=True)
        except Empty:
            print("nobody", flush=True)
"""


@as_root
def test_client_whose_user_has_no_number() -> None:
    """It looks like the user "nobody" to a server in a namespace that doesn't know it, and is not taken for that."""
    name = f"@ipcchan-test-{os.getpid()}"
    inside = unshared("--user", "--map-root-user")

    def come() -> None:
        become(STRANGER)
        connect(name, LIMIT, allow={0}).close()

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [*inside, sys.executable, "-c", SERVE, name],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as service:
        assert service.stdin is not None
        assert service.stdout is not None
        service.stdout.readline()

        def ask() -> str:
            service.stdin.write("\n")  # type: ignore[union-attr]
            service.stdin.flush()  # type: ignore[union-attr]
            return service.stdout.readline().strip()  # type: ignore[union-attr]

        def stay_out() -> None:
            become(STRANGER)
            with connect(name, LIMIT, allow={0}) as tx, pytest.raises(ReceiverGone):
                tx.send("hello")
                asked_tx.send("ask")
                for _ in attempts():
                    tx.send("hello")

        asked_tx, asked_rx = channel()
        with asked_tx, asked_rx, bare_fork(stay_out) as child:
            asked_rx.recv(LIMIT)
            assert ask() == "nobody"
            assert child.join() == 0
        greet(name, "root")
        assert ask() == "root"
        service.stdin.close()
        assert service.wait(LIMIT) == 0


# -- limits --------------------------------------------------------------------------------


def test_no_descriptors_left() -> None:
    """Clients wait until there are some; ``accept`` with a timeout says what is missing. Nobody is lost."""
    with Server() as server, ExitStack() as clients:
        with pytest.raises(Empty):
            server.accept(0)
        senders = [clients.enter_context(connect(server.name, LIMIT)) for _ in range(6)]
        with room_for(2):
            for timeout in (0, 0.06):
                with pytest.raises(OSError, match="no descriptor for it") as caught:
                    server.accept(timeout)
                assert caught.value.errno == errno.EMFILE
            # Two are in. Each that is heard and leaves makes room for another.
            for number, tx in enumerate(senders):
                tx.send(number)
            words = [next_word(server) for _ in senders]
            assert sorted(map(int, map(str, words))) == list(range(6))
        check_works(server)


def test_no_descriptors_for_what_a_client_brings() -> None:
    """It waits to be received whole, while others are heard."""
    with Server() as server, ExitStack() as stack:
        tx = stack.enter_context(connect(server.name, LIMIT))
        other = stack.enter_context(connect(server.name, LIMIT))
        with pytest.raises(Empty):
            server.accept(0)
        with open(os.devnull) as file:
            brought = [stack.enter_context(Fd(file)) for _ in range(5)]
        tx.send(brought)
        with room_for(2):
            with pytest.raises(OSError, match="more descriptors"):
                server.accept(0)
            other.send("light")
            assert next_word(server) == "light"
            with pytest.raises(OSError, match="more descriptors"):
                server.accept(0)
        rx, received = server.accept(LIMIT)
        with rx:
            assert len(received) == 5
            for one in received:
                one.close()


def test_full_queue(tmp_path: Path) -> None:
    """``connect`` waits for room, through signals; in time there is some, or ``TimeoutError``."""
    name = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, ExitStack() as stack:
        listener.bind(name)
        listener.listen(0)
        stack.enter_context(connect(name, LIMIT))
        with calling_often(lambda: None):
            for timeout in (0, 0.05):
                with pytest.raises(TimeoutError, match="no room"):
                    connect(name, timeout)
            for timeout in (LIMIT, None):
                room = threading.Timer(0.05, lambda: stack.enter_context(listener.accept()[0]))
                room.start()
                with connect(name, timeout) as tx:
                    tx.send("connected for good")
                    room.join()
                with pytest.raises(TimeoutError):
                    connect(name, 0)


# -- those who die -------------------------------------------------------------------------


def leave_at_random(name: str, seed: int) -> None:
    """Connect again and again; be silent, speak, or end in the middle of it."""
    random = Random(seed)
    senders = []
    for number in range(40):
        tx = connect(name, LIMIT)
        senders.append(tx)
        if random.random() < 0.7:
            tx.send((seed, number))
        if random.random() < 0.3:
            senders.pop(random.randrange(len(senders))).close()
    os.kill(os.getpid(), signal.SIGKILL)


def test_clients_that_connect_and_die_at_random() -> None:
    """Everybody who has spoken is accepted, once; the rest leave no trace."""
    crowd = 50
    spoken = {
        (seed, number)
        for seed in range(crowd)
        for random in [Random(seed)]
        for number, says in enumerate(_who_speaks(random))
        if says
    }
    with Server() as server:
        check_works(server)
        before = open_descriptors()

        def attack() -> None:
            for first in range(0, crowd, 10):
                with ExitStack() as stack:
                    seeds = range(first, first + 10)
                    children = [
                        stack.enter_context(bare_fork(lambda s=seed: leave_at_random(server.name, s))) for seed in seeds
                    ]  # type: ignore[misc]
                    for child in children:
                        assert child.join() == -9

        attacking = InThread(attack)
        heard = set()
        for _ in spoken:
            rx, first = server.accept(LIMIT)
            rx.close()
            assert first not in heard
            heard.add(first)
        attacking.result()
        assert heard == spoken
        with pytest.raises(Empty):
            server.accept(0)
        assert open_descriptors() == before


def _who_speaks(random: Random) -> Iterator[bool]:
    """The choices that ``leave_at_random`` makes."""
    open_ones = 0
    for _ in range(40):
        open_ones += 1
        yield random.random() < 0.7
        if random.random() < 0.3:
            random.randrange(open_ones)
            open_ones -= 1


def say_nothing() -> None:
    """A child that ends without having connected."""


@pytest.mark.parametrize("make", [Server, OneShotServer])
def test_process_that_dies_instead_of_coming(make: type[Server | OneShotServer], start_method: str) -> None:
    """``accept`` that watches it ends with it."""
    with make() as server, started(context_of(start_method), say_nothing) as process:
        with pytest.raises(Disconnected, match="has ended"):
            server.accept(LIMIT, process=process)
        assert not server.closed


def test_process_that_comes_and_dies() -> None:
    """What it said before counts, however dead it is; a program can be watched, too."""
    with OneShotServer() as server, started(context_of("fork"), greet, server.name, "last words") as process:
        process.join()
        rx, word = server.accept(LIMIT, process=process)
        rx.close()
        assert word == "last words"
    with Server() as server:
        for code in ("", "raise SystemExit(3)"):
            with subprocess.Popen([sys.executable, "-S", "-c", code]) as silent:
                for _ in range(2):
                    with pytest.raises(Disconnected, match="has ended"):
                        server.accept(LIMIT, process=silent)
                    silent.wait()
        with pytest.raises(ValueError, match="not been started"):
            server.accept(0, process=context_of("fork").Process())  # type: ignore[attr-defined]
        with pytest.raises(TypeError, match="process"):
            server.accept(0, process=os.getpid())  # type: ignore[arg-type]


class Interrupted(Exception):
    """What the handler raises."""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 looks for signals where a function returns")
def test_handler_that_raises_loses_nobody() -> None:
    """Whatever ``accept`` was doing, the next one gives out who has spoken."""
    count = 2000
    inside = False

    def interrupt() -> None:
        # What is raised in a finaliser goes nowhere.
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_name not in ("__del__", "remove", "_remove"):
            frame = frame.f_back
        if inside and frame is None:
            raise Interrupted

    def come() -> None:
        for number in range(count):
            greet(server.name, number)

    with Server() as server:
        coming = InThread(come)
        heard: list[object] = []
        interruptions = 0
        with calling_often(interrupt, 0.0007):
            for _ in attempts():
                guest = None
                try:
                    inside = True
                    guest = server.accept(LIMIT)
                    inside = False
                except Interrupted:
                    inside = False
                    interruptions += 1
                if guest is not None:
                    heard.append(guest[1])
                    guest[0].close()
                if len(heard) == count:
                    break
        coming.result()
        assert heard == list(range(count))
        assert interruptions


# -- in coroutines -------------------------------------------------------------------------


async def serve_some(server: Server, count: int) -> list[object]:
    words = []
    async for rx, first in server:
        rx.close()
        words.append(first)
        if len(words) == count:
            server.close()
    return words


def test_async_for() -> None:
    """On asyncio, until the server is closed."""
    with Server() as server:
        clients = InThread(lambda: [greet(server.name, number) for number in range(100)])
        words = asyncio.run(asyncio.wait_for(serve_some(server, 100), LIMIT))
        assert words == list(range(100))
        clients.result()


def test_async_cancelled() -> None:
    """A coroutine that was cancelled has taken nobody with it; several may wait; closing ends their wait."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with Server() as server:
            for number in range(50):
                waiting = asyncio.ensure_future(server.accept_async())
                await asyncio.sleep(0)
                await loop.run_in_executor(None, greet, server.name, number)
                waiting.cancel()
                try:
                    rx, first = await waiting
                except asyncio.CancelledError:
                    rx, first = await asyncio.wait_for(server.accept_async(), LIMIT)
                rx.close()
                assert first == number
            several = [asyncio.ensure_future(server.accept_async()) for _ in range(3)]
            await asyncio.sleep(0)
            greet(server.name, "one")
            done, rest = await asyncio.wait(several, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()[0].close()
            assert (len(done), len(rest)) == (1, 2)
            server.close()
            for ended in await asyncio.gather(*rest, return_exceptions=True):
                assert isinstance(ended, EndpointClosed)

    asyncio.run(main())


def test_trio() -> None:
    """On trio."""
    trio = pytest.importorskip("trio")

    async def main() -> list[object]:
        with trio.fail_after(LIMIT), Server() as server:
            with trio.move_on_after(0.01):
                await server.accept_async()
            coming = InThread(lambda: [greet(server.name, word) for word in "abc"])
            words = await serve_some(server, 3)
            coming.result()
            return words

    assert trio.run(main) == ["a", "b", "c"]


def test_one_shot_async() -> None:
    """A one-shot server, too."""

    async def main() -> tuple[Receiver[object], object]:
        with OneShotServer() as server:
            loop = asyncio.get_running_loop()
            coming = loop.run_in_executor(None, greet, server.name, "hello")
            guest = await asyncio.wait_for(server.accept_async(), LIMIT)
            await coming
            assert server.closed
            return guest

    rx, first = asyncio.run(main())
    rx.close()
    assert first == "hello"
