"""ReceiverSet: waits for many receivers at once, and gives what has come, undecoded.

One epoll descriptor has all members in it, so waiting costs the same with ten of them and with ten
thousand. Two more things can end a wait, and are shown by an eventfd that is in there, too: messages that wait in
user space, where the kernel doesn't see them (packed ones, or of a receiver that had moved), and what
another thread does to the set.

Guarantees: the messages of one member are reported in order, its end behind them, once. Nobody starves: a call
takes a few messages of each member that has some, and begins the next time with those whose turn didn't come.
What a signal's handler that raises has interrupted is reported by the next call.

Relies on: a member leaves epoll before its descriptor is closed or moves. One that is open elsewhere would go on
firing, and could not be taken out by anybody. Waiting is done without the lock, so what has fired is only
a reason to look, with the lock; by then it may be another's, or gone.
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections.abc import Callable
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, final

from .._deadline import deadline_in, remaining
from .._endpoint import endpoints
from .._inlet import EndOfStream, NoRoom
from .._interrupt import raised_by_handler
from .._message import Incoming, Parcel
from ..errors import Empty, EndpointClosed
from ._events import ChannelClosed, MessageReceived, Ready
from ._members import Member, Selectable, member_for
from ._undecoded import UndecodedMessage

if TYPE_CHECKING:
    from typing_extensions import Self

Event: TypeAlias = MessageReceived | ChannelClosed | Ready
# By another name, because a method of the set has the module's.
_Epoll: TypeAlias = select.epoll

#: The most members that have their turn in one call.
_MOST_MEMBERS = 64
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
        self._next_id = 0
        self._members: dict[int, Member] = {}
        #: By the descriptor that is waited for.
        self._by_fd: dict[int, Member] = {}
        #: Those with messages in user space, and those to look at now and then. By id, next turn first.
        self._holding: dict[int, Member] = {}
        self._glancing: dict[int, Member] = {}
        #: What has messages handed out to members, before these are asked for some.
        self._hand_outs: set[Callable[[], object]] = set()
        #: Events that an interrupted call has taken.
        self._kept: list[Event] = []
        self._lock: threading.RLock = threading.RLock()
        #: Whether somebody, who holds the lock, is taking messages.
        self._taking = False
        #: How many threads wait.
        self._waiting = 0
        self._closed = False
        #: None after a fork, until the set is used again.
        self._epoll: _Epoll | None = None
        self._event = -1
        #: Whether the eventfd may be raised.
        self._raised = False
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
            epoll = self._open()
            member = member_for(receiver)
            entered = False
            try:
                self._enter(epoll, member)
                entered = True
            finally:
                if not entered:
                    if member.fd >= 0 and member.fd not in self._by_fd:
                        self._unregister(member)
                    member.leave()
            return member.id

    def _enter(self, epoll: _Epoll, member: Member) -> None:
        fd = member.fileno()
        try:
            epoll.register(fd, select.EPOLLIN)
        except FileExistsError:
            if fd in self._by_fd:
                raise ValueError(f"descriptor {fd} is a member of this set already") from None
        except PermissionError:
            raise ValueError(f"descriptor {fd} is of a file that is always ready: it can't be waited for") from None
        member.fd = fd
        stale = self._by_fd.get(fd)
        if stale is not None:
            # Its owner has closed it, and the number went to another.
            self._forget(stale)
        if member.hand_out is not None:
            self._hand_outs.add(member.hand_out)
        holding, glancing = member.holding, member.glance is not None
        if holding or glancing:
            # Who waits already has to know.
            self._raise()
        # From here on nothing comes between: it is a member altogether or not at all.
        member.id, self._next_id = self._next_id, self._next_id + 1
        if holding:
            self._holding[member.id] = member
        if glancing:
            self._glancing[member.id] = member
        self._by_fd[fd] = self._members[member.id] = member

    def remove(self, id: int) -> Any:  # noqa: A002  (the contract's name)
        """Take a member out, with the messages that wait for it; ``KeyError`` where there is none of that id.

        Returns what was added: a ``Receiver`` works again.
        """
        with self._lock:
            self._open()
            member = self._members.get(id)
            if member is None:
                raise KeyError(f"no member of this set has the id {id}: it has left, or never was one")
            kept = [one.message._incoming for one in self._kept if isinstance(one, MessageReceived) and one.id == id]
            self._kept = [one for one in self._kept if one.id != id]
            self._unregister(member)
            self._forget(member)
            member.put_back([incoming for incoming in kept if incoming is not None])
            return member.leave()

    def _unregister(self, member: Member) -> None:
        if self._epoll is None:
            return
        try:
            self._epoll.unregister(member.fd)
        except OSError:
            # Its owner has closed it: then the kernel has done this.
            pass

    def _forget(self, member: Member) -> None:
        del self._members[member.id]
        if self._by_fd.get(member.fd) is member:
            del self._by_fd[member.fd]
        self._holding.pop(member.id, None)
        self._glancing.pop(member.id, None)
        if not self._members and self._waiting:
            # Who waits would do so for ever.
            self._raise()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, id: object) -> bool:  # noqa: A002
        return id in self._members

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
            if deadline is None and not self._members and not alone:
                self._pass_on()
                raise ValueError("this set has no members: nothing will ever come")
            if late:
                self._pass_on()
                raise Empty("nothing came for any member of the set")
            left = remaining(deadline)
            longest = min((one.glance or _LONGEST for one in tuple(self._glancing.values())), default=_LONGEST)
            glance = not self._wait(longest if left is None else min(left, longest))
            late = left is not None and (not left or (glance and left <= longest))

    def _pass_on(self) -> None:
        """Of those who wait, one is woken at a time: when the set becomes empty, each has to hear of it."""
        with self._lock:
            if not self._members and self._waiting:
                self._raise()

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
                epoll = self._open()
                self._waiting += 1
                entered = True
            return bool(epoll.poll(seconds, 1))
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
                    epoll = self._open()
                    events, self._kept = self._kept, events
                    self._collect_into(events, epoll, glance)
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
        for member in [one for one in self._members.values() if one.ended]:
            self._finish(member)
        self._holding = {member.id: member for member in self._members.values() if member.holding}
        if self._kept or self._holding:
            self._raise()

    def _collect_into(self, events: list[Event], epoll: _Epoll, glance: bool) -> None:
        for hand_out in self._hand_outs:
            hand_out()
        first = list(self._holding.values())[:_MOST_MEMBERS]
        if glance:
            first += self._glancing.values()
        for member in first:
            self._visit(member, events)
        for fd, _ in epoll.poll(0, _MOST_MEMBERS):
            ready = self._by_fd.get(fd)
            if ready is None:
                self._refuse(epoll, fd)
            elif ready not in first:
                self._visit(ready, events)
        if self._holding:
            self._raise()
        elif self._raised:
            self._clear()

    def _visit(self, member: Member, events: list[Event]) -> None:
        """Report what ``member`` has, up to a few messages."""
        if member.id not in self._members:
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
            self._holding.pop(member.id, None)
            if member.holding:
                # Behind the others.
                self._holding[member.id] = member

    def _finish(self, member: Member) -> None:
        self._unregister(member)
        self._forget(member)
        member.drop()

    def _refuse(self, epoll: _Epoll, fd: int) -> None:
        """Something fired that is no member: our own eventfd, or what an interrupted ``add`` has left."""
        if fd != self._event:
            try:
                epoll.unregister(fd)
            except OSError:
                # It was one, and has been closed since.
                pass

    def _raise(self) -> None:
        if self._event >= 0:
            self._raised = True
            os.eventfd_write(self._event, 1)

    def _clear(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            pass
        # Not before: interrupted in between, it is cleared the next time.
        self._raised = False

    # -- the set itself --------------------------------------------------------------------

    def _open(self) -> _Epoll:
        """The epoll descriptor; all is registered anew after a fork."""
        if self._closed:
            raise EndpointClosed("this ReceiverSet is closed")
        if self._epoll is None:
            epoll = select.epoll()
            try:
                self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                epoll.register(self._event, select.EPOLLIN)
                self._by_fd.clear()
                for member in self._members.values():
                    member.fd = member.fileno()
                    epoll.register(member.fd, select.EPOLLIN)
                    self._by_fd[member.fd] = member
            except BaseException:
                epoll.close()
                self._close_event()
                raise
            self._epoll = epoll
        return self._epoll

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Drop the set and every receiver in it; whoever waits in ``select`` gets ``EndpointClosed``."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            members = list(self._members.values())
            self._members.clear()
            self._holding.clear()
            self._glancing.clear()
            self._by_fd.clear()
            self._drop_kept()
            for member in members:
                self._unregister(member)
                member.drop()
            # Who waits would not notice.
            self._raise()
            self._shut_if_closed()

    def _drop_kept(self) -> None:
        kept, self._kept = self._kept, []
        for event in kept:
            if isinstance(event, MessageReceived):
                event.message.close()

    def _shut_if_closed(self) -> None:
        """Close what is the set's own, once nobody is at it any more: the last to leave does it."""
        if self._closed and not self._waiting and not self._taking:
            self._shut()

    def _shut(self) -> None:
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()
        self._close_event()

    def _close_event(self) -> None:
        fd, self._event = self._event, -1
        self._raised = False
        if fd >= 0:
            os.close(fd)

    def _reset_after_fork(self) -> None:
        """The epoll set is the parent's: what was done to it here, would be done there."""
        self._lock = threading.RLock()
        self._taking = False
        self._waiting = 0
        # What waits in user space, as well.
        self._holding.clear()
        self._drop_kept()
        self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __repr__(self) -> str:
        return f"<mp_ipcchan.ReceiverSet {'closed' if self._closed else f'of {len(self._members)}'}>"

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
