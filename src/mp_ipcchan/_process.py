"""Starting processes: which endpoints a child gets, by fork, spawn or forkserver alike.

Senders among a process's arguments (and in the closure of its target) are copied, receivers move;
what a forked child inherits without being given it, it closes. So a stream ends at the same moment
whichever way the processes were started.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing import (
    context,
    popen_fork,
    popen_forkserver,
    popen_spawn_posix,
    reduction,
    resource_tracker,
    spawn,
    util,
)
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from . import _drainer
from ._channel import detach
from ._endpoint import Endpoint, ReceivingEnd, endpoints, withheld
from ._fd import Fd
from ._link import in_transit
from ._message import Handle, MovingHandle
from ._reach import endpoints_within
from ._transport._carrier import Carrier


class ForkPopen(popen_fork.Popen):
    """Fork, then close in the child what it wasn't given."""

    def _launch(self, process_obj: BaseProcess) -> None:
        # Looking through the arguments of a program that has no channels would cost it for nothing.
        given = endpoints_within(vars(process_obj)) if len(endpoints) else []
        for argument in (*process_obj._args, *process_obj._kwargs.values()):  # type: ignore[attr-defined]
            if isinstance(argument, Endpoint):
                # Moved or closed: said here, as where it would be pickled, and not by the child alone.
                argument._open_link()
        moving: list[MovingHandle] = []
        try:
            for endpoint in given:
                moving += _moving_with(endpoint)
            self._fork(process_obj, given, moving)
        except BaseException:
            for handle in reversed(moving):
                handle.unsent()
            raise
        for handle in moving:
            handle.sent()

    def _fork(self, process_obj: BaseProcess, given: Sequence[object], moving: list[MovingHandle]) -> None:
        bootstrap: Callable[..., int] = process_obj._bootstrap  # type: ignore[attr-defined]

        def run(*args: Any, **options: Any) -> int:
            # In the child: what moved arrives here.
            for handle in reversed(moving):
                handle.arrive()
            kept = {id(endpoint) for endpoint in given}
            for endpoint in list(endpoints):
                if id(endpoint) not in kept:
                    withheld.add(endpoint)
                    endpoint.close()
            for left_behind in list(in_transit):
                left_behind.sent()
            try:
                return bootstrap(*args, **options)
            finally:
                _drainer.send_rest()

        # The stdlib's Popen calls this in the child; the child's copy of ``run`` dies with its process.
        process_obj._bootstrap = run  # type: ignore[attr-defined]
        try:
            super()._launch(process_obj)  # type: ignore[misc]
        finally:
            del process_obj._bootstrap  # type: ignore[attr-defined]


def _moving_with(endpoint: Endpoint) -> Sequence[MovingHandle]:
    """What goes with ``endpoint`` into a forked child, which inherits all else; nothing where it is closed."""
    if endpoint.closed:
        return ()
    handles = detach(endpoint)[1] if isinstance(endpoint, ReceivingEnd) else endpoint._moving()
    for handle in handles:
        # Some make their descriptor now, and it is to be inherited.
        handle.fileno()
    return handles


class Launch:
    """What spawn and forkserver have in common: handles on their way into the child."""

    def __init__(self, process_obj: BaseProcess) -> None:
        self._lent: list[Handle] = []
        self._duplicates: list[int] = []
        try:
            super().__init__(process_obj)  # type: ignore[call-arg]
        except BaseException:
            for handle in reversed(self._lent):
                handle.unsent()
            raise
        finally:
            for fd in self._duplicates:
                os.close(fd)
            self._duplicates.clear()
        for handle in self._lent:
            handle.sent()
        self._lent.clear()

    def lend(self, handle: Handle) -> Any:
        """Pass ``handle`` to the child that is being started; what to pickle in its place, with ``detach()``."""
        self._lent.append(handle)
        return self._pass(handle.fileno())

    def _pass(self, fd: int) -> Any:
        # A duplicate of its own: two endpoints may share a descriptor, which could be inherited only once.
        duplicate = os.dup(fd)
        self._duplicates.append(duplicate)
        return self.DupFd(self.duplicate_for_child(duplicate))  # type: ignore[attr-defined]


