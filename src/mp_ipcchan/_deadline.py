"""Timeouts: a number of seconds becomes one monotonic deadline that covers the whole call.

``None`` stands for "no deadline" on both sides; what is negative counts as zero.
"""

from __future__ import annotations

import select
from time import monotonic

#: The longest single wait of ``poll``, in milliseconds: it takes a C int. Longer waits are several.
LONGEST = 2**31 - 1


def deadline_in(timeout: float | None) -> float | None:
    """The monotonic time (seconds) at which ``timeout`` seconds from now are over."""
    if timeout is None:
        return None
    try:
        deadline = monotonic() + timeout
    except TypeError:
        raise TypeError(f"a timeout is a number of seconds, or None, not {timeout!r}") from None
    if deadline != deadline:
        raise ValueError("a timeout is a number of seconds, not nan")
    return deadline


def remaining(deadline: float | None) -> float | None:
    """The seconds left until ``deadline``, zero once it has passed."""
    return None if deadline is None else max(0.0, deadline - monotonic())


def wait_for(fd: int, events: int, deadline: float | None, *others: int) -> bool:
    """Wait until ``poll`` reports ``fd``, or one of ``others``, for ``events`` (or an error); False at the deadline."""
    poller = select.poll()
    for one in (fd, *others):
        poller.register(one, events)
    while True:
        left = remaining(deadline)
        ready = poller.poll(None if left is None else min(left * 1000, LONGEST))
        if ready:
            return True
        if left is not None and left * 1000 <= LONGEST:
            return False
