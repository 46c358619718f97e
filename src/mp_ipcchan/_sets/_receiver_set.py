"""ReceiverSet: waits for many receivers at once, and gives what has come, undecoded.

One epoll descriptor has all members in it that have a descriptor (``_lookout``), so waiting costs the same with ten
of them and with ten thousand. What else can end a wait rings a bell: messages that wait in user space, where the
kernel doesn't see them (packed ones, or of a receiver that had moved, or of a mux's channel), and what another
thread does to the set.

Guarantees: the messages of one member are reported in order, its end behind them, once. Nobody starves: a call
takes a few messages of each member that has some, and begins the next time with those whose turn didn't come.
What a signal's handler that raises has interrupted is reported by the next call.

Waiting is done without the lock, so what has fired is only a reason to look, with the lock; by then it may be
another's, or gone.
"""

from __future__ import annotations

import os
import threading
import weakref
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, final

from .._deadline import deadline_in, remaining
from .._endpoint import endpoints
from .._inlet import EndOfStream, NoRoom
from .._interrupt import raised_by_handler
from .._message import Incoming, Parcel
from ..errors import Empty, EndpointClosed
from ._events import ChannelClosed, MessageReceived, Ready
from ._lookout import Lookout
from ._members import Member, Selectable, member_for
from ._membership import Membership
from ._undecoded import UndecodedMessage

if TYPE_CHECKING:
    from typing_extensions import Self

Event: TypeAlias = MessageReceived | ChannelClosed | Ready

#: The longest single wait (seconds): epoll takes a C int of milliseconds. Longer waits are several.
_LONGEST = 1_000_000.0


