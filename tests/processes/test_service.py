"""The example service: two programs, started separately; clients are killed at random, and the service goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import pytest

from ..conformance._support import LIMIT
from ._support import SOURCE, eventually, finish

EXAMPLES = SOURCE.parent / "examples"


@contextmanager
def example(name: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """One of the two, running; it is killed where it outlives the block."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, str(EXAMPLES / name), *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def service(name: str) -> Iterator[subprocess.Popen[str]]:
    """The service, ready for clients."""
    with example("service_server.py", name) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == name
        yield process


def ask(*args: str) -> str:
    """What a client prints, which must end well."""
    with example("service_client.py", *args) as client:
        return finish(client).strip()


def descriptors(process: subprocess.Popen[str]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def test_service_goes_on(tmp_path: Path) -> None:
    """Clients count, and are killed; those that are left count to the end, and the service has lost nothing."""
    name = str(tmp_path / "store.sock")
    random = Random(1)
    with service(name) as serving, ExitStack() as stack:
        ask(name, "set", "colour", "blue")
        before = descriptors(serving)
        watching = stack.enter_context(example("service_client.py", name, "watch", "word-5"))
        assert watching.stdout is not None
        assert watching.stdout.readline() == "None\n"
        victims = [
            stack.enter_context(example("service_client.py", name, "count", f"victim-{number}", "1000000"))
            for number in range(3)
        ]
        # All of them are being served now.
        eventually(lambda: descriptors(serving) >= before + 2 * len(victims))
        counting = [
            stack.enter_context(example("service_client.py", name, "count", f"word-{number}", "300"))
            for number in (5, 6)
        ]
        for victim in random.sample(victims, len(victims)):
            victim.kill()
            assert ask(name, "get", "colour") == "blue"
        assert [finish(client) for client in counting] == ["300\n", "300\n"]
        seen = [watching.stdout.readline() for _ in range(300)]
        assert seen == [f"{number}\n" for number in range(1, 301)]
        watching.kill()
        # Nobody is told that a watcher is dead before there is something to tell it.
        ask(name, "set", "word-5", "x")
        eventually(lambda: descriptors(serving) == before)
        serving.send_signal(signal.SIGTERM)
        assert finish(serving) == ""
    assert list(tmp_path.iterdir()) == []


def test_service_is_started_again(tmp_path: Path) -> None:
    """Killed, it leaves its name, and has it again; clients hear of its death, or that nobody is there."""
    name = str(tmp_path / "store.sock")
    with service(name) as serving, example("service_client.py", name, "watch", "colour") as watching:
        assert watching.stdout is not None
        watching.stdout.readline()
        serving.kill()
        assert finish(watching) == ""
        with example("service_client.py", name, "get", "colour") as client:
            assert client.wait(LIMIT) == 1
            assert client.stderr is not None
            assert "nobody serves" in client.stderr.read()
    with service(name):
        assert ask(name, "get", "colour") == "None"


@pytest.mark.parametrize("name", ["missing/store.sock", "x" * 200])
def test_name_that_cannot_be(name: str, tmp_path: Path) -> None:
    """Neither starts with a name that can't be; the error says what to do."""
    for program, args in (("service_server.py", ()), ("service_client.py", ("get", "colour"))):
        with example(program, str(tmp_path / name), *args) as process:
            _, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 1
            assert "nobody serves" in err or "make the directory" in err or "at most 107" in err
