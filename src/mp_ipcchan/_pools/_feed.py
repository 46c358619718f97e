"""The input of one map on its way to the workers: read as they get along, a bounded number of chunks ahead.

Input that is at hand (a list, a range) is read by whoever finds that there is room: the caller, then the thread that
hears of results. Input that may take its time, or wait for a result itself, has a thread to read it; that of
``Pool.map`` is read in the caller's, who waits anyway.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

#: Reading these never waits, and runs nothing of the user's.
_AT_HAND = (list, tuple, range, str, bytes, bytearray, dict, set, frozenset, deque)

#: How long (seconds) a chunk may take to be read; it is sent as it is then.
_PATIENCE = 0.002


def at_hand(iterable: Iterable[Any]) -> bool:
    """Whether reading ``iterable`` can be done by anybody at any time."""
    return type(iterable) in _AT_HAND


class Feed:
    """Reads ``items`` and gives them to ``launch(position, chunk)``; see the module.

    ``room() -> int``: how many items the next chunk is to have; 0 for none now. ``failed(error)``: reading raised,
    nothing follows. ``ended()``: everything was read. ``whole``: chunks that a failure cut short are dropped.
    """

    def __init__(
        self,
        iterable: Iterable[Any],
        *,
        room: Callable[[], int],
        launch: Callable[[int, list[Any]], None],
        failed: Callable[[BaseException], None],
        ended: Callable[[], None],
        whole: bool,
    ) -> None:
        self._items: Iterator[Any] | None = iter(iterable)
        self._room, self._launch, self._failed, self._ended = room, launch, failed, ended
        self._whole = whole
        #: Of the next item that will be given away.
        self.position = 0
        self._lock = threading.RLock()
        self._busy = False
        self._again = False
        #: For the thread that reads: raised where there may be room. None where anybody reads.
        self._bell: threading.Event | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will be read."""
        return self._items is None

    def begin(self, at_hand: bool) -> None:
        """Read what there is room for, or start a thread that reads."""
        if at_hand:
            self.advance()
        else:
            self._bell = threading.Event()
            threading.Thread(target=self._read_all, name="mp_ipcchan-input", daemon=True).start()

    def read_here(self) -> None:
        """Read everything in this thread, as there is room."""
        self._bell = threading.Event()
        try:
            self._read_all()
        except BaseException:
            self.stop()
            raise

    def _read_all(self) -> None:
        bell = self._bell
        assert bell is not None
        while True:
            bell.clear()
            self._pump()
            if self._items is None:
                return
            bell.wait()

    def advance(self) -> None:
        """There may be room."""
        if self._bell is not None:
            self._bell.set()
        elif self._items is not None:
            self._pump()

    def stop(self) -> None:
        """Read nothing more."""
        self._items = None
        if self._bell is not None:
            self._bell.set()

    def _pump(self) -> None:
        """Read while there is room. One thread at a time; who finds another at it has it look once more."""
        with self._lock:
            if self._busy:
                self._again = True
                return
            self._busy = True
        try:
            while True:
                self._read()
                with self._lock:
                    if not self._again:
                        self._busy = False
                        return
                    self._again = False
        except BaseException as error:
            # Ctrl-C, where the user's thread reads: what it was about to give away is lost, so nothing may follow.
            self._busy = False
            self.stop()
            self._failed(error)
            raise

    def _read(self) -> None:
        while True:
            items = self._items
            size = self._room() if items is not None else 0
            if items is None or size < 1:
                return
            chunk: list[Any] = []
            error: Exception | None = None
            more = False
            try:
                more = self._fill(chunk, items, size)
            except Exception as raised:
                error = raised
            if chunk and not (error and self._whole):
                position = self.position
                self.position += len(chunk)
                self._launch(position, chunk)
            if error is not None:
                self.stop()
                self._failed(error)
            elif not more:
                self.stop()
                self._ended()

    def _fill(self, chunk: list[Any], items: Iterator[Any], size: int) -> bool:
        """Read up to ``size`` items into ``chunk``; False at the end. What was read before an exception stays in it."""
        if self._bell is None or self._whole:
            chunk.extend(islice(items, size))
            return len(chunk) == size
        begun = time.monotonic()
        for item in items:
            chunk.append(item)
            # Input that trickles is not kept waiting for more of it.
            if len(chunk) == size or time.monotonic() - begun > _PATIENCE:
                return True
        return False
