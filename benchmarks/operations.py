"""What a channel costs beside its messages: making it, sending it, waiting for many; and importing all this.

The cases, and their names, follow the benchmarks of ipc-channel, which measures within one process, too.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from multiprocessing import connection
from typing import Any

from .cases import Case, Entry, SkipCaseError, per_call
from .shapes import KiB

_US, _MS = "us", "ms"
_OURS, _PIPE = "channel", "mp.Pipe"


def _ipc() -> Any:
    return importlib.import_module("mp_ipcchan")


def _ctx(name: str) -> Any:
    importlib.import_module("mp_ipcchan")
    return multiprocessing.get_context(name)


def _case(
    name: str, title: str, *entries: Entry, unit: str = _US, group: str = "operations", seconds: float = 0.08
) -> Case:
    return Case(group, name, title, unit, True, entries, seconds)


def _entry(system: str, run: Callable[..., float], *args: object) -> Entry:
    ours = None if system.startswith("mp.") or system == "multiprocessing.pool" else "mp_ipcchan"
    return Entry(system, partial(run, *args), None if ours else system, ours)


# -- making ------------------------------------------------------------------------------------


def _create(make: Callable[[], Any], seconds: float) -> float:
    def once() -> None:
        made = make()
        for end in made if isinstance(made, tuple) else (made,):
            end.close()

    return per_call(seconds, once)


def _creations() -> Iterator[Case]:
    yield _case(
        "create_channel",
        "make a channel and close it",
        _entry(_OURS, _create, lambda: _ipc().channel()),
        _entry(_PIPE, _create, lambda: _ctx("fork").Pipe()),
    )
    for name in ("Pipe", "SimpleQueue", "Queue"):
        yield _case(
            f"create_{name}",
            f"make a {name} and close it",
            _entry(f"ctx.{name}", _create, lambda name=name: getattr(_ctx("ipcchan"), name)()),
            _entry(f"mp.{name}", _create, lambda name=name: getattr(_ctx("fork"), name)()),
        )


def _start_process(method: str, _seconds: float) -> float:
    """Milliseconds until a new process has sent a message back."""
    context = _ctx(method)
    left, right = context.Pipe()
    start = time.perf_counter()
    process = context.Process(target=_say, args=(right,))
    process.start()
    left.recv()
    elapsed = time.perf_counter() - start
    process.join()
    return elapsed * 1e3


def _say(end: Any) -> None:
    end.send(1)


def _starts() -> Iterator[Case]:
    for method in ("fork", "spawn"):
        yield _case(
            f"process_{method}",
            f"start a process ({method}), until its first message",
            _entry("ctx.Process", _start_process, f"ipcchan_{method}"),
            _entry("mp.Process", _start_process, method),
            unit=_MS,
        )


# -- meeting -----------------------------------------------------------------------------------


def _meeting(system: str, key: bytes | None) -> tuple[Callable[[], None], Callable[[], None]]:
    """What a client does, and what the server does for each."""
    if system == "Server":
        server = _ipc().Server()

        def come() -> None:
            with _ipc().connect(server.name) as sender:
                sender.send((1, 2.5, "three"))

        def serve() -> None:
            receiver, _ = server.accept()
            receiver.close()

        _kept.append(server)
        return come, serve

    listener = connection.Listener(family="AF_UNIX", backlog=64, authkey=key)

    def come_to_listener() -> None:
        with connection.Client(listener.address, authkey=key) as client:
            client.send((1, 2.5, "three"))

    def serve_as_listener() -> None:
        with listener.accept() as accepted:
            accepted.recv()

    _kept.append(listener)
    return come_to_listener, serve_as_listener


def _meet(system: str, seconds: float) -> float:
    """Client after client, in the same thread: connects, sends, is accepted, and both close."""
    come, serve = _meeting(system, None)

    def once() -> None:
        # The client is gone before it is accepted, which no server minds.
        come()
        serve()

    return per_call(seconds, once)


def _meet_others(system: str, seconds: float) -> float:
    """The same where the clients are another process's, and the server makes sure who they are."""
    come, serve = _meeting(system, b"secret")

    def come_again_and_again() -> None:
        while True:
            come()

    # It ends with this process.
    _ctx("fork").Process(target=come_again_and_again, daemon=True).start()
    return per_call(seconds, serve)


