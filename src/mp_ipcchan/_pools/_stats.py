"""What a pool tells of its workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerStats:
    """A worker of a pool, at one moment.

    ``pid``: of its process. ``state``: "starting" (in its initializer, too), "idle", "busy" or "ending".
    ``tasks_done``: how many tasks it has finished (a chunk of ``map`` is one). ``busy_time``: the seconds that it has
    spent on these. ``memory``: its resident memory in bytes, 0 if it has just died.
    """

    pid: int
    state: str
    tasks_done: int
    busy_time: float
    memory: int
