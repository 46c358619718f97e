"""Who is in a set, how each is waited for, and whose turn it is.

Guarantees: a member is in altogether or not at all, wherever a signal's handler raises.
Relies on: one thread at a time; a set has a lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ._lookout import Lookout
from ._members import Member

#: The most members that have their turn in one go.
_MOST_MEMBERS = 64


class Membership:
    def __init__(self) -> None:
        self._next_id = 0
        self.by_id: dict[int, Member] = {}
        #: By the descriptor that is waited for.
        self._by_fd: dict[int, Member] = {}
        #: Those with messages in user space, and those to look at now and then. By id, next turn first.
        self._holding: dict[int, Member] = {}
        self.glancing: dict[int, Member] = {}
        #: What has messages handed out to members, before these are asked for some.
        self._hand_outs: set[Callable[[], object]] = set()
        #: None after a fork, until it is used again.
        self._lookout: Lookout[Member] | None = None

    def lookout(self) -> Lookout[Member]:
        """What is waited for; all is registered anew after a fork."""
        if self._lookout is None:
            lookout: Lookout[Member] = Lookout()
            try:
                self._by_fd.clear()
                for member in self.by_id.values():
                    self._list(lookout, member)
            except BaseException:
                lookout.close()
                raise
            self._lookout = lookout
        return self._lookout

    def _list(self, lookout: Lookout[Member], member: Member) -> None:
        member.fd = member.fileno()
        _register(lookout, member, member.fd)
        if member.fd >= 0:
            self._by_fd[member.fd] = member
        elif member.holding:
            self._holding[member.id] = member

    def ring(self) -> None:
        """End a wait, or the next one."""
        if self._lookout is not None:
            self._lookout.ring()

    # -- who comes and goes ----------------------------------------------------------------

    def enter(self, member: Member) -> None:
        entered = False
        try:
            self._enter(self.lookout(), member)
            entered = True
        finally:
            if not entered:
                if member.fd not in self._by_fd:
                    self.unregister(member)
                member.leave()

    def _enter(self, lookout: Lookout[Member], member: Member) -> None:
        fd = member.fileno()
        try:
            _register(lookout, member, fd)
        except FileExistsError:
            if fd in self._by_fd:
                raise ValueError(f"descriptor {fd} is a member of this set already") from None
        except PermissionError:
            raise ValueError(f"descriptor {fd} is of a file that is always ready: it can't be waited for") from None
        member.fd = fd
        stale = self._by_fd.get(fd)
        if stale is not None:
            # Its owner has closed it, and the number went to another.
            self.forget(stale)
        if member.hand_out is not None:
            self._hand_outs.add(member.hand_out)
        holding, glancing = member.holding, member.glance is not None
        if holding or glancing:
            # Who waits already has to know.
            lookout.ring()
        # From here on nothing comes between.
        member.id, self._next_id = self._next_id, self._next_id + 1
        if holding:
            self._holding[member.id] = member
        if glancing:
            self.glancing[member.id] = member
        if fd >= 0:
            self._by_fd[fd] = member
        self.by_id[member.id] = member

    def readmit(self, member: Member) -> None:
        """Let one be a member that may have gone already, or in part."""
        lookout = self.lookout()
        try:
            _register(lookout, member, member.fd)
        except FileExistsError:
            pass
        if member.holding:
            self._holding[member.id] = member
            lookout.ring()
        if member.glance is not None:
            self.glancing[member.id] = member
        if member.fd >= 0:
            self._by_fd[member.fd] = member
        self.by_id[member.id] = member

    def unregister(self, member: Member) -> None:
        """Wait for it no more."""
        member.announce(None)
        if self._lookout is not None and member.fd >= 0:
            self._lookout.leave(member.fd)

    def forget(self, member: Member) -> None:
        self.by_id.pop(member.id, None)
        if self._by_fd.get(member.fd) is member:
            del self._by_fd[member.fd]
        self._holding.pop(member.id, None)
        self.glancing.pop(member.id, None)

    # -- whose turn it is ------------------------------------------------------------------

    def turns(self, lookout: Lookout[Member], glance: bool) -> Iterator[Member]:
        """Those who may have something, a few of them; the turn passes on. ``glance``: those to look at, as well."""
        for hand_out in self._hand_outs:
            hand_out()
        for caller in lookout.callers():
            if caller.id in self.by_id:
                self._holding.setdefault(caller.id, caller)
        first = list(self._holding.values())[:_MOST_MEMBERS]
        if glance:
            first += self.glancing.values()
        yield from first
        for fd in lookout.ready(_MOST_MEMBERS):
            member = self._by_fd.get(fd)
            if member is None:
                # What an interrupted ``enter`` has left.
                lookout.leave(fd)
            elif member not in first:
                yield member
        if self._holding:
            lookout.ring()
        else:
            lookout.hush()

    def had_turn(self, member: Member) -> None:
        self._holding.pop(member.id, None)
        if member.holding:
            # Behind the others.
            self._holding[member.id] = member

    def look_at_all(self) -> None:
        """A signal's handler has raised in somebody's turn: see who holds what."""
        self._holding = {member.id: member for member in self.by_id.values() if member.holding}
        if self._holding:
            self.ring()

    # -- the end ---------------------------------------------------------------------------

    def clear(self) -> list[Member]:
        """Forget all; they are still to be unregistered."""
        members = list(self.by_id.values())
        for one in (self.by_id, self._by_fd, self._holding, self.glancing):
            one.clear()
        return members

    def close(self) -> None:
        lookout, self._lookout = self._lookout, None
        if lookout is not None:
            lookout.close()

    def reset_after_fork(self) -> None:
        """What is waited for, and what waits in user space, is the parent's."""
        self._holding.clear()
        self.close()


def _register(lookout: Lookout[Member], member: Member, fd: int) -> None:
    if fd >= 0:
        lookout.enter(fd)
    else:
        member.announce(partial(lookout.call, member))
