"""The input of one map on its way to the workers: read as they get along, a bounded number of chunks ahead.

Input that is at hand (a list, a range) is read by whoever finds that there is room: the caller, then the thread that
hears of results. Input that may take its time, or wait for a result itself, has a thread to read it; that of
``Pool.map`` is read in the caller's, who waits anyway.

In the user's threads a signal's handler may raise at any instant. Reading ends then, at the position up to
which all chunks were given away; what may have been given away beyond it is as if it had not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from .._interrupt import handlers_put_off

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
    nothing follows ``position``; it may be told again. ``ended()``: everything was read. ``whole``: chunks that a
    failure cut short are dropped.
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
        #: Whether whoever holds the lock reads; it looks once more for those who would read, too.
        self._busy = False
        self._again = False
        self._interrupted: BaseException | None = None
        #: For the thread that reads: released where there may be room. None where anybody reads. A lock, since what the
        #: stdlib has for this is not safe from Ctrl-C.
        self._bell: threading.Lock | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will be read."""
        return self._items is None

    def begin(self, at_hand: bool) -> None:
        """Read what there is room for, or start a thread that reads."""
        if at_hand:
            self.advance()
        else:
            self._bell = threading.Lock()
            with handlers_put_off():
                threading.Thread(target=self._read_all, name="mp_ipcchan-input", daemon=True).start()

    def read_here(self) -> None:
        """Read everything in this thread, as there is room."""
        self._bell = threading.Lock()
        try:
            self._read_all()
        except BaseException:
            self.stop()
            raise

    def _read_all(self) -> None:
        bell = self._bell
        assert bell is not None
        while True:
            bell.acquire(False)
            self._pump()
            if self._items is None:
                return
            bell.acquire()

    def advance(self) -> None:
        """There may be room."""
        if self._bell is not None:
            _ring(self._bell)
        elif self._items is not None:
            self._pump()
        elif self._interrupted is not None:
            # Whoever was to tell of it may have been interrupted once more.
            self._failed(self._interrupted)

    def stop(self) -> None:
        """Read nothing more."""
        self._items = None
        if self._bell is not None:
            _ring(self._bell)

    def _pump(self) -> None:
        """Read while there is room. One thread at a time."""
        try:
            with self._lock:
                self._again = True
                if self._busy:
                    # This thread is reading, further up its stack.
                    return
                try:
                    self._busy = True
                    while True:
                        if not self._again:
                            return
                        self._again = False
                        self._read()
                finally:
                    self._busy = False
        except BaseException as error:
            # Ctrl-C. First what takes no call, as another handler may raise in that.
            self._interrupted, self._items = error, None
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
                self._launch(self.position, chunk)
                self.position += len(chunk)
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


def _ring(bell: threading.Lock) -> None:
    try:
        bell.release()
    except RuntimeError:
        # It has been rung, and not been heard yet.
        pass
