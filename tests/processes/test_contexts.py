"""The contexts' names, set_start_method, install and uninstall; in this process and in its children.

What changes the whole process runs in programs of their own.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import context as stdlib
from pathlib import Path
from queue import Empty

import pytest

import mp_ipcchan

from ..conformance._support import LIMIT
from ._support import METHODS, context_of, output_of, started

methods = pytest.mark.parametrize("method", METHODS)

#: What children report, and what parents compare it with: is multiprocessing ours here, and how do processes start.
REPORT = """
import multiprocessing
import multiprocessing.queues
import sys

def factories():
    made = [multiprocessing.Queue(), multiprocessing.JoinableQueue(), multiprocessing.SimpleQueue()]
    ends = multiprocessing.Pipe()
    return [type(one).__module__ for one in (*made, *ends, multiprocessing.get_context())]

def are_ours():
    return all(one.startswith("mp_ipcchan") for one in factories())

def report(queue):
    queue.put((are_ours(), multiprocessing.get_start_method()))

def ask_child(context=multiprocessing):
    queue = context.Queue()
    process = context.Process(target=report, args=(queue,))
    process.start()
    answer = queue.get(timeout=30)
    process.join(30)
    assert process.exitcode == 0, process.exitcode
    return answer

def report_of_child(queue):
    queue.put(ask_child())
"""


@pytest.mark.parametrize("name", ["ipcchan", *(f"ipcchan_{method}" for method in METHODS)])
def test_names(name: str) -> None:
    """Each name gives a context of ours, which reports how its processes start."""
    context = multiprocessing.get_context(name)
    default = multiprocessing.get_context().get_start_method()
    assert context.get_start_method() == (name.removeprefix("ipcchan_") if "_" in name else default)
    assert isinstance(context, stdlib.BaseContext)
    with context.Pipe()[0] as end:
        assert isinstance(end, mp_ipcchan.Connection)
    assert context.get_context() is context
    assert context.get_context(name) is context


@methods
def test_default_context_of_the_interpreter(method: str, tmp_path: Path) -> None:
    """The name "ipcchan" follows what the interpreter starts processes by, not what the program has chosen before."""
    source = f"""
    import multiprocessing
    default = multiprocessing.get_context().get_start_method()
    multiprocessing.set_start_method({method!r}, force=True)
    import mp_ipcchan
    assert multiprocessing.get_context("ipcchan").get_start_method() == default
    assert multiprocessing.get_start_method() == {method!r}
    """
    output_of(tmp_path / "program.py", source)


def test_import_leaves_stock_contexts_alone(tmp_path: Path) -> None:
    """A program that merely imports the package has the stdlib's contexts, objects and methods as ever."""
    source = """
    import multiprocessing
    methods = multiprocessing.get_all_start_methods()
    contexts = [multiprocessing.get_context(method) for method in methods]
    import mp_ipcchan
    def module_of(obj):
        return type(obj).__module__
    if __name__ == "__main__":
        assert multiprocessing.get_start_method(allow_none=True) is None
        assert multiprocessing.get_all_start_methods() == methods
        assert [multiprocessing.get_context(method) for method in methods] == contexts
        for owner in (multiprocessing, multiprocessing.get_context(), *contexts):
            made = [owner.Queue(), owner.JoinableQueue(), owner.SimpleQueue(), *owner.Pipe()]
            assert all(module_of(one).startswith("multiprocessing") for one in made), made
        with multiprocessing.Pool(1) as pool:
            assert module_of(pool) == "multiprocessing.pool"
            assert pool.map(abs, [-1]) == [1]
        for context in contexts:
            queue = context.Queue()
            process = context.Process(target=queue.put, args=(1,))
            process.start()
            assert queue.get(timeout=30) == 1
            process.join(30)
            assert process.exitcode == 0
    """
    output_of(tmp_path / "program.py", source)


