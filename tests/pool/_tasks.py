"""What the tests have workers do. In a module of its own, so that every start method finds it."""

from __future__ import annotations

import contextvars
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from mp_ipcchan import Receiver, Sender


def square(x: int) -> int:
    return x * x


def sleep(seconds: float, result: Any = None) -> Any:
    time.sleep(seconds)
    return result


def sleep_and_tell(seconds: float, result: Any) -> tuple[int, Any]:
    time.sleep(seconds)
    return os.getpid(), result


def tell(result: Any) -> tuple[int, Any]:
    return sleep_and_tell(0.001, result)


def die(signal_number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signal_number)
    time.sleep(60)


def leave(code: int) -> None:
    os._exit(code)


def die_or_square(x: int, victim: int) -> int:
    if x == victim:
        die()
    return square(x)


def say_and_wait(tx: Sender[int], seconds: float) -> None:
    """Tell who runs this, and go on running."""
    tx.send(os.getpid())
    time.sleep(seconds)


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def fail(message: str) -> None:
    raise ValueError(message)


def end_interpreter(code: int) -> None:
    sys.exit(code)


class Awkward(Exception):
    """Can't be unpickled: its constructor takes something else than what ``args`` has."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def raise_awkward() -> None:
    raise Awkward("one", "two")


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


def raise_unpicklable() -> None:
    raise Unpicklable("text of it")


def make_unpicklable() -> Any:
    return threading.Lock()


class Undecodable:
    def __reduce__(self) -> Any:
        return int, ("x",)


def make_undecodable() -> Undecodable:
    return Undecodable()


def nested(workers: int) -> int:
    from mp_ipcchan import ProcessPoolExecutor

    with ProcessPoolExecutor(workers) as inner:
        return sum(inner.map(square, range(10)))


state = "not initialized"


def initialize(value: str) -> None:
    global state
    state = value


def say_and_wait_for(path: str, directory: str) -> None:
    """Leave a file named after this process, and wait until somebody has made another."""
    mark(directory, os.getpid())
    while not os.path.exists(path):
        time.sleep(0.001)


def get_state() -> str:
    return state


def die_unless_marked(path: str) -> None:
    """Die the first time."""
    if not os.path.exists(path):
        Path(path).touch()
        die()


def die_once_at(path: str, x: int) -> int:
    """Die in the middle, the first time."""
    if x == 17:
        die_unless_marked(path)
    return x


class Argument:
    """Something that can be referred to weakly."""


def fail_to_initialize() -> None:
    raise RuntimeError("no database")


def echo(value: Any) -> Any:
    return value


def receive_from(rx: Receiver[Any]) -> Any:
    return rx.recv(60.0)


def send_through(tx: Sender[Any], value: Any) -> None:
    tx.send(value)


def grow(megabytes: int, seconds: float = 60.0) -> int:
    """Take memory, and keep it for a while."""
    taken = bytearray(megabytes << 20)
    for at in range(0, len(taken), 4096):
        taken[at] = 1
    time.sleep(seconds)
    return len(taken)


kept: list[bytes] = []


def leak(megabytes: int) -> int:
    kept.append(b"x" * (megabytes << 20))
    return os.getpid()


def mark(directory: str, name: Any) -> None:
    """Leave a file, so that somebody sees that this ran."""
    Path(directory, str(name)).touch()


class Shifty(Exception):
    """Its pickle makes something else of it."""

    def __reduce__(self) -> Any:
        return int, ("5",)


def raise_shifty() -> None:
    raise Shifty("text of it")


class ExitsWhenUnpickled:
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def make_exits_when_unpickled() -> ExitsWhenUnpickled:
    return ExitsWhenUnpickled()


class ExitsWhenPickled:
    def __reduce__(self) -> Any:
        raise SystemExit(4)


def make_exits_when_pickled() -> ExitsWhenPickled:
    return ExitsWhenPickled()


def hold_the_interpreter(tx: Sender[int]) -> None:
    """Work in C that never lets another thread of this process run, for minutes."""
    tx.send(os.getpid())
    re.match(r"(a+)+$", "a" * 60 + "b")


def log(logger: str, level: int, message: str, *args: Any, **options: Any) -> None:
    logging.getLogger(logger or None).log(level, message, *args, **options)


def log_exception(logger: str) -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        logging.getLogger(logger).exception("it failed")


def log_unpicklable(logger: str) -> None:
    logging.getLogger(logger).warning("a lock: %s", threading.Lock(), extra={"lock": threading.Lock()})


def log_nested(logger: str) -> None:
    from mp_ipcchan import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as inner:
        inner.submit(log, logger, logging.ERROR, "from below").result()


def log_and_die(logger: str) -> None:
    logging.getLogger(logger).error("last words")
    die()


def warn(message: str) -> None:
    warnings.warn(message, DeprecationWarning, stacklevel=1)


request_id: contextvars.ContextVar[Any] = contextvars.ContextVar("request_id", default="none")


def get_request_id() -> Any:
    return request_id.get()


def set_request_id(value: Any) -> None:
    request_id.set(value)


def square_or_die(x: int, victim: int = 10) -> int:
    """Some work, or for one item the end of the worker."""
    if x == victim:
        die()
    time.sleep(0.02)
    return square(x)


def nested_pool(workers: int) -> int:
    import multiprocessing

    with multiprocessing.get_context("ipcchan").Pool(workers) as inner:
        return sum(inner.map(square, range(10)))


def raise_at(x: int, wrong: int) -> int:
    if x == wrong:
        raise ValueError(f"item {x}")
    return x


def raise_at_three(x: int) -> int:
    return raise_at(x, 3)


def die_at_three(x: int) -> int:
    if x == 3:
        die()
    return x


def add(x: int, y: int = 0) -> int:
    return x + y


def touch(path: str) -> None:
    with open(path, "x"):
        pass


def fork_and_fail() -> str:
    child = os.fork()
    if not child:
        raise OSError("exec failed")
    os.waitpid(child, 0)
    return "parent"


def fork_and_return() -> str:
    child = os.fork()
    if not child:
        return "child"
    os.waitpid(child, 0)
    return "parent"
