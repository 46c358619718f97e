"""What ``imap`` and ``imap_unordered`` of a pool return: results that are taken one by one.

The input is read as results are taken, a bounded number of calls ahead; so it may be endless. Once somebody waits
for the pool to end (``join``), or the iterator was forgotten, there is nobody to take them, and it is
read as workers are free: the stdlib runs everything in either case, and so do we.
"""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import TimeoutError as StdlibTimeoutError
from multiprocessing import pool as stdlib
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from .._deadline import deadline_in, remaining
from .._interrupt import handlers_put_off
from ._async_result import Host, Jobs, is_final
from ._chunk import ChunkSize, run_each, run_whole
from ._feed import Feed, at_hand

T = TypeVar("T")

#: The most calls in a chunk whose size nobody gave.
_LARGEST = 256
#: This many times what the workers may have at a time is read ahead, so that they never wait for a reader.
_AHEAD = 3

#: Whether it succeeded, and the result or exception.
Outcome: TypeAlias = "tuple[bool, Any]"

_job_counter: Iterator[int] = stdlib.job_counter  # type: ignore[attr-defined]


class Stream:
    """The results of one ``imap`` between the workers and the iterator that the user has."""

    def __init__(
        self,
        pool: Jobs,
        function: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        ordered: bool,
    ) -> None:
        host: Host = pool._host
        self._pool: Jobs | None = pool
        self._host = host
        self._function = function if chunksize == 1 else host.portable(function)
        self._ordered = ordered
        if chunksize is None and host.single:
            chunksize = 1
        self._chunksize = chunksize
        self._sizes = ChunkSize(chunksize, target=host.target, largest=_LARGEST)
        # Reentrant: forgetting the iterator may happen anywhere.
        self._lock = threading.RLock()
        #: Locks of those who wait, released when something has changed. A condition would not do: it lets go of its
        #: lock, and takes it again, in Python code, where Ctrl-C may come between.
        self._gates: list[threading.Lock] = []
        #: Outcomes to be taken, the oldest first.
        self.items: deque[Outcome] = deque()
        #: The one that is counted as taken already.
        self._counted: Outcome | None = None
        #: Outcomes that came ahead of older ones: by their position, how many calls they are of, and themselves.
        self._early: dict[int, tuple[int, list[Outcome]]] = {}
        #: Up to which position outcomes have gone to ``_items``.
        self._next = 0
        #: The positions of what was given to workers and has not ended.
        self._under_way: set[int] = set()
        #: Calls that were given to workers, that ended, and whose outcomes were taken, or are about to be.
        self._launched = self._settled = self._taken = 0
        #: How few calls must be on their way for more to be read.
        self._low = 0
        self._reading = True
        #: Whether there is nobody to wait for.
        self._unbounded = False
        #: Whether all outcomes are here that will ever be.
        self._complete = False
        self._dropping = False
        self._job = next(_job_counter)
        self._cache = pool._cache
        self._feed = Feed(
            iterable if at_hand(iterable) else _guarded(iterable),
            room=self._room,
            launch=self._launch,
            failed=self._input_failed,
            ended=self._input_ended,
            whole=chunksize is not None,
        )

    def begin(self, iterable: Iterable[Any]) -> None:
        """Let the pool wait for this at its end, and read the input. ``_drop`` must follow where that raises."""
        self._cache[self._job] = self
        self._feed.begin(at_hand(iterable))

    # -- the input ---------------------------------------------------------------------------

    def _room(self) -> int:
        size = self._sizes.size
        most = max(_AHEAD * self._host.processes * self._host.window(), 4) * size
        on_way = self._launched - (self._settled if self._unbounded else self._taken)
        if on_way + size <= most:
            return size
        self._low = most - max(size, most // 4)
        return 0

    def _launch(self, position: int, items: list[Any]) -> None:
        self._under_way.add(position)
        self._launched += len(items)
        if self._chunksize == 1:

            def settle_one(succeeded: bool, outcome: Any) -> None:
                self._hear(position, 1, [(succeeded, outcome)], final=not succeeded and is_final(outcome))

            self._host.submit(self._function, items, {}, settle_one)
        else:

            def settle(succeeded: bool, outcome: Any) -> None:
                self._hear_chunk(position, len(items), succeeded, outcome)

            runner = run_each if self._chunksize is None else run_whole
            self._host.submit(runner, (self._function, items), {}, settle)

    def _input_failed(self, error: BaseException) -> None:
        self._hear(self._feed.position, 0, [(False, error)], last=True)

    def _input_ended(self) -> None:
        self._hear(self._feed.position, 0, [], last=True)

    # -- outcomes ----------------------------------------------------------------------------

    def _hear_chunk(self, position: int, calls: int, succeeded: bool, outcome: Any) -> None:
        if succeeded and self._chunksize is None:
            outcomes, seconds = outcome
            self._sizes.learn(calls, seconds)
            revive = self._host.revive
            self._hear(position, calls, [(ok, value if ok else revive(*value)) for ok, value in outcomes])
        elif succeeded:
            self._hear(position, calls, [(True, value) for value in outcome])
        elif self._chunksize is None:
            self._hear(position, calls, [(False, outcome) for _ in range(calls)], final=is_final(outcome))
        else:
            # What a chunk of this size fails with, it fails with once, as in the stdlib's.
            self._hear(position, calls, [(False, outcome)], final=is_final(outcome))

    def _hear(
        self,
        position: int,
        calls: int,
        outcomes: list[Outcome],
        last: bool = False,
        final: bool = False,
    ) -> None:
        """``calls`` calls from ``position`` on have ended.

        ``last``: nothing is there from ``position`` on. ``final``: nothing can be run any more.
        """
        if final:
            self._feed.stop()
        with self._lock:
            if not self._complete:
                self._note(position, calls, outcomes, last, final)
        if self._complete:
            self._end()
        elif self._unbounded:
            self._feed.advance()

    def _note(self, position: int, calls: int, outcomes: list[Outcome], last: bool, final: bool) -> None:
        if last:
            # Where giving it away was interrupted, it may be under way, or even have ended.
            self._under_way.discard(position)
            position = max(position, self._next)
        elif position in self._under_way:
            self._under_way.discard(position)
        else:
            return
        self._settled += calls
        # Those of a chunk that fails as one are taken with its failure.
        self._taken += calls - len(outcomes) if calls else 0
        if not self._ordered:
            self.items.extend(outcomes)
        elif position == self._next:
            self.items.extend(outcomes)
            self._next += calls
            if self._early:
                self._release()
        else:
            self._early[position] = calls, outcomes
        if self._dropping:
            self.items.clear()
        if last or final:
            self._reading = False
        self._complete = not self._reading and not self._under_way
        self._wake()

    def _wake(self) -> None:
        """Something has changed: let those who wait look."""
        gates, self._gates = self._gates, []
        for gate in gates:
            gate.release()

    def _new_gate(self) -> threading.Lock:
        """What to wait on, made while the lock is held: it is released with the next change."""
        gate = threading.Lock()
        gate.acquire()
        self._gates.append(gate)
        return gate

    def _release(self) -> None:
        while self._next in self._early:
            calls, outcomes = self._early.pop(self._next)
            self.items.extend(outcomes)
            self._next += calls

    def _end(self) -> None:
        """All is done; as often as it is said."""
        self._cache.pop(self._job, None)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._one_less()

    def first(self, timeout: float | None) -> Outcome:
        """The next outcome, which stays that until it is deleted from ``items``. ``StopIteration`` at the end."""
        deadline = deadline_in(timeout)
        waited = True
        while True:
            with self._lock:
                if self.items:
                    found = self.items[0]
                    if found is not self._counted:
                        self._taken += 1
                        self._counted = found
                    break
                if self._complete:
                    raise StopIteration
                if not waited:
                    raise StdlibTimeoutError
                gate = self._new_gate()
            left = remaining(deadline)
            waited = gate.acquire(timeout=-1 if left is None else min(left, threading.TIMEOUT_MAX))
        if self._reading and self._launched - self._taken <= self._low:
            if self._feed.over:
                self._feed.advance()
            else:
                # Input that is at hand is read here, and it would end where that is interrupted.
                with handlers_put_off():
                    self._feed.advance()
        return found

    # -- the end -----------------------------------------------------------------------------

    def _drop(self, error: BaseException) -> None:
        """The pool was terminated: what was not finished fails, once."""
        self._feed.stop()
        with self._lock:
            if self._complete:
                return
            self._complete = True
            self._early.clear()
            self.items.append((False, error))
            self._wake()
        self._end()

    def await_end(self) -> None:
        """Wait until every result is there."""
        while True:
            with self._lock:
                if self._complete:
                    return
                gate = self._new_gate()
            gate.acquire()

    def unbind(self) -> None:
        """Read on whether or not results are taken."""
        with self._lock:
            self._unbounded = True
        self._feed.advance()

    def forget(self) -> None:
        """Nobody will take the results. Called by a finaliser, so in any thread, with any lock held."""
        self._dropping = True
        self.items.clear()
        if not self._feed.over:
            try:
                _thread.start_new_thread(self.unbind, ())
            except RuntimeError:
                pass  # the interpreter ends


def _guarded(iterable: Iterable[Any]) -> Iterator[Any]:
    """What ``iter`` raises is raised when the first item is read, where the stdlib raises it."""
    yield from iterable


if TYPE_CHECKING:
    _StdlibOrdered = stdlib.IMapIterator
    _StdlibUnordered = stdlib.IMapUnorderedIterator
else:
    # They take no parameter when they run.
    _StdlibOrdered = {T: stdlib.IMapIterator}
    _StdlibUnordered = {T: stdlib.IMapUnorderedIterator}


class IMapIterator(_StdlibOrdered[T], Generic[T]):
    """Iterates over results in the order of the input."""

    def __init__(self, stream: Stream, progress: Callable[[int | None], None] | None = None) -> None:
        self._stream = stream
        self._progress = progress

    def __iter__(self) -> IMapIterator[T]:
        return self

    def next(self, timeout: float | None = None) -> T:
        """The next result, or its exception; ``multiprocessing.TimeoutError`` after ``timeout`` seconds."""
        progress = self._progress
        items = self._stream.items
        while True:
            try:
                outcome = self._stream.first(timeout)
            except StopIteration:
                if progress is not None:
                    progress(None)
                raise
            if progress is not None:
                progress(1)
            succeeded, value = outcome
            # From here to the end there is no call: no signal's handler comes between, nor another thread. Who is
            # interrupted has not taken it, and finds it the next time.
            if items and items[0] is outcome:
                del items[0]
                if succeeded:
                    return value  # type: ignore[no-any-return]
                raise value

    # Not a function that calls the other: an interrupt could come between the two.
    if TYPE_CHECKING:

        def __next__(self, timeout: float | None = None) -> T: ...
    else:
        __next__ = next  # noqa: A003

    def __del__(self) -> None:
        self._stream.forget()


class IMapUnorderedIterator(IMapIterator[T], _StdlibUnordered[T]):
    """Iterates over results as they come."""