def _meetings() -> Iterator[Case]:
    yield _case(
        "meet",
        "a client connects, sends, is accepted; both close",
        *(_entry(system, _meet, system) for system in ("Server", "mp.Listener")),
    )
    yield _case(
        "meet_others",
        "the same, clients of another process, which must be who they say (with an authkey)",
        *(_entry(system, _meet_others, system) for system in ("Server", "mp.Listener")),
        seconds=0.3,
    )


# -- sending -----------------------------------------------------------------------------------


def _pair(system: str) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    if system != _PIPE:
        sender, receiver = _ipc().channel()
        return sender.send, receiver.recv
    receiving, sending = _ctx("fork").Pipe(duplex=False)
    return sending.send, receiving.recv


def _transfer(system: str, build: Callable[[str], Any], seconds: float) -> float:
    """Send an object and receive it, again and again; what was received is sent next, as ends that move must be."""
    send, recv = _pair(system)
    obj = build(system)

    def once() -> None:
        nonlocal obj
        send(obj)
        obj = recv()

    return per_call(seconds, once)


_kept: list[Any] = []


def _halves(count: int, which: int) -> Any:
    pairs = [_ipc().channel() for _ in range(count)]
    # The other ends stay open.
    _kept.extend(pair[1 - which] for pair in pairs)
    return [pair[which] for pair in pairs]


def _halves_of_pipes(count: int, which: int) -> Any:
    pairs = [_ctx("fork").Pipe(duplex=False) for _ in range(count)]
    _kept.extend(pair[1 - which] for pair in pairs)
    return [pair[which] for pair in pairs]


def _ends(count: int, sending: bool, system: str) -> Any:
    return _halves(count, 0 if sending else 1) if system == _OURS else _halves_of_pipes(count, 1 if sending else 0)


def _transfers() -> Iterator[Case]:
    def case(name: str, title: str, build: Callable[[str], Any]) -> Case:
        return _case(name, title, *(_entry(system, _transfer, system, build) for system in (_OURS, _PIPE)))

    yield case("transfer_empty", "send and receive None", lambda _: None)
    for what, sending in (("senders", True), ("receivers", False)):
        for count in (0, 1, 8, 64):
            yield case(
                f"transfer_{what}_{count:02}",
                f"send and receive a list of {count} {what} (of the writing, or reading, ends of pipes)",
                partial(_ends, count, sending),
            )
    for name, build in _STRUCTS.items():
        yield _case(
            f"struct_{name}",
            f"send and receive one of 100 random values: {name}",
            *(_entry(system, _round, system, build) for system in (_OURS, _PIPE)),
        )
    for power in range(24):
        yield _case(
            f"transfer_data_{1 << power}",
            f"send and receive {1 << power} bytes",
            _entry("bytes_channel", _transfer_data, "bytes_channel", 1 << power),
            _entry(_PIPE, _transfer_data, _PIPE, 1 << power),
            seconds=0.03,
        )


@dataclass
class _Item:
    key: int
    value: float
    label: str


@dataclass
class _Tree:
    item: _Item
    children: list[_Tree]


def _random_item(dice: random.Random) -> _Item:
    return _Item(dice.randrange(1 << 30), dice.random(), dice.choice(("idle", "busy", "gone")))


def _small(dice: random.Random) -> Any:
    return dice.choice((None, True, dice.randrange(100), dice.random()))


def _medium(dice: random.Random) -> Any:
    # 27 variants, as many as the letters and one that has nothing.
    variant = dice.randrange(27)
    return (variant, None if variant == 26 else [_random_item(dice) for _ in range(variant % 5)])


def _varying(dice: random.Random) -> Any:
    return {"payload": bytes(dice.randrange(4 * KiB)), "text": "x" * dice.randrange(200)}


def _nested(dice: random.Random, depth: int = 4) -> Any:
    return _Tree(_random_item(dice), [_nested(dice, depth - 1) for _ in range(2)] if depth else [])


_STRUCTS = {"small": _small, "medium": _medium, "varying": _varying, "nested": _nested}


def _round(system: str, build: Callable[[random.Random], Any], seconds: float) -> float:
    send, recv = _pair(system)
    dice = random.Random(1)
    values = cycle([build(dice) for _ in range(100)])

    def once() -> None:
        value = next(values)
        send(value)
        if recv() != value:
            raise ValueError("received something else than was sent")

    return per_call(seconds, once)


