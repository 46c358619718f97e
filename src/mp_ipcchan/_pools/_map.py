"""``Executor.map``: chunks of calls on their way, and what is to follow them.

Input is read as results are taken, a bounded number of calls ahead. The stdlib reads all of it at once, and programs
rely on that: they call ``map`` for its effects and never look at the results, or look at them after the executor
was shut down. So where nobody has begun to take results, chunks follow each other as they are done if the
input is a list or the like; and a shutdown submits the rest of what is known to end. Input of unknown length
of which results were taken ends with the executor: it may be endless.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from typing import Any

from .._deadline import remaining
from ._chunk import ChunkSize
from ._feed import at_hand

#: This many chunks a worker are on their way, so that none is without.
_CHUNKS_AHEAD = 4
#: These go with what is at hand: reading them runs no code of the user's.
_REPEATING = (itertools.count, itertools.repeat)
#: These don't end, or are not known to.
_ENDLESS = (itertools.count, itertools.cycle, itertools.repeat)


class Mapping:
    """One ``map``: its input, and its chunks in order."""

    def __init__(
        self,
        submit: Callable[[Callable[..., Any], list[tuple[Any, ...]]], Future[Any]],
        function: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        workers: int,
        chunksize: int | None,
        buffersize: int | None,
    ) -> None:
        self._submit = submit
        self._function = function
        self._calls = zip(*iterables)  # noqa: B905
        self._size = ChunkSize(chunksize)
        self._buffersize = buffersize
        self._most = max(2, _CHUNKS_AHEAD * workers)
        #: Chunks that are not taken yet; and how many calls each is.
        self._chunks: deque[tuple[Future[Any], int]] = deque()
        #: Chunks that are not done, and calls that were not taken.
        self._on_their_way = 0
        self._ahead = 0
        self._exhausted = False
        #: What reading the input, or submitting it, raised: comes after the results of what was submitted before.
        self._failure: Exception | None = None
        self._begun = False
        self._lock = threading.RLock()
        self._plain = (
            buffersize is None
            and any(map(at_hand, iterables))
            and all(at_hand(one) or isinstance(one, _REPEATING) for one in iterables)
        )
        sized = any(isinstance(one, Sized) for one in iterables)
        self._finite = sized and buffersize is None
        self._may_be_read = buffersize is None and (sized or not all(isinstance(one, _ENDLESS) for one in iterables))

    def fill(self) -> None:
        """Submit chunks until enough are on their way, or the input ends."""
        with self._lock:
            while True:
                if self._exhausted:
                    return
                waiting = len(self._chunks) if self._begun or not self._plain else self._on_their_way
                if waiting >= self._most:
                    return
                size = self._size.size
                if self._buffersize is not None:
                    size = min(size, self._buffersize - self._ahead)
                if size < 1:
                    return
                self._submit_next(size)

    def _submit_next(self, size: int) -> None:
        try:
            calls = list(itertools.islice(self._calls, size))
            future = self._submit(self._function, calls) if calls else None
        except Exception as error:
            self._failure = error
            future = None
        if future is None:
            self._exhausted = True
            return
        self._ahead += len(calls)
        self._on_their_way += 1
        self._chunks.append((future, len(calls)))
        if self._plain and not self._begun:
            future.add_done_callback(self._done)

    def _done(self, future: Future[Any]) -> None:
        """In the pool's thread, which must not wait for code of the user's: so for plain input alone."""
        if self._begun:
            return
        with self._lock:
            self._on_their_way -= 1
            if future.cancelled():
                return
            if future.exception() is None:
                results, _, seconds = future.result()
                self._size.learn(len(results), seconds)
            self.fill()

    def check(self) -> None:
        """Raise what reading the input for the first chunks has raised."""
        if self._failure is not None:
            raise self._failure

    @property
    def settled(self) -> bool:
        """Whether it needs nobody to remind it: somebody takes its results, or its input is read."""
        return self._begun or self._exhausted

    def read_rest(self) -> None:
        """The executor is being shut down: submit what is left, if that ends."""
        with self._lock:
            if not self._finite and (self._begun or not self._may_be_read):
                return
            while True:
                if self._exhausted:
                    return
                self._submit_next(self._size.size)

    def results(self, deadline: float | None, revive: Callable[[str, bytes | None], BaseException]) -> Iterator[Any]:
        """The results, in order. Whatever is on its way when this is left is cancelled."""
        with self._lock:
            self._begun = True
        try:
            while True:
                if not self._chunks:
                    if self._failure is not None:
                        raise self._failure
                    return
                future, calls = self._chunks[0]
                results, failure, seconds = future.result(remaining(deadline))
                self._chunks.popleft()
                self._size.learn(calls, seconds)
                # Taken from the end: nothing is kept that was handed out.
                results.reverse()
                while True:
                    if not results:
                        break
                    self._ahead -= 1
                    self.fill()
                    yield results.pop()
                if failure is not None:
                    raise revive(*failure)
                self.fill()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Read nothing more; cancel what is on its way."""
        self._exhausted = True
        for future, _ in self._chunks:
            future.cancel()


class Mappings:
    """The maps of a pool that may still have something to submit."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Mapping] = weakref.WeakSet()
        #: Held, or nobody might: who only wants the effects drops the results at once.
        self._unsettled: list[Mapping] = []

    def add(self, mapping: Mapping) -> None:
        self._all.add(mapping)
        self._unsettled = [one for one in (*self._unsettled, mapping) if not one.settled]

    def read_rest(self) -> None:
        """Submit what is left of all input that ends, before a shutdown."""
        for mapping in list(self._all):
            mapping.read_rest()
        self._unsettled = []
