"""Runs a system in a shape, in child processes, and takes the time.

A round: the parent makes the transport and forks the children. Each sends or receives a few messages
(so that connections are up and threads are started), reports that it is ready, and waits. The parent
lets the consumers go, then the producers. A producer notes when it sends its first message, a consumer
when it has its last, on the one monotonic clock that all processes share; the round took from the
earliest of these moments to the latest. Then each reports the processor time that it used, threads
included, which depends far less on what else the machine does. Children exit when all have reported,
so that neither start nor exit is in the times.

Children report through stock pipes, never through what is measured, and nothing waits without a
limit: who isn't done in time is asked for its stack, killed, and reported as failed.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from .floors import Floor
from .shapes import Shape
from .systems import SURVEYED, System

#: After a round's limit (seconds), how long until what still hangs is killed by the kernel or interrupted.
_GRACE = 5.0
#: How much longer than wanted a round is planned, since others may slow down the run that it is planned by.
_MARGIN = 1.4

_fork = multiprocessing.get_context("fork")


class RoundError(Exception):
    """A system didn't do what the shape asks of it: in a line, and with the traceback or stacks that show where."""

    def __init__(self, summary: str, detail: str = "") -> None:
        super().__init__(summary)
        self.detail = detail


@dataclass
class Outcome:
    """What came of one system in one shape."""

    system: str
    baseline: str | None
    #: Why it was not measured (not installed).
    skipped: str | None = None
    #: Why it was given up, though earlier rounds may have passed.
    failed: str | None = None
    #: The traceback or stacks of the failure.
    detail: str = ""
    #: Messages or round trips of a round.
    count: int = 0
    #: One figure a round, in the shape's unit.
    figures: list[float] = field(default_factory=list)
    #: The processor time of a message or round trip (microseconds), all processes together, one a round.
    cpu: list[float] = field(default_factory=list)
    #: The unit of the figures, where they are not a shape's.
    unit: str | None = None
    #: How much the processes that send, and those that receive, grew at most (bytes), one pair a round.
    memory: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Times:
    """What a round took, in seconds, and how much the processes grew meanwhile, in bytes."""

    elapsed: float
    cpu: float
    sender: int = 0
    receiver: int = 0


def run_shape(
    shape: Shape, systems: list[System | Floor], rounds: int, limit: float, progress: Callable[[str], None]
) -> list[Outcome]:
    """Measure ``systems`` in ``shape``, interleaved, so that what else the machine does meets all alike."""
    entries = [
        (system, Outcome(system.name, system.baseline))
        for system in systems
        if system.fits(shape) and (not shape.survey or system.name in SURVEYED)
    ]
    for system, outcome in entries:
        progress(f"{shape.name}: calibrating {system.name}")
        absent = [name for name in (system.module, shape.payload.module) if name and find_spec(name) is None]
        if absent:
            outcome.skipped = f"{absent[0]} is not installed"
            continue
        try:
            outcome.count = calibrate(system, shape, limit)
        except RoundError as failure:
            outcome.failed, outcome.detail = f"while calibrating: {failure}", failure.detail
    for number in range(1, rounds + 1):
        for system, outcome in entries:
            if outcome.skipped or outcome.failed:
                continue
            progress(f"{shape.name}: round {number} of {rounds}, {system.name}")
            try:
                times = measure(system, shape, outcome.count, limit)
            except RoundError as failure:
                outcome.failed, outcome.detail = f"in round {number}: {failure}", failure.detail
            else:
                outcome.figures.append(shape.figure(outcome.count, times.elapsed))
                outcome.cpu.append(times.cpu / outcome.count * 1e6)
                outcome.memory.append((times.sender, times.receiver))
    return [outcome for _, outcome in entries]


