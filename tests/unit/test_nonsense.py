"""Calls that make no sense say what was meant."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest

import mp_ipcchan
from mp_ipcchan import Fd, Mux, SerializationError, channel, errors, get_context, peer_of


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Fd("x"), "open file or the number of a descriptor, not of 'x'"),
        (lambda: peer_of(3), "takes a Sender or a Receiver, not 3"),
        (Mux, r"Mux\.pair\(\) makes both ends"),
        (lambda: get_context().Queue("x"), "maxsize is how many messages.*not 'x'"),
        (lambda: get_context().JoinableQueue(None), "maxsize is how many messages.*not None"),
    ],
)
def test_arguments_that_make_no_sense(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call()


@pytest.mark.parametrize("mode", ["r", "rb", "w", "wb", "w+b"])
def test_open_file_is_sent_wrapped(mode: str) -> None:
    tx, rx = channel()
    queue = get_context().Queue()
    with tx, rx, tempfile.NamedTemporaryFile() as temporary, open(temporary.name, mode) as file:
        with pytest.raises(SerializationError, match=r"cannot pickle '_io\..*' object.*wrap it: Fd\(file\)"):
            tx.send({"log": file})
        with pytest.raises(TypeError, match=r"wrap it: Fd\(file\)"):
            queue.put(file)
        with Fd(file) as wrapped:
            tx.send({"log": wrapped})
        rx.recv()["log"].close()
    queue.close()


def test_closed_queue() -> None:
    queue = get_context().Queue()
    queue.close()
    for call in (lambda: queue.put(1), lambda: queue.put_many([1]), queue.get, lambda: queue.get_many(1)):
        with pytest.raises(ValueError, match=r"this Queue is closed: close\(\) was called"):
            call()


def test_errors_show_what_there_is_and_no_more() -> None:
    assert dir(errors) == sorted(errors.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), mp_ipcchan.IpcError)


def test_help_begins_with_what_a_user_imports() -> None:
    told = (mp_ipcchan.__doc__ or "").split("tests/unit/test_layers.py")[0]
    begin = told[: told.index("_codec")] if "_codec" in told else told
    for name in ("channel", "ReceiverSet", "ProcessPoolExecutor", "get_context", "install", "connect"):
        assert name in begin
        assert name in mp_ipcchan.__all__