@methods
@pytest.mark.parametrize("prefix", ["ipcchan_", ""])
def test_children_and_grandchildren_of_set_start_method(method: str, prefix: str, tmp_path: Path) -> None:
    """The default is ours, or stock, in the children, too, and theirs."""
    source = f"""
    {indented(REPORT)}
    import mp_ipcchan
    if __name__ == "__main__":
        multiprocessing.set_start_method({prefix + method!r})
        expected = ({bool(prefix)}, {method!r})
        assert (are_ours(), multiprocessing.get_start_method()) == expected
        assert ask_child() == expected, ask_child()
        queue = multiprocessing.Queue()
        process = multiprocessing.Process(target=report_of_child, args=(queue,))
        process.start()
        assert queue.get(timeout=30) == expected
        process.join(30)
    """
    output_of(tmp_path / "program.py", source)


@methods
def test_children_of_the_default_context_object(method: str, tmp_path: Path) -> None:
    """The same for children that are started through ``get_context()``, as pools and executors do."""
    source = f"""
    {indented(REPORT)}
    from concurrent.futures import ProcessPoolExecutor
    import mp_ipcchan
    def answer():
        return are_ours(), multiprocessing.get_start_method()
    if __name__ == "__main__":
        multiprocessing.set_start_method("ipcchan_{method}")
        expected = (True, {method!r})
        assert ask_child(multiprocessing.get_context()) == expected, ask_child(multiprocessing.get_context())
        with multiprocessing.Pool(1) as pool:
            assert pool.apply(answer) == expected
        with ProcessPoolExecutor(1) as executor:
            assert executor.submit(answer).result(30) == expected
    """
    output_of(tmp_path / "program.py", source)


def test_set_start_method_twice(tmp_path: Path) -> None:
    """The stdlib's rules hold: the second time needs force, and there is a way back to the stock methods."""
    source = f"""
    {indented(REPORT)}
    import mp_ipcchan
    if __name__ == "__main__":
        multiprocessing.set_start_method("ipcchan")
        default = multiprocessing.get_start_method()
        assert default in ("fork", "forkserver")
        try:
            multiprocessing.set_start_method("ipcchan_spawn")
        except RuntimeError:
            pass
        else:
            raise AssertionError("set twice")
        multiprocessing.set_start_method("ipcchan_spawn", force=True)
        assert are_ours()
        assert multiprocessing.get_start_method() == "spawn"
        multiprocessing.set_start_method("spawn", force=True)
        assert not are_ours()
        assert ask_child() == (False, "spawn")
        try:
            multiprocessing.set_start_method("ipcchan_nonsense", force=True)
        except ValueError:
            pass
        else:
            raise AssertionError("no such method")
    """
    output_of(tmp_path / "program.py", source)


@methods
def test_install(method: str, tmp_path: Path) -> None:
    """Module functions and stock names are ours, here and in children by every method, until ``uninstall``."""
    source = f"""
    {indented(REPORT)}
    import mp_ipcchan
    if __name__ == "__main__":
        names = ("fork", "spawn", "forkserver")
        stock = [multiprocessing.get_context(name) for name in names]
        for _ in range(2):
            for _ in range(2):  # twice is as good as once
                mp_ipcchan.install("ipcchan_{method}")
            assert are_ours()
            assert multiprocessing.get_start_method() == {method!r}
            assert ask_child() == (True, {method!r})
            for name in names:
                context = multiprocessing.get_context(name)
                assert type(context).__module__.startswith("mp_ipcchan")
                assert context.get_start_method() == name
                assert ask_child(context) == (True, name), name  # as of old: a child goes on as it was started
            multiprocessing.set_start_method("spawn", force=True)
            assert are_ours()
            assert multiprocessing.get_start_method() == "spawn"
            assert ask_child() == (True, "spawn")
            for _ in range(2):
                mp_ipcchan.uninstall()
            assert multiprocessing.get_start_method(allow_none=True) is None
            assert not are_ours()
            assert multiprocessing.get_start_method(allow_none=True) is not None
            assert [multiprocessing.get_context(name) for name in names] == stock
            for context in stock:
                assert ask_child(context)[0] is False
            multiprocessing.set_start_method(None, force=True)
    """
    output_of(tmp_path / "program.py", source)