def _transfer_data(system: str, size: int, seconds: float) -> float:
    """One thread, but where a pipe would wait for its reader."""
    data = bytes(size)
    if system == _PIPE:
        receiving, sending = _ctx("fork").Pipe(duplex=False)
        send, recv = sending.send_bytes, receiving.recv_bytes
    else:
        tx, rx = _ipc().bytes_channel()
        send, recv = tx.send, rx.recv
    if system != _PIPE or size <= 32 * KiB:

        def once() -> None:
            send(data)
            recv()

        return per_call(seconds, once)
    wanted = threading.Semaphore(0)

    def serve() -> None:
        while True:
            wanted.acquire()
            send(data)

    threading.Thread(target=serve, daemon=True).start()

    def ask() -> None:
        wanted.release()
        recv()

    return per_call(seconds, ask)


# -- memory that goes to and fro ---------------------------------------------------------------

_REGION = 4 * KiB * KiB


def _ping_pong(system: str, seconds: float) -> float:
    """One hop of a region between two threads, each of which adds one to all its bytes."""
    if find_spec("numpy") is None:
        raise SkipCaseError("numpy is not installed")
    numpy = importlib.import_module("numpy")
    there, back = _pair(system), _pair(system)

    def hop(region: Any) -> Any:
        if system == _PIPE:
            return region + 1
        if system == "SharedMemory":
            return _ipc().SharedMemory.from_bytes(region.array("u1", _REGION) + 1)
        array = region.array("u1", _REGION)
        array += 1
        return region

    def echo() -> None:
        while True:
            back[0](hop(there[1]()))

    threading.Thread(target=echo, daemon=True).start()
    region = numpy.zeros(_REGION, "u1") if system == _PIPE else _ipc().SharedMemory.zeros(_REGION)

    def once() -> None:
        nonlocal region
        there[0](hop(region))
        region = back[1]()

    return per_call(seconds, once, batch=2)


def _bounces() -> Iterator[Case]:
    yield _case(
        f"ping_pong_shared_mem_{_REGION}",
        "a hop of 4 MiB between two threads, each byte changed: into a new region",
        *(_entry(system, _ping_pong, system) for system in ("SharedMemory", _PIPE)),
        seconds=0.3,
    )
    yield _case(
        f"ping_pong_shared_mem_mut_{_REGION}",
        "the same, in place",
        *(_entry(system, _ping_pong, system) for system in ("SharedMemory (mut)", _PIPE)),
        seconds=0.3,
    )


# -- waiting for many --------------------------------------------------------------------------


#: So many channels at most have both ends in this process; of more, another one holds the senders.
_MOST_HERE = 5_000


