"""Wakers: one a receiver, whoever asks for its descriptor. Waiting for one of two."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from mp_ipcchan import _inlet, channel
from mp_ipcchan._deadline import deadline_in
from mp_ipcchan._waker import Waker, wait_for_either

from ..conformance._support import LIMIT, open_descriptors, room_for


def test_two_threads_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get the same descriptor, and nothing of the other is left."""
    both = threading.Barrier(2)

    class Slow(Waker):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            both.wait(LIMIT)

    monkeypatch.setattr(_inlet, "Waker", Slow)
    tx, rx = channel()
    before = open_descriptors()
    with tx, rx:
        found: list[int] = []
        threads = [threading.Thread(target=lambda: found.append(rx.fileno())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert found == [rx.fileno()] * 2
        # An epoll descriptor and an eventfd.
        assert len(open_descriptors() - before) == 2


@pytest.mark.parametrize("spare", [2, 0])
def test_waiting_for_either(spare: int) -> None:
    """Also where no descriptor is free; and none is left open."""
    (first, to_first), (second, to_second) = os.pipe(), os.pipe()
    try:
        before = open_descriptors()
        with room_for(spare):
            assert not wait_for_either(first, second, deadline_in(0.0))
            assert not wait_for_either(first, second, deadline_in(0.01))
            os.write(to_second, b"x")
            assert wait_for_either(first, second, None)
            os.read(second, 1)
            os.write(to_first, b"x")
            assert wait_for_either(first, second, deadline_in(LIMIT))
            assert wait_for_either(first, second, deadline_in(0.0))
        assert open_descriptors() == before
    finally:
        for fd in (first, to_first, second, to_second):
            os.close(fd)