def test_install_makes_pool_and_process_ours(tmp_path: Path) -> None:
    """A program that only knows ``multiprocessing`` runs on ours."""
    source = """
    import mp_ipcchan
    mp_ipcchan.install()
    import multiprocessing
    from multiprocessing import Pool, Process, Queue
    def square(x):
        return x * x
    if __name__ == "__main__":
        with Pool(2) as pool:
            assert pool.map(square, range(100)) == [x * x for x in range(100)]
        queue = Queue()
        assert type(queue) is mp_ipcchan.Queue
        queue.put(queue)  # the stdlib's would raise
        process = Process(target=queue.put, args=(1,))
        process.start()
        assert type(queue.get(timeout=30)) is mp_ipcchan.Queue
        assert queue.get(timeout=30) == 1
        process.join(30)
    """
    output_of(tmp_path / "program.py", source)


def test_install_restores_the_default(tmp_path: Path) -> None:
    """What the program had set before ``install`` is the default again after ``uninstall``."""
    source = """
    import multiprocessing, mp_ipcchan
    multiprocessing.set_start_method("spawn")
    mp_ipcchan.install("ipcchan_fork")
    assert multiprocessing.get_start_method() == "fork"
    mp_ipcchan.uninstall()
    assert multiprocessing.get_start_method() == "spawn"
    assert multiprocessing.get_context() is multiprocessing.get_context("spawn")
    """
    output_of(tmp_path / "program.py", source)


def test_program_that_chooses_after_install(tmp_path: Path) -> None:
    """``install`` comes before what a program says itself: that is not the second choice of a start method."""
    source = """
    import multiprocessing, mp_ipcchan
    mp_ipcchan.install()
    assert multiprocessing.get_start_method(allow_none=True) is None
    multiprocessing.set_start_method("spawn")
    assert multiprocessing.get_start_method() == "spawn"
    assert type(multiprocessing.Queue()) is mp_ipcchan.Queue
    mp_ipcchan.uninstall()
    assert multiprocessing.get_start_method(allow_none=True) is None
    """
    output_of(tmp_path / "program.py", source)


@pytest.mark.parametrize("installed", [False, True])
def test_get_context(installed: bool) -> None:
    """It gives our contexts, by our names and the stock ones, whatever these mean elsewhere."""
    if installed:
        mp_ipcchan.install()
    try:
        assert mp_ipcchan.get_context() is multiprocessing.get_context("ipcchan")
        for method in ("fork", "spawn", "forkserver"):
            context = mp_ipcchan.get_context(method)
            assert isinstance(context, mp_ipcchan.Context)
            assert context.get_start_method() == method
            assert context is multiprocessing.get_context(f"ipcchan_{method}")
            assert context is mp_ipcchan.get_context(f"ipcchan_{method}")
        for method in ("thread", "ipcchan_thread"):
            with pytest.raises(ValueError, match="ipcchan, ipcchan_fork, ipcchan_forkserver, ipcchan_spawn, spawn"):
                mp_ipcchan.get_context(method)
    finally:
        if installed:
            mp_ipcchan.uninstall()


def test_install_unknown_method() -> None:
    """A method that there isn't is a ``ValueError``, which changes nothing."""
    stock = multiprocessing.get_context("fork")
    with pytest.raises(ValueError, match="ipcchan_thread"):
        mp_ipcchan.install("ipcchan_thread")
    assert multiprocessing.get_context("fork") is stock


def put_in_turn(queue: mp_ipcchan.Queue[int]) -> None:
    for number in range(100):
        queue.put(number)


def test_stock_queue_of_the_default_context(start_method: str) -> None:
    """``multiprocessing.Queue`` with a stock default works in children of the stock context."""
    context = multiprocessing.get_context(start_method)
    queue = context.Queue()
    with started(context, put_in_turn, queue):
        assert [queue.get(timeout=LIMIT) for _ in range(100)] == list(range(100))
    queue.close()
    queue.join_thread()


def test_queue_of_our_context(start_method: str) -> None:
    """The same with ours, which says when it is empty."""
    context = context_of(start_method)
    queue = context.Queue()
    assert isinstance(queue, mp_ipcchan.Queue)
    with started(context, put_in_turn, queue):
        assert [queue.get(timeout=LIMIT) for _ in range(100)] == list(range(100))
        with pytest.raises(Empty):
            queue.get_nowait()
    queue.close()


def indented(source: str) -> str:
    """For a place inside a source that is indented by four."""
    return source.replace("\n", "\n    ")
