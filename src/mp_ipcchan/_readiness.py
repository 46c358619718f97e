"""Waiting for a descriptor in a coroutine, on asyncio or trio, without a thread.

Neither is imported, nor needed: the one that runs the caller has been imported.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def _trio() -> Any:
    """The module trio, where it runs the caller."""
    trio = sys.modules.get("trio")
    try:
        return trio if trio is not None and trio.lowlevel.current_task() else None
    except RuntimeError:
        return None


async def readable(fd: int) -> None:
    """Wait until ``fd`` is readable. Several may wait for the same, and it may be closed meanwhile."""
    # A duplicate of its own: loops know one callback a descriptor, and the caller may have theirs there.
    own = os.dup(fd)
    try:
        trio = _trio()
        if trio is not None:
            await trio.lowlevel.wait_readable(own)
        else:
            await _asyncio_readable(own)
    finally:
        os.close(own)


async def _asyncio_readable(fd: int) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def pause(seconds: float) -> None:
    """Let others run for ``seconds``; here a caller that was cancelled hears of it."""
    trio = _trio()
    if trio is not None:
        await trio.sleep(seconds)
    else:
        import asyncio

        await asyncio.sleep(seconds)
