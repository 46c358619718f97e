"""Workers die in every state, and the pool goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor, WorkerLostError, channel
from mp_ipcchan._pools import _crew
from mp_ipcchan._pools._resident import OutOfMemoryKills, readable

from ..conformance._support import InThread
from . import _tasks as tasks
from ._support import FORK, LIMIT, ROOT, eventually, runs, workers


def _dice() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


@contextmanager
def _killing(dice: random.Random, victims: Callable[[], set[int]]) -> Iterator[set[int]]:
    """Kill one of ``victims`` every 20 ms. Gives those that were."""
    killed: set[int] = set()
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(dice.uniform(0.0, 0.04)):
            alive = sorted(victims())
            if alive:
                victim = dice.choice(alive)
                killed.add(victim)
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:  # forkserver has collected it
                    pass

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        stop.set()
        killer.join()


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_kill_storm(start_method: str) -> None:
    """2,000 tasks while a worker is killed at a random instant every 20 ms: only tasks that ran on one are lost.

    Under spawn and forkserver fewer, and only workers that have worked: one takes longer to start than it would live.
    """
    dice = _dice()
    count = 2000 if start_method == "fork" else 100
    worked: set[int] = set()
    with ProcessPoolExecutor(2, multiprocessing.get_context(f"ipcchan_{start_method}")) as executor:
        futures = [executor.submit(tasks.sleep_and_tell, 0.001, x) for x in range(count)]
        for future in futures:
            future.add_done_callback(lambda done: worked.add(done.result()[0]) if not done.exception() else None)
        with _killing(dice, lambda: workers() if start_method == "fork" else workers() & worked) as killed:
            _, pending = wait(futures, LIMIT * 3)
        assert not pending
    errors = [future.exception() for future in futures]
    assert [future.result()[1] for future, error in zip(futures, errors, strict=True) if error is None] == [
        x for x, error in enumerate(errors) if error is None
    ]
    lost = [error for error in errors if error is not None]
    assert all(isinstance(error, WorkerLostError) and error.pid in killed for error in lost)
    # A worker loses one task, the one that it ran.
    assert len({error.pid for error in lost if isinstance(error, WorkerLostError)}) == len(lost)


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_kill_storm_over_a_pool(start_method: str) -> None:
    """Every call ends, with right results or with the loss of a task that ran on a worker that was killed."""
    dice = _dice()
    worked: set[int] = set()
    lost: list[WorkerLostError] = []

    def take(call: Callable[[], Any]) -> Any:
        """What ``call`` gives, without the pids of those who did it; None for what was lost."""
        try:
            found = call()
        except WorkerLostError as error:
            lost.append(error)
            return None
        each = found if isinstance(found, list) else [found]
        worked.update(pid for pid, _ in each)
        return [x for _, x in each] if isinstance(found, list) else found[1]

    pool = multiprocessing.get_context(f"ipcchan_{start_method}").Pool(2)
    items = [(0.001, x) for x in range(20)]
    with pool, _killing(dice, lambda: workers() if start_method == "fork" else workers() & worked) as killed:
        for _ in range(30 if start_method == "fork" else 4):
            single = [pool.apply_async(tasks.sleep_and_tell, item) for item in items]
            mapped = pool.starmap_async(tasks.sleep_and_tell, items, dice.choice([1, 3, None]))
            size = dice.choice([1, 4])
            stream = pool.imap(tasks.tell, range(20), size)
            for x, result in enumerate(single):
                assert take(partial(result.get, LIMIT)) in (x, None)
            assert take(partial(mapped.get, LIMIT)) in ([*range(20)], None)
            taken, before = [], len(lost)
            with suppress(StopIteration):
                while True:
                    taken.append(take(partial(stream.next, LIMIT)))
            taken = [x for x in taken if x is not None]
            assert taken == sorted(set(taken))
            # A chunk is lost as one.
            assert len(taken) == 20 - size * (len(lost) - before)
    InThread(pool.join).result()
    assert all(error.pid in killed for error in lost)


def test_death_while_starting(start_method: str) -> None:
    """Killed before they say a word: others take their place, and no task is lost."""
    with ProcessPoolExecutor(2, multiprocessing.get_context(f"ipcchan_{start_method}")) as executor:
        futures = [executor.submit(tasks.square, x) for x in range(4)]
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
        for x, future in enumerate(futures):
            # One may be faster, and run a task.
            error = future.exception(LIMIT)
            assert future.result() == x * x if error is None else isinstance(error, WorkerLostError)
        assert executor.submit(tasks.square, 9).result(LIMIT) == 81


@pytest.mark.parametrize("initializing", [False, True])
def test_deaths_of_those_who_start(start_method: str, initializing: bool, tmp_path: Path) -> None:
    """Whoever kills them, one after the other, has not broken the pool once he stops."""
    context: Any = multiprocessing.get_context(f"ipcchan_{start_method}")
    # A forked worker is ready at once, unless it is made to wait.
    held = initializing or start_method == "fork"
    initializer: Any = (tasks.say_and_wait_for, (str(tmp_path / "go"), str(tmp_path))) if held else (None, ())
    with ProcessPoolExecutor(1, context, *initializer) as executor:
        future = executor.submit(tasks.square, 3)
        killed: set[int] = set()
        for _ in range(6):
            assert eventually(lambda: {one.pid for one in executor.stats()} - killed)
            (pid,) = {one.pid for one in executor.stats()} - killed
            assert not initializing or eventually((tmp_path / str(pid)).exists)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        (tmp_path / "go").touch()
        assert future.result(LIMIT) == 9


@pytest.mark.parametrize("make", [lambda: ProcessPoolExecutor(1, FORK), lambda: FORK.Pool(1)], ids=["executor", "pool"])
def test_deaths_of_those_who_are_not_started_yet(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under spawn, who starts a process writes to it, and finds nobody there where that was killed."""
    left = iter(range(5))
    start = type(FORK).Process.start

    def start_late(self: Any) -> None:
        if next(left, None) is not None:
            raise BrokenPipeError(32, "nobody reads")
        start(self)

    monkeypatch.setattr(type(FORK).Process, "start", start_late)
    with make() as pool:
        if isinstance(pool, ProcessPoolExecutor):
            assert pool.submit(tasks.square, 3).result(LIMIT) == 9
        else:
            assert pool.apply_async(tasks.square, (3,)).get(LIMIT) == 9
    if not isinstance(pool, ProcessPoolExecutor):
        pool.join()
    assert next(left, None) is None


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("way", [tasks.die, tasks.leave])
def test_workers_that_always_die_in_their_initializer(
    start_method: str, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That ends, be it that each kills itself as somebody else would."""
    monkeypatch.setattr(_crew, "_LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(_crew, "_MOST_KILLED_STARTS", 8)
    context: Any = multiprocessing.get_context(f"ipcchan_{start_method}")
    args = (3,) if way is tasks.leave else (signal.SIGKILL,)
    with ProcessPoolExecutor(2, context, way, args) as executor:
        text = "ended before they were ready, exit code 3" if way is tasks.leave else "8 workers in a row were killed"
        with pytest.raises(BrokenProcessPool, match=text):
            executor.submit(tasks.square, 3).result(LIMIT)


def test_death_in_the_initializer(start_method: str, tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context(f"ipcchan_{start_method}")
    with ProcessPoolExecutor(1, context, tasks.die_unless_marked, (str(tmp_path / "mark"),)) as executor:
        assert executor.submit(tasks.square, 3).result(LIMIT) == 9


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_loses_one_of_those_it_was_given(workers: int) -> None:
    with ProcessPoolExecutor(workers, FORK) as executor:
        # Short ones first, so that many are given at a time.
        for future in [executor.submit(tasks.square, x) for x in range(500)]:
            future.result(LIMIT)
        futures = [executor.submit(tasks.die_or_square, x, 100) for x in range(200)]
        lost = [x for x, future in enumerate(futures) if future.exception(LIMIT)]
        assert lost == [100]
        assert [future.result() for x, future in enumerate(futures) if x != 100] == [
            x * x for x in range(200) if x != 100
        ]


def test_death_while_being_recycled(forked: ProcessPoolExecutor) -> None:
    with ProcessPoolExecutor(2, FORK, max_tasks_per_child=1) as executor:
        futures = [executor.submit(os.getpid) for _ in range(40)]
        for future in futures[:20]:
            try:
                os.kill(future.result(LIMIT), signal.SIGKILL)
            except (ProcessLookupError, WorkerLostError):
                pass
        for future in futures[20:]:
            error = future.exception(LIMIT)
            assert error is None or isinstance(error, WorkerLostError)


def test_poison_ends(forked: ProcessPoolExecutor) -> None:
    """A task that always kills its worker is tried as often as asked for, and others don't suffer."""
    poison = forked.options(retries=3).submit(tasks.die)
    others = [forked.submit(tasks.square, x) for x in range(20)]
    with pytest.raises(WorkerLostError, match="die"):
        poison.result(LIMIT)
    assert [future.result(LIMIT) for future in others] == [x * x for x in range(20)]


def test_pool_whose_workers_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starting the first one raises, ``submit`` raises; later it breaks the pool."""
    with ProcessPoolExecutor(1, FORK) as executor:
        pid = executor.submit(os.getpid).result(LIMIT)

        def refuse(_: object) -> None:
            raise BlockingIOError(11, "no more processes")

        monkeypatch.setattr(FORK.Process, "start", refuse)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not executor.stats())
        with pytest.raises((BrokenProcessPool, BlockingIOError), match="no more processes"):
            executor.submit(tasks.square, 1).result(LIMIT)


def test_unsendable_arguments_fail_their_own_task(forked: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this process has no descriptor left for a large message, that is what the task fails with."""
    from mp_ipcchan._segments import _segment

    assert forked.submit(tasks.square, 1).result(LIMIT) == 1

    def refuse(*_: object) -> int:
        raise OSError(24, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(_segment, "create", refuse)
        failed = forked.submit(tasks.echo, bytes(1 << 20))
        with pytest.raises(OSError, match="too many open files"):
            failed.result(LIMIT)
    assert forked.submit(tasks.echo, bytes(1 << 20)).result(LIMIT) == bytes(1 << 20)


def test_many_middling_arguments(forked: ProcessPoolExecutor) -> None:
    """More than a packet holds, of tasks that are short enough to go many at a time."""
    for future in [forked.submit(tasks.square, x) for x in range(500)]:
        future.result(LIMIT)
    data = os.urandom(10_000)
    futures = [forked.submit(tasks.echo, data) for _ in range(500)]
    assert all(future.result(LIMIT) == data for future in futures)


# -- the kernel's out-of-memory kills --------------------------------------------------------


def _group(root: Path, version: int, count: int, mounted: str = "/") -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    inside = "" if mounted == "/some/group" else "some/group"
    if version == 2:
        line, mount, name = "0::/some/group", "cgroup2 cgroup2 rw,nsdelegate", "memory.events"
        text = f"low 0\noom 7\noom_kill {count}\noom_group_kill 0\n"
    else:
        line, mount, name = "4:memory:/some/group", "cgroup cgroup rw,memory", "memory.oom_control"
        text = f"oom_kill_disable 0\nunder_oom 0\noom_kill {count}\n"
    (root / "proc/self/cgroup").write_text(f"9:cpu:/else\n{line}\n")
    (root / "proc/self/mountinfo").write_text(
        "33 31 0:30 / /sys/other rw - cgroup cgroup rw,cpu\n"
        f"35 31 0:32 {mounted} /sys/groups rw,noexec shared:9 - {mount}\n"
    )
    place = root / "sys/groups" / inside
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mounted", ["/", "/some/group"])
def test_kills_are_counted_by_the_control_group(tmp_path: Path, version: int, mounted: str) -> None:
    _group(tmp_path, version, 3, mounted)
    kills = OutOfMemoryKills(tmp_path)
    assert not kills.grew()
    _group(tmp_path, version, 4, mounted)
    assert kills.grew()
    assert not kills.grew()


def test_without_control_groups(tmp_path: Path) -> None:
    assert not OutOfMemoryKills(tmp_path).grew()


def test_hint_of_an_out_of_memory_kill(forked: ProcessPoolExecutor, tmp_path: Path) -> None:
    _group(tmp_path, 2, 0)
    forked._engine._out_of_memory = OutOfMemoryKills(tmp_path)
    tx, rx = channel()
    with tx, rx:
        future = forked.submit(tasks.say_and_wait, tx, 60.0)
        pid = rx.recv(LIMIT)
        _group(tmp_path, 2, 1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="want of memory") as caught:
            future.result(LIMIT)
        assert "memory" in caught.value.hint
        # The next one that is killed is told from that.
        future = forked.submit(tasks.say_and_wait, tx, 60.0)
        os.kill(rx.recv(LIMIT), signal.SIGKILL)
        with pytest.raises(WorkerLostError) as caught:
            future.result(LIMIT)
        assert not caught.value.hint


# -- limits on memory ------------------------------------------------------------------------


def test_memory_of_a_running_task(context: Any) -> None:
    """It fails while it runs, with the limit and the size; the others go on."""
    with ProcessPoolExecutor(2, context, max_memory_per_child=300 << 20) as executor:
        greedy = executor.submit(tasks.grow, 600)
        others = [executor.submit(tasks.square, x) for x in range(10)]
        with pytest.raises(WorkerLostError, match=r"max_memory_per_child=300\.0 MiB") as caught:
            greedy.result(LIMIT)
        assert "grow" in str(caught.value)
        assert "MiB" in caught.value.hint.split(",")[0]
        assert [future.result(LIMIT) for future in others] == [x * x for x in range(10)]


def test_memory_that_is_kept_between_tasks() -> None:
    """The worker is replaced, and no task is the worse for it."""
    spawned = multiprocessing.get_context("ipcchan_spawn")
    # New processes: a forked one has, and may give back, what this one has.
    from mp_ipcchan._pools._resident import resident

    with ProcessPoolExecutor(1, spawned) as executor:
        size = executor.submit(resident).result(LIMIT)
    with ProcessPoolExecutor(1, spawned, max_memory_per_child=size + (200 << 20)) as executor:
        pids = [executor.submit(tasks.leak, 60).result(LIMIT) for _ in range(9)]
    assert len(set(pids)) == 3


def test_limit_below_what_a_worker_begins_with(capfd: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(1, FORK, max_memory_per_child=1 << 20) as executor:
        with pytest.raises(BrokenProcessPool, match="before its first task"):
            executor.submit(tasks.square, 1).result(LIMIT)
    assert not capfd.readouterr().err


def test_readable_sizes() -> None:
    assert [readable(size) for size in (12, 2048, 1536 << 20)] == ["12 bytes", "2.0 KiB", "1.5 GiB"]


# -- the parent's end ------------------------------------------------------------------------


def test_no_orphans_while_a_task_holds_the_interpreter(start_method: str) -> None:
    """The parent is killed; its workers end though a task in C lets no other thread run there."""
    code = (
        "import multiprocessing, time\n"
        "from mp_ipcchan import ProcessPoolExecutor, channel\n"
        "from tests.pool import _tasks\n"
        "if __name__ == '__main__':\n"
        f"    executor = ProcessPoolExecutor(2, multiprocessing.get_context('ipcchan_{start_method}'))\n"
        "    tx, rx = channel()\n"
        "    futures = [executor.submit(_tasks.hold_the_interpreter, tx) for _ in range(2)]\n"
        "    print(rx.recv(30), rx.recv(30), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    assert eventually(lambda: not any(map(runs, pids)), 3)


def test_task_whose_child_comes_back() -> None:
    """A process that a task forked and that raises, or returns, is no worker: it ends, and answers nobody."""
    with ProcessPoolExecutor(1, FORK) as executor:
        for way in (tasks.fork_and_fail, tasks.fork_and_return):
            futures = [executor.submit(way), *[executor.submit(tasks.square, x) for x in range(8)]]
            assert [future.result(LIMIT) for future in futures] == ["parent", *[x * x for x in range(8)]]
