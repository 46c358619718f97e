"""Wakers: one a receiver, whoever asks for its descriptor."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mp_ipcchan import _inlet, channel
from mp_ipcchan._waker import Waker

from ..conformance._support import LIMIT, open_descriptors


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
