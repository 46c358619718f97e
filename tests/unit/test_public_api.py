"""The public names: all there, documented, and showing themselves by the name that users import."""

from __future__ import annotations

import inspect
import pickle
import queue
import subprocess
import sys

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


@pytest.mark.parametrize("name", [name for name in mp_ipcchan.__all__ if name not in errors.__all__])
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
    }
    for ours, stdlib in expected.items():
        assert issubclass(ours, errors.IpcError)
        assert issubclass(ours, stdlib)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_can_be_pickled(name: str) -> None:
    """An error of ours reaches the parent when a pool's worker raises it."""
    error = getattr(errors, name)("what happened")
    assert pickle.loads(pickle.dumps(error)).args == error.args


def test_import_brings_nothing_heavy() -> None:
    code = "import sys, mp_ipcchan; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "cloudpickle", "asyncio", "concurrent.futures.process", "ctypes", "msgspec"} & set(loaded)