class SpawnPopen(Launch, popen_spawn_posix.Popen):
    """Start a fresh interpreter."""

    def _launch(self, process_obj: BaseProcess) -> None:
        # Not the stdlib's, which has the reading end of the pipe itself while it writes what the child is to do: where
        # that is more than a pipe holds, and the child is killed before it has read it, it waits for ever.
        tracker = resource_tracker.getfd()
        orders = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj._name), orders)  # type: ignore[attr-defined]
            reduction.dump(process_obj, orders)
        finally:
            context.set_spawning_popen(None)
        reading, writing = map(Fd._own, os.pipe())
        sentinel, held = map(Fd._own, os.pipe())
        with reading, held:
            command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=reading.fileno())
            passed = (*self._fds, tracker, reading.fileno(), held.fileno())  # type: ignore[attr-defined]
            self.pid = util.spawnv_passfds(spawn.get_executable(), command, passed)  # type: ignore[arg-type]
        self.sentinel = sentinel.detach()
        # Open as long as this process has the child, which takes its end for ours.
        kept = writing.detach()
        self.finalizer = util.Finalize(self, util.close_fds, (self.sentinel, kept))  # type: ignore[attr-defined]
        # A child that doesn't read has ended, or is about to: its exit code tells of it, however much it was to read.
        with contextlib.suppress(BrokenPipeError), open(kept, "wb", closefd=False) as file:
            file.write(orders.getbuffer())


class ForkServerPopen(Launch, popen_forkserver.Popen):
    """Ask the fork server, which takes some 250 descriptors at a time; further ones go in carriers."""

    #: Descriptors that go directly.
    _DIRECT = 100

    def __init__(self, process_obj: BaseProcess) -> None:
        #: Held by who reads the exit code.
        self._collecting = threading.RLock()
        self._carrier: Carrier | None = None
        self._carrier_token: Any = None
        try:
            super().__init__(process_obj)
        finally:
            if self._carrier:
                self._carrier.close()
                self._carrier = None

    # The server writes a child's pid to a pipe, and later its exit code. Who has seen that something is there reads it,
    # by number. In between, another thread may read it, close the process and start the next, whose pipe takes that
    # number: its pid would be read here, and who starts it would wait for it for ever.

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """The exit code; with ``WNOHANG`` None as long as there is none, or another thread is about to have it."""
        if flag != os.WNOHANG:
            return self.wait()
        # Never waits for the lock: a forked child may ask, and inherit it held.
        if self.returncode is None and self._collecting.acquire(blocking=False):
            try:
                super().poll()
            finally:
                self._collecting.release()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code, once the child has ended; None after ``timeout`` seconds."""
        with self._collecting:
            if self.returncode is not None:
                return self.returncode
            # Nobody closes it before there is an exit code.
            sentinel = Fd(self.sentinel)
        with sentinel:
            ended = wait([sentinel.fileno()], timeout)
        with self._collecting:
            return self.poll() if ended else None

    def _pass(self, fd: int) -> Any:
        if len(self._duplicates) < self._DIRECT:
            return super()._pass(fd)
        if self._carrier is None or not self._carrier.add([fd]):
            if self._carrier is not None:
                self._carrier.close()
            self._carrier = Carrier()
            self._carrier_token = super()._pass(self._carrier.fileno())
            self._carrier.add([fd])
        return _CarriedFd(self._carrier_token, self._carrier.count - 1)


class _CarriedFd:
    """A descriptor in a carrier, as seen by the child."""

    def __init__(self, carrier: Any, position: int) -> None:
        self._carrier = carrier
        self._position = position

    def detach(self) -> int:
        fd: int = self._carrier.detach()
        if fd not in _unloaded:
            _unloaded[fd] = Carrier.unload_all(fd)
        return _unloaded[fd][self._position]


#: Carriers that this process was started with, and what was in them.
_unloaded: dict[int, list[int]] = {}


class _Ending:
    """A process that, as the last thing it does, sends what its threads have left."""

    def _bootstrap(self, *args: Any, **options: Any) -> int:
        try:
            return super()._bootstrap(*args, **options)  # type: ignore[misc,no-any-return]
        finally:
            _drainer.send_rest()


class ForkProcess(context.ForkProcess):
    # A child makes the context of this name its default before it runs its target.
    _start_method = "ipcchan_fork"

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> ForkPopen:
        return ForkPopen(process_obj)


class SpawnProcess(_Ending, context.SpawnProcess):
    _start_method = "ipcchan_spawn"

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> SpawnPopen:
        return SpawnPopen(process_obj)


class ForkServerProcess(_Ending, context.ForkServerProcess):
    _start_method = "ipcchan_forkserver"

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> ForkServerPopen:
        return ForkServerPopen(process_obj)
