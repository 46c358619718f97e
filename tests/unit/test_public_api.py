"""The public names: all there, documented, and showing themselves by the name that users import."""

from __future__ import annotations

import inspect
import pickle
import queue
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

import mp_ipcchan
from mp_ipcchan import errors

PUBLIC = [getattr(mp_ipcchan, name) for name in mp_ipcchan.__all__]


def test_all_is_sorted_and_complete() -> None:
    assert list(mp_ipcchan.__all__) == sorted(mp_ipcchan.__all__)
    assert set(errors.__all__) <= set(mp_ipcchan.__all__)


@pytest.mark.parametrize("name", mp_ipcchan.__all__)
def test_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(mp_ipcchan, name))


@pytest.mark.parametrize("name", mp_ipcchan.__all__)
def test_public_name_shows_itself(name: str) -> None:
    assert getattr(mp_ipcchan, name).__module__ == "mp_ipcchan"


@pytest.mark.parametrize("cls", [one for one in PUBLIC if isinstance(one, type)])
def test_public_methods_are_documented(cls: type) -> None:
    missing = [
        name
        for name, member in inspect.getmembers(cls, inspect.isroutine)
        if not name.startswith("_") and not inspect.getdoc(member) and member.__module__ == "mp_ipcchan"
    ]
    assert not missing


@pytest.mark.parametrize("name", ["Sender", "Receiver", "BytesSender", "BytesReceiver"])
@pytest.mark.parametrize("args", [(), (3,), (None,)])
def test_ends_are_not_made_by_hand(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=rf"a {name} is not made by hand: channel\(\)"):
        getattr(mp_ipcchan, name)(*args)


def test_errors_are_what_programs_catch() -> None:
    expected: dict[type[Exception], type[Exception]] = {
        errors.Disconnected: EOFError,
        errors.ReceiverGone: BrokenPipeError,
        errors.Empty: queue.Empty,
        errors.Full: queue.Full,
        errors.SerializationError: ValueError,
        errors.EndpointMoved: ValueError,
        errors.EndpointClosed: ValueError,
        errors.ProtocolError: OSError,
        errors.ShutDown: getattr(queue, "ShutDown", Exception),
        errors.TaskTimeoutError: TimeoutError,
        errors.WorkerLostError: BrokenProcessPool,
    }
    for ours, stdlib in expected.items():
        assert issubclass(ours, errors.IpcError)
        assert issubclass(ours, stdlib)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_can_be_pickled(name: str) -> None:
    """An error of ours reaches the parent when a pool's worker raises it."""
    error = getattr(errors, name)(*([1, -9, "what"] if name == "WorkerLostError" else ["what happened"]))
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is getattr(mp_ipcchan, name)
    assert (there.args, str(there)) == (error.args, str(error))


def test_import_brings_nothing_heavy() -> None:
    code = "import sys, mp_ipcchan; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "cloudpickle", "asyncio", "concurrent.futures.process", "ctypes", "msgspec"} & set(loaded)


def test_errors_of_pools_show_themselves() -> None:
    """In a traceback, and in a pickle that another process makes an error of: whoever imports what."""
    code = """if True:
        import os, pickle, sys, mp_ipcchan, mp_ipcchan.errors
        assert "concurrent.futures" not in sys.modules
        from mp_ipcchan import ProcessPoolExecutor
        with ProcessPoolExecutor(1) as executor:
            executor.submit(abs, 1).result()
            lost = executor.submit(os._exit, 3)
            late = executor.options(timeout=0.01).submit(os.read, os.pipe()[0], 1)
        assert "WorkerLostError" not in vars(mp_ipcchan)
        sys.stdout.buffer.write(pickle.dumps([lost.exception(), late.exception()]))
        sys.stdout.flush()
        lost.result()
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert run.stderr.decode().splitlines()[-1].startswith("mp_ipcchan.WorkerLostError: worker "), run.stderr.decode()
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    shown = subprocess.run([sys.executable, "-c", code], input=run.stdout, capture_output=True, check=True).stdout
    lost, late = pickle.loads(run.stdout)
    assert shown.decode().strip() == str([lost, late])
    assert (type(lost), type(late)) == (errors.WorkerLostError, mp_ipcchan.TaskTimeoutError)
    assert (lost.exitcode, lost.function) == (3, "_exit")
