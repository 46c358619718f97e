"""The books of a queue: its ledger, and the counters for what some of its users wait for."""

from __future__ import annotations

import os
from collections.abc import Callable

from .._deadline import deadline_in, remaining
from .._message import Message, Outgoing
from .._outlet import Outlet
from .._transport.unix import SEND_FLAGS
from ..errors import Full, ShutDown
from . import _ledger
from ._counter import Counter
from ._ledger import BEGUN, DELIVERED, Ledger

#: How often (seconds) somebody who waits for others looks whether one of them was killed.
_LOOK_EVERY = 0.5
#: More slots than anybody can wait for.
_MANY = 1 << 20


class Books:
    """What the processes of one queue count together; one object a queue and process.

    ``slots``: puts that a bounded queue still takes. ``tasks``: taken or not, and not yet done.
    ``idle``: raised when ``tasks`` falls to zero.
    """

    __slots__ = ("__weakref__", "idle", "ledger", "maxsize", "plain", "slots", "tasks")

    def __init__(self, maxsize: int, ledger_fd: int, counters: list[Counter]) -> None:
        self.maxsize = maxsize
        rest = iter(counters)
        self.slots = next(rest) if maxsize > 0 else None
        self.tasks = next(rest, None)
        self.idle = next(rest, None)
        self.ledger = Ledger(ledger_fd, self._settle)
        #: Whether there is nothing to count but what the ledger does.
        self.plain = self.slots is None and self.tasks is None

    @classmethod
    def new(cls, maxsize: int, joinable: bool) -> Books:
        counters = [Counter.of(maxsize)] if maxsize > 0 else []
        if joinable:
            counters += [Counter.of(0), Counter.flag()]
        return cls(maxsize, _ledger.create(), counters)

    def counters(self) -> list[Counter]:
        return [one for one in (self.slots, self.tasks, self.idle) if one]

    def _settle(self, undelivered: int, taking: int) -> None:
        if self.slots:
            self.slots.add(undelivered + taking)
        if self.tasks:
            self.finish(undelivered)

    # -- putting -----------------------------------------------------------------------------

    def put(self, outlet: Outlet, item: Outgoing, block: bool, deadline: float | None) -> None:
        """Enter one message and send it; in a bounded queue, wait for a slot. Raises ``Full`` or ``ShutDown``.

        Each step is noted by the statement, or the C call, that does it: behind a plain assignment no
        signal's handler runs. So whatever raises, what was done is known, and undone or completed.
        """
        ledger, slots = self.ledger, self.slots
        entered = delivered = False
        slot: list[int] = []
        task: list[None] = []
        sent: list[object] = []
        accepted: list[object] = []
        try:
            while True:
                # Owed before it is taken: killed in between, a slot too many comes back, not one too few.
                ledger.own_cell()[BEGUN] += 1
                entered = True
                if ledger.state:
                    raise ShutDown("the queue was shut down")
                if slots is None:
                    break
                try:
                    slot.extend(map(os.eventfd_read, (slots.fileno(),)))
                    break
                except BlockingIOError:
                    ledger.own_cell()[BEGUN] -= 1
                    entered = False
                if (not block or not self._await_slot(slots, deadline)) and not ledger.reclaim_again(_LOOK_EVERY):
                    raise Full(f"the queue holds {self.maxsize} messages")
            if self.tasks:
                task.extend(map(os.eventfd_write, (self.tasks.fileno(),), (1,)))
            if isinstance(item, bytes) and not outlet.backlog:
                try:
                    sent.extend(map(outlet.send_raw, (item,), (SEND_FLAGS,)))
                except BlockingIOError:
                    pass
            else:
                outlet.try_send(item, sent)
            if not sent and not (block and outlet.insist(item, sent)):
                outlet.defer(item, accepted)
                return
            ledger.own_cell()[DELIVERED] += 1
            delivered = True
        except BaseException:
            if accepted:
                raise
            if sent:
                if not delivered:
                    ledger.deliver()
                raise
            if slot and slots:
                slots.add(1)
            if task:
                self.finish(1)
            if entered:
                ledger.cancel()
            if isinstance(item, Message):
                item.unsent()
            raise

    def _await_slot(self, slots: Counter, deadline: float | None) -> bool:
        while True:
            left = remaining(deadline)
            if slots.await_some(deadline_in(_LOOK_EVERY if left is None else min(left, _LOOK_EVERY))):
                return True
            if left is not None and left <= _LOOK_EVERY:
                return False
            self.ledger.reclaim()

    def shut(self, state: int) -> None:
        """Enter that nothing more may be put, and wake everybody who waits for a slot."""
        self.ledger.set_state(max(state, self.ledger.state))
        if self.slots:
            self.slots.add(_MANY)

    # -- taking ------------------------------------------------------------------------------

    def taking(self, count: int = 1) -> None:
        """Announce that messages are about to be taken; ``took`` or ``left`` must follow.

        Only a bounded queue needs it: a slot depends on what becomes of the message.
        """
        if self.slots:
            self.ledger.take(count)

    def took(self, count: int = 1) -> None:
        """``count`` messages were taken. Where a signal's handler raises, they were not."""
        slots, ledger = self.slots, self.ledger
        if not count:
            return
        if slots is None:
            ledger.take(0, count)
            return
        early = min(ledger.ahead, count)
        given: list[None] = []
        try:
            # First: killed in between, a slot too many comes back, not one too few.
            if count > early:
                given.extend(map(os.eventfd_write, (slots.fileno(),), (count - early,)))
            ledger.take(-count, count)
            ledger.ahead -= early
        except BaseException:
            if given:
                # Somebody may have used them by now.
                ledger.ahead += count - early
            raise

    def left(self, count: int = 1) -> None:
        """There was none to take, or it waits in this process for the next taker."""
        if self.slots and count:
            self.ledger.take(-count)

    # -- tasks -------------------------------------------------------------------------------

    def finish(self, count: int) -> bool:
        """``count`` tasks less; False where there were fewer, and no dead process accounts for that."""
        assert self.tasks
        assert self.idle
        taken = sum(self.tasks.take() for _ in range(count))
        # Whoever takes the last one sees zero, and tells; nobody else need.
        if self.tasks.is_zero:
            self.idle.add(1)
        return taken == count or self.ledger.forgiven > 0

    def await_idle(self, glance: Callable[[], bool]) -> None:
        """Wait until there are no tasks. ``glance`` is called again and again; True, if it waited itself."""
        assert self.tasks
        assert self.idle
        while not self.tasks.is_zero:
            if glance():
                continue
            # Lowered only by one who has seen tasks since: whoever else waits need not go now.
            self.idle.take()
            if self.tasks.is_zero:
                return
            if not self.idle.await_some(deadline_in(_LOOK_EVERY)):
                self.ledger.reclaim()