def calibrate(system: System | Floor, shape: Shape, limit: float) -> int:
    """How many messages make a round as long as ``shape`` wants it."""
    share = shape.producers * shape.consumers
    # Some queues are unbounded: in the worst case all messages of a round wait in memory.
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = max(shape.least, memory // 2 // shape.payload.nbytes // share * share)
    count = shape.least
    while True:
        elapsed = measure(system, shape, count, limit).elapsed
        # A run of a quarter of the length is long enough to go by; a shorter one says little, so go on in steps.
        reliable = elapsed >= shape.seconds / 4
        factor = _MARGIN * shape.seconds / elapsed
        wanted = math.ceil(count * (factor if reliable else min(10.0, factor)) / share) * share
        count, last = min(most, max(shape.least, wanted)), count
        if reliable or count == last:
            return count


def measure(system: System | Floor, shape: Shape, count: int, limit: float) -> Times:
    """The time that ``count`` messages took; ``count`` is a multiple of producers times consumers.

    Raises ``RoundError``, after at most ``limit`` seconds and a little.
    """
    if isinstance(system, Floor):
        try:
            elapsed, cpu = system.run(shape, count, limit)
        except Exception as error:
            raise RoundError(_last_line(error), traceback.format_exc()) from error
        return Times(elapsed, cpu)
    try:
        with _interrupt_after(limit + _GRACE):
            try:
                system.make(shape)
                with closing(_Crew(limit)) as crew:
                    for name, role in _roles(system, shape, count):
                        crew.start(name, role)
                    crew.gather("warming up")
                    crew.release()
                    moments = [moment for report in crew.gather("sending and receiving") for moment in report]
                    crew.release()
                    usage = crew.gather("reporting")
                    crew.join()
            finally:
                system.close()
    except RoundError:
        raise
    except Exception as error:
        raise RoundError(f"{_last_line(error)}, in the parent", traceback.format_exc()) from error
    # Receivers were started first.
    receivers = 1 if shape.round_trip else shape.consumers
    grown = [int(growth) for _, growth in usage]
    return Times(
        max(moments) - min(moments), sum(cpu for cpu, _ in usage), sum(grown[receivers:]), sum(grown[:receivers])
    )


@contextmanager
def _interrupt_after(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in this, the main thread, if making or closing a transport hangs."""

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"the parent hung for {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- what the children do ----------------------------------------------------------------------


class _Gate:
    """A child's line to the parent."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._cpu = 0.0
        self._size = 0

    def wait(self) -> None:
        """Report that this child is ready, and wait for the start."""
        self._line.send(())
        self._line.recv()
        self._size = resident(peak=False)
        self._cpu = time.process_time()

    def finish(self, *moments: float) -> None:
        """Report ``moments``, wait until all have, and then the processor time and the growth since the start.

        Until then threads may still be sending what this child has put.
        """
        self._line.send(moments)
        self._line.recv()
        self._line.send((time.process_time() - self._cpu, max(0, resident(peak=True) - self._size)))

    def fail(self, error: Exception) -> None:
        self._line.send(RoundError(_last_line(error), traceback.format_exc()))


def resident(*, peak: bool) -> int:
    """The memory that this process has in use (bytes), or the most it had since it asked last without ``peak``."""
    if not peak:
        # Begins to count the most anew.
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


_Role = Callable[[_Gate], None]


def _roles(system: System, shape: Shape, count: int) -> Iterator[tuple[str, _Role]]:
    """The children of a round, receivers first: they are to be up before anything is sent."""
    if shape.round_trip:
        yield "server", partial(_serve, system, shape, count)
        yield "client", partial(_ask, system, shape, count)
        return
    for index in range(shape.consumers):
        yield f"consumer {index}", partial(_consume, system, shape, index, count)
    for index in range(shape.producers):
        yield f"producer {index}", partial(_produce, system, shape, count)


def _consume(system: System, shape: Shape, index: int, count: int, gate: _Gate) -> None:
    receive = system.receiver(index)
    receive(shape.payload, shape.warm_up * shape.producers)
    gate.wait()
    last = receive(shape.payload, count // shape.consumers)
    end = time.monotonic()
    shape.payload.check(last)
    gate.finish(end)


def _produce(system: System, shape: Shape, count: int, gate: _Gate) -> None:
    send = system.sender()
    send(shape.payload.messages(shape.warm_up * shape.consumers))
    messages = shape.payload.messages(count // shape.producers)
    gate.wait()
    start = time.monotonic()
    send(messages)
    gate.finish(start)


def _ask(system: System, shape: Shape, count: int, gate: _Gate) -> None:
    ends = system.client()
    put, get = ends.put, ends.get
    obj = answer = shape.payload.build()
    for _ in repeat(None, shape.warm_up):
        put(obj)
        get()
    gate.wait()
    start = time.monotonic()
    for _ in repeat(None, count):
        put(obj)
        answer = get()
    end = time.monotonic()
    shape.payload.check(answer)
    gate.finish(start, end)


def _serve(system: System, shape: Shape, count: int, gate: _Gate) -> None:
    ends = system.server()
    put, get = ends.put, ends.get
    for _ in repeat(None, shape.warm_up):
        put(get())
    gate.wait()
    for _ in repeat(None, count):
        put(get())
    gate.finish()


def _run_child(role: _Role, line: Connection, stacks: BinaryIO, limit: float) -> None:
    # The parent answers Ctrl-C for all. Should it be killed, this child ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(limit + 2 * _GRACE))
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    gate = _Gate(line)
    try:
        role(gate)
    except Exception as error:
        gate.fail(error)


def _last_line(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip()


# -- what the parent does ----------------------------------------------------------------------


@dataclass
class _Member:
    name: str
    process: BaseProcess
    line: Connection
    stacks: BinaryIO


class _Crew:
    """The children of one round. Whoever is left at its end is killed."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._deadline = time.monotonic() + limit
        self._members: list[_Member] = []

    def close(self) -> None:
        for member in self._members:
            if member.process.is_alive():
                member.process.kill()
        for member in self._members:
            member.process.join()
            member.process.close()
            member.line.close()
            member.stacks.close()

    def start(self, name: str, role: _Role) -> None:
        ours, theirs = _fork.Pipe()
        stacks = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the crew)
        process = _fork.Process(target=_run_child, args=(role, theirs, stacks, self._limit), daemon=True)
        process.start()
        theirs.close()
        self._members.append(_Member(name, process, ours, stacks))

    def gather(self, step: str) -> list[tuple[float, ...]]:
        """One report from each child, in the order in which they were started."""
        reports: dict[str, tuple[float, ...]] = {}
        missing = {member.line: member for member in self._members}
        while missing:
            ready = wait(list(missing), max(0.0, self._deadline - time.monotonic()))
            if not ready:
                raise self._hung(list(missing.values()), step)
            for line in ready:
                assert isinstance(line, Connection)
                member = missing.pop(line)
                try:
                    report = line.recv()
                except EOFError:
                    member.process.join(_GRACE)
                    raise RoundError(f"{member.name} died while {step}, exit code {member.process.exitcode}") from None
                if isinstance(report, RoundError):
                    raise RoundError(f"{report} in {member.name}, while {step}", report.detail)
                reports[member.name] = report
        return [reports[member.name] for member in self._members]

    def release(self) -> None:
        """Let every child go on, in the order in which they were started."""
        for member in self._members:
            member.line.send(None)

    def join(self) -> None:
        for member in self._members:
            member.process.join(max(0.0, self._deadline - time.monotonic()))
        late = [member for member in self._members if member.process.is_alive()]
        if late:
            raise self._hung(late, "exiting")
        for member in self._members:
            if member.process.exitcode:
                raise RoundError(f"{member.name} ended with exit code {member.process.exitcode}")

    def _hung(self, members: list[_Member], step: str) -> RoundError:
        """The failure, with where each of ``members`` hangs."""
        for member in members:
            if member.process.is_alive() and member.process.pid is not None:
                os.kill(member.process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        stacks = []
        for member in members:
            member.stacks.seek(0)
            stacks.append(f"{member.name}:\n{member.stacks.read().decode(errors='replace')}")
        names = ", ".join(member.name for member in members)
        return RoundError(f"{names} not done after {self._limit:.0f} s, while {step}", "".join(stacks))
