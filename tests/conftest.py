"""Every test leaves the world as it found it: no descriptor, thread, child or file more than before."""

from __future__ import annotations

import faulthandler
import gc
import glob
import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest

#: How long (seconds) things that end by themselves may take to do so; a thread's or child's last moments.
PATIENCE = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes gigabytes or minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest first: handed out one by one, they end together with the rest.
    items.sort(key=lambda item: "cpython" not in item.keywords)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((f"descriptor {fd}", os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


def _children() -> set[tuple[str, str]]:
    found = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                found |= {("child", pid) for pid in file.read().split()}
        except FileNotFoundError:
            continue
    return found


def _world() -> set[tuple[str, str]]:
    threads = {("thread", f"{thread.name} {thread.ident}") for thread in threading.enumerate()}
    files = {("file", path) for path in glob.glob(os.path.join(tempfile.gettempdir(), "ipcchan-*"))}
    return _descriptors() | _children() | threads | files


@pytest.fixture(scope="session", autouse=True)
def _servers() -> None:
    """The stdlib's helper processes live as long as the session: they belong to the world as found."""
    resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _nothing_left(_servers: None) -> Iterator[None]:
    gc.collect()
    before = _world()
    yield
    deadline = time.monotonic() + PATIENCE
    gc.collect()
    while (left := {one for one in _world() - before if one[0] != "file" or _is_ours(one[1])}) and (
        time.monotonic() < deadline
    ):
        multiprocessing.active_children()  # collects those that have ended
        gc.collect()
        time.sleep(0.01)
    assert not left, f"the test left behind: {sorted(left)}"


def _is_ours(path: str) -> bool:
    """Another worker of the same run may have its own."""
    return f"-{os.getpid()}-" in path


@pytest.fixture(autouse=True)
def _own_limit(request: pytest.FixtureRequest) -> None:
    """A test that hangs ends its process (``faulthandler_timeout``); these take longer, within limits of their own."""
    if {"cpython", "slow"} & set(request.node.keywords):
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request: pytest.FixtureRequest) -> str:
    return str(request.param)
