"""What the tests have workers do. In a module of its own, so that every start method finds it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from mp_ipcchan import Sender


def square(x: int) -> int:
    return x * x


def sleep(seconds: float, result: Any = None) -> Any:
    time.sleep(seconds)
    return result


def sleep_and_tell(seconds: float, result: Any) -> tuple[int, Any]:
    time.sleep(seconds)
    return os.getpid(), result


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


def get_state() -> str:
    return state


def fail_to_initialize() -> None:
    raise RuntimeError("no database")


def echo(value: Any) -> Any:
    return value


def send_through(tx: Sender[Any], value: Any) -> None:
    tx.send(value)