def _receiver_set(count: int) -> tuple[Any, list[Any]]:
    """A set of so many receivers, and senders of the first of them (of all, if there aren't too many)."""
    kind = getattr(_ipc(), "ReceiverSet", None)
    if kind is None:
        raise SkipCaseError("this version has no ReceiverSet")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = (2 * count if count <= _MOST_HERE else count) + 1_500
    if wanted > hard:
        raise SkipCaseError(f"needs {wanted} descriptors, this process may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    chosen, senders = kind(), []
    away, thanks = _holder() if count > _MOST_HERE else (None, None)
    # It ends with this process.
    _kept.append(away)
    for _ in range(count):
        sender, receiver = _ipc().channel()
        chosen.add(receiver)
        senders.append(sender)
        if away and len(senders) == 101:
            away.send(senders[1:])
            thanks.recv()
            for sender in senders[1:]:
                sender.close()
            del senders[1:]
    return chosen, senders


def _holder() -> tuple[Any, Any]:
    """A process that keeps open what it is sent, and says that it has it."""
    (tx, rx), (thank, thanks) = _ipc().channel(), _ipc().channel()
    _ctx("ipcchan_fork").Process(target=_hold, args=(rx, thank), daemon=True).start()
    return tx, thanks


def _hold(received: Any, thank: Any) -> None:
    held = []
    for endpoints in received:
        held.append(endpoints)
        thank.send(None)


def _send_on_some(active: int, count: int, seconds: float) -> float:
    chosen, senders = _receiver_set(count)

    def once() -> None:
        for sender in senders[:active]:
            sender.send(None)
        missing = active
        while missing > 0:
            for event in chosen.select():
                event.message.close()
                missing -= 1

    return per_call(seconds, once)


def _send_on_some_pipes(active: int, count: int, seconds: float) -> float:
    pipes = [_ctx("fork").Pipe(duplex=False) for _ in range(count)]
    readers = [reader for reader, _ in pipes]

    def once() -> None:
        for _, writer in pipes[:active]:
            writer.send(None)
        missing = active
        while missing > 0:
            for reader in connection.wait(readers):
                assert isinstance(reader, connection.Connection)
                reader.recv_bytes()
                missing -= 1

    return per_call(seconds, once)


def _create_set(count: int, seconds: float) -> float:
    """Make a set of receivers and close it; those are made beforehand."""
    _receiver_set(0)
    kind, elapsed, rounds = _ipc().ReceiverSet, 0.0, 0
    while elapsed < seconds:
        with ExitStack() as stack:
            pairs = [_ipc().channel() for _ in range(count)]
            for sender, _ in pairs:
                stack.enter_context(sender)
            start = time.perf_counter()
            with kind() as chosen:
                for _, receiver in pairs:
                    chosen.add(receiver)
            elapsed += time.perf_counter() - start
        rounds += 1
    return elapsed / rounds * 1e6


def _drain_closed(count: int, seconds: float) -> float:
    """Add receivers whose senders are closed, and select until all have said so."""
    _receiver_set(0)
    kind, elapsed, rounds = _ipc().ReceiverSet, 0.0, 0
    while elapsed < seconds:
        receivers = []
        for _ in range(count):
            sender, receiver = _ipc().channel()
            sender.close()
            receivers.append(receiver)
        start = time.perf_counter()
        with kind() as chosen:
            for receiver in receivers:
                chosen.add(receiver)
            while len(chosen):
                chosen.select()
        elapsed += time.perf_counter() - start
        rounds += 1
    return elapsed / rounds * 1e6


def _sets() -> Iterator[Case]:
    def case(name: str, title: str, *entries: Entry) -> Case:
        return _case(name, title, *entries, group="receiver set")

    for active, count in (
        (1, 1),
        (1, 5),
        (2, 5),
        (5, 5),
        (1, 20),
        (5, 20),
        (20, 20),
        *((n, 100) for n in (1, 5, 20, 100)),
    ):
        yield case(
            f"send_on_{active}_of_{count}",
            f"send on {active} of {count} channels, select until all came",
            _entry("ReceiverSet", _send_on_some, active, count),
            _entry("mp.connection.wait", _send_on_some_pipes, active, count),
        )
    for count in (10, 100, 1_000, 10_000):
        yield case(
            f"select_1_of_{count}",
            f"send on 1 of {count} channels, select",
            _entry("ReceiverSet", _send_on_some, 1, count),
            *([_entry("mp.connection.wait", _send_on_some_pipes, 1, count)] if count <= 1_000 else []),
        )
    for count in (0, 1, 10, 100):
        yield case(
            f"create_and_destroy_set_of_{count}",
            f"make a set of {count} receivers and close it",
            _entry("ReceiverSet", _create_set, count),
        )
    for count in (1, 10, 100):
        yield case(
            f"add_and_remove_{count}_closed_receivers",
            f"add {count} receivers whose channels have ended, select until all said so",
            _entry("ReceiverSet", _drain_closed, count),
        )


# -- importing ---------------------------------------------------------------------------------


def _import(module: str, _seconds: float) -> float:
    """Milliseconds of processor time of an interpreter that does nothing but import ``module``, its start included."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    best = float("inf")
    with tempfile.TemporaryDirectory(prefix="mp_ipcchan-benchmarks-") as folder:
        # Installed code is compiled; here it is by the first run.
        environment["PYTHONPYCACHEPREFIX"] = folder
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=environment)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best * 1e3


def _imports() -> Iterator[Case]:
    yield _case(
        "import",
        "processor time of an interpreter that imports it (the best of 5)",
        _entry("mp_ipcchan", _import, "mp_ipcchan"),
        _entry("multiprocessing.pool", _import, "multiprocessing.pool"),
        *(Entry(module, partial(_import, module), None, module) for module in ("loky", "joblib", "zmq", "billiard")),
        unit=_MS,
        group="start",
    )


def operation_cases() -> list[Case]:
    """Every case."""
    return [*_creations(), *_meetings(), *_transfers(), *_bounces(), *_sets(), *_starts(), *_imports()]