@final
class ReceiverSet:
    """Many receivers, waited for together. Safe from several threads, and stays in its process.

    A receiver moves into the set, and is closed with it unless it was removed. Queues of our contexts, connections of
    our pipes, processes, and plain descriptors (anything with ``fileno()``) can be members, too; they stay their
    owners', who must remove them before they close them. Of receivers, connections and queues the set reports
    ``MessageReceived`` and, once, ``ChannelClosed``; of a descriptor ``Ready`` while it is readable, of a process
    once it has ended.

    After a bare ``os.fork`` both processes have the set; in other children it is closed.
    """

    def __init__(self) -> None:
        self._membership = Membership()
        #: Events that an interrupted call has taken.
        self._kept: list[Event] = []
        self._lock: threading.RLock = threading.RLock()
        #: Whether somebody, who holds the lock, is taking messages.
        self._taking = False
        #: How many threads wait.
        self._waiting = 0
        self._closed = False
        self._open()
        _sets.add(self)
        endpoints.add(self)

    # -- members ---------------------------------------------------------------------------

    def add(self, receiver: Selectable) -> int:
        """Let ``receiver`` be a member; its id, which no other gets. A ``Receiver`` moves into the set.

        Raises ``EndpointMoved`` or ``EndpointClosed`` for a receiver that isn't there, ``ValueError`` for one that is
        being received from, for a member that is one already, and for files that can't be waited for;
        ``EndpointClosed`` where this set is closed; ``OSError`` where the system has no room.
        """
        with self._lock:
            self._open()
            member = member_for(receiver)
            self._membership.enter(member)
            return member.id

    def remove(self, id: int) -> Any:  # noqa: A002  (the contract's name)
        """Take a member out, with the messages that wait for it; ``KeyError`` where there is none of that id.

        Returns what was added: a ``Receiver`` works again. Where a signal's handler raises, it is a member still.
        """
        member = None
        try:
            with self._lock:
                self._open()
                member = self._membership.by_id.get(id)
                if member is None:
                    raise KeyError(f"no member of this set has the id {id}: it has left, or never was one")
                self._give_back_kept(member)
                self._take_out(member)
            # Last: no call comes behind it, where a handler that raises would lose what is returned.
            return member.leave()
        except BaseException:
            if member is not None and not member.has_left:
                with self._lock:
                    self._readmit(member)
            raise

    def _give_back_kept(self, member: Member) -> None:
        """Let a member that leaves take along what an interrupted call had taken."""
        kept = [one.message._incoming for one in self._kept if isinstance(one, MessageReceived) and one.id == member.id]
        held = [incoming for incoming in kept if incoming is not None]
        others = [one for one in self._kept if one.id != member.id]
        try:
            self._kept = others
            member.put_back(held)
        except BaseException:
            # What has got there has left ``held``.
            member.put_back(held)
            raise

    def _readmit(self, member: Member) -> None:
        """A signal's handler has raised in ``remove``, and may have closed the set before."""
        if self._closed:
            member.drop()
        else:
            self._membership.readmit(member)

    def _take_out(self, member: Member) -> None:
        self._membership.unregister(member)
        self._membership.forget(member)
        self._pass_on()

    def __len__(self) -> int:
        return len(self._membership.by_id)

    def __contains__(self, id: object) -> bool:  # noqa: A002
        return id in self._membership.by_id

    # -- waiting ---------------------------------------------------------------------------

    def select(self, timeout: float | None = None) -> list[Event]:
        """Wait until there is something to report, at most ``timeout`` seconds, and report it.

        Raises ``Empty`` when the time is over, ``ValueError`` where it would wait for ever because there are no
        members, ``EndpointClosed`` when the set is closed.
        """
        return self._await(deadline_in(timeout), alone=False)

    def _await(self, deadline: float | None, alone: bool) -> list[Event]:
        """``alone``: wait even where there is no member; another thread will add some."""
        glance = late = False
        while True:
            events = self._collect(glance)
            if events:
                return events
            if deadline is None and not self._membership.by_id and not alone:
                self._pass_on()
                raise ValueError("this set has no members: nothing will ever come")
            if late:
                self._pass_on()
                raise Empty("nothing came for any member of the set")
            left = remaining(deadline)
            longest = min(
                (one.glance or _LONGEST for one in tuple(self._membership.glancing.values())), default=_LONGEST
            )
            glance = not self._wait(longest if left is None else min(left, longest))
            late = left is not None and (not left or (glance and left <= longest))

    def _pass_on(self) -> None:
        """Of those who wait, one is woken at a time: when the set becomes empty, each has to hear of it."""
        with self._lock:
            if not self._membership.by_id and self._waiting:
                self._membership.ring()

    def try_select(self) -> list[Event]:
        """As ``select``, for what is there now, else ``Empty``."""
        events = self._collect(False)
        if not events:
            raise Empty("there is nothing for any member of the set")
        return events

    def fileno(self) -> int:
        """A descriptor that is readable whenever ``select`` has something to report."""
        with self._lock:
            fd: int = self._open().fileno()
            return fd

    def _wait(self, seconds: float) -> bool:
        """Wait for anything to happen; False when the time is over."""
        entered = False
        try:
            with self._lock:
                lookout = self._open()
                self._waiting += 1
                entered = True
            return lookout.wait(seconds)
        finally:
            if entered:
                with self._lock:
                    self._waiting -= 1
                    self._shut_if_closed()

    def _collect(self, glance: bool) -> list[Event]:
        """What there is to report now; the turn passes on."""
        events: list[Event] = []
        try:
            with self._lock:
                if self._taking:
                    # A signal's handler, in the middle of this.
                    return []
                try:
                    self._taking = True
                    turns = self._membership.turns(self._open(), glance)
                    events, self._kept = self._kept, events
                    for member in turns:
                        self._visit(member, events)
                finally:
                    self._taking = False
                    self._shut_if_closed()
        except BaseException:
            with self._lock:
                self._recover(events)
            raise
        return events

    def _recover(self, events: list[Event]) -> None:
        """A signal's handler has raised: what it interrupted is still to be done."""
        self._kept = events + self._kept
        for member in [one for one in self._membership.by_id.values() if one.ended]:
            self._finish(member)
        self._membership.look_at_all()
        if self._kept:
            self._membership.ring()

    def _visit(self, member: Member, events: list[Event]) -> None:
        """Report what ``member`` has, up to a few messages."""
        if member.id not in self._membership.by_id:
            # A signal's handler, or a finalizer, has removed it or closed the set.
            return
        decoding = member.decoding
        if decoding is None:
            events.append(Ready(member.id))
            return
        before = len(events)
        taken: list[Incoming] = []
        ended = False
        broken: Exception | None = None
        try:
            try:
                # In one C call: a signal's handler that raises finds each message here or where it was.
                taken.extend(starmap(member.take, repeat((), member.batch)))
                member.took(True)
            except BlockingIOError:
                member.took(False)
            except EndOfStream:
                ended = True
            except NoRoom as error:
                # Where messages are reported that may have the descriptors, it waits for these to be used; else who
                # decodes it hears of it.
                member.took(False)
                if not any(isinstance(one, Parcel) for one in taken) and not any(map(_holds, events)):
                    broken = error
            except Exception as error:
                if raised_by_handler(error):
                    raise
                # That of one message, which is gone: who decodes it hears of it.
                broken = error
            events.extend(map(MessageReceived, repeat(member.id), map(UndecodedMessage, taken, repeat(decoding))))
        except BaseException:
            member.put_back(taken[len(events) - before :])
            raise
        if broken:
            events.append(MessageReceived(member.id, UndecodedMessage(None, decoding, broken)))
        if ended:
            closed = ChannelClosed(member.id)
            if not member.ended:
                # Nothing comes between these two, so it is reported once.
                member.ended = True
                events.append(closed)
            self._finish(member)
        else:
            self._membership.had_turn(member)

    def _finish(self, member: Member) -> None:
        self._take_out(member)
        member.drop()

    # -- the set itself --------------------------------------------------------------------

    def _open(self) -> Lookout[Member]:
        if self._closed:
            raise EndpointClosed("this ReceiverSet is closed")
        return self._membership.lookout()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Drop the set and every receiver in it; whoever waits in ``select`` gets ``EndpointClosed``."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            members = self._membership.clear()
            self._drop_kept()
            for member in members:
                self._membership.unregister(member)
                member.drop()
            # Who waits would not notice.
            self._membership.ring()
            self._shut_if_closed()

    def _drop_kept(self) -> None:
        kept, self._kept = self._kept, []
        for event in kept:
            if isinstance(event, MessageReceived):
                event.message.close()

    def _shut_if_closed(self) -> None:
        """Close what is the set's own, once nobody is at it any more: the last to leave does it."""
        if self._closed and not self._waiting and not self._taking:
            self._membership.close()

    def _reset_after_fork(self) -> None:
        """The epoll set is the parent's: what was done to it here, would be done there."""
        self._lock = threading.RLock()
        self._taking = False
        self._waiting = 0
        self._drop_kept()
        self._membership.reset_after_fork()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __repr__(self) -> str:
        return f"<mp_ipcchan.ReceiverSet {'closed' if self._closed else f'of {len(self._membership.by_id)}'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ReceiverSet can't be sent: remove its receivers, and send those")


def _holds(event: Event) -> bool:
    """Whether an event may hold descriptors."""
    return isinstance(event, MessageReceived) and event.message.holds_descriptors


_sets: weakref.WeakSet[ReceiverSet] = weakref.WeakSet()


def _reset_after_fork() -> None:
    for one in list(_sets):
        one._reset_after_fork()


os.register_at_fork(after_in_child=_reset_after_fork)
