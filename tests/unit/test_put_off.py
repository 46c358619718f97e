"""Handlers of signals that are put off: each is called behind the block, once, and none gets lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from mp_ipcchan import _interrupt
from mp_ipcchan._interrupt import handlers_put_off

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
came: list[int] = []


def _note(number: int, frame: FrameType | None) -> None:
    assert frame is not None
    came.append(number)
    raise KeyError(number)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    came.clear()
    before = [(number, signal.signal(number, _note)) for number in NUMBERS]
    yield
    assert {signal.getsignal(number) for number in NUMBERS} == {_note}
    for number, handler in before:
        signal.signal(number, handler)


def test_all_that_came_are_called_behind_the_block() -> None:
    """Though each of them raises; once, as the kernel tells of what waits."""
    with pytest.raises(KeyError), handlers_put_off():
        for number in (*NUMBERS, *NUMBERS):
            signal.raise_signal(number)
        assert not came
    assert came == [*NUMBERS]


def test_blocks_within_a_block() -> None:
    with pytest.raises(KeyError), handlers_put_off():
        with handlers_put_off():
            signal.raise_signal(signal.SIGUSR1)
        assert not came
    assert came == [signal.SIGUSR1]


def test_what_the_block_raises_is_not_lost() -> None:
    with pytest.raises(KeyError) as caught, handlers_put_off():
        signal.raise_signal(signal.SIGUSR1)
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_without_a_signal() -> None:
    with handlers_put_off():
        pass
    with pytest.raises(ValueError), handlers_put_off():
        raise ValueError
    assert not came


def test_handlers_that_raise_as_they_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are given back all the same."""
    give_back = _interrupt._signal.signal
    left = [*NUMBERS]

    def interrupted(number: int, handler: object) -> object:
        before = give_back(number, handler)  # type: ignore[arg-type]
        if handler is _note and left:
            signal.raise_signal(left.pop())
        return before

    with pytest.raises(KeyError), handlers_put_off():
        monkeypatch.setattr(_interrupt._signal, "signal", interrupted)
        signal.raise_signal(signal.SIGUSR1)
    monkeypatch.undo()
    assert sorted(came) == sorted([signal.SIGUSR1, *NUMBERS])


def test_who_waits_too_long_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put off may hang: it can be interrupted in the end."""
    monkeypatch.setattr(_interrupt, "_LONGEST", -1.0)
    with handlers_put_off():
        with pytest.raises(KeyError):
            signal.raise_signal(signal.SIGUSR1)


def test_other_threads_put_nothing_off() -> None:
    def wait_in_block() -> None:
        with handlers_put_off():
            inside.set()
            leave.wait()

    inside, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=wait_in_block)
    thread.start()
    inside.wait()
    with pytest.raises(KeyError):
        signal.raise_signal(signal.SIGUSR1)
    leave.set()
    thread.join()


def test_child_that_another_thread_forks_meanwhile() -> None:
    """It is in no block: it has the handlers, and hears nothing of what came to its parent."""

    def fork() -> None:
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.raise_signal(signal.SIGUSR2)
            except KeyError:
                code = 0 if came == [signal.SIGUSR2] else 2
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    codes: list[int] = []
    with pytest.raises(KeyError), handlers_put_off():
        signal.raise_signal(signal.SIGUSR1)
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert codes == [0]
    assert came == [signal.SIGUSR1]
