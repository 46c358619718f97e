"""Floors: what no library for Python can be faster than. They take the time themselves."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from .shapes import Shape

_SOURCE = Path(__file__).with_name("floor.c")
#: What a channel puts around the pickle of a message (bytes), so that packets are as long as a channel's.
_AROUND = 7


@runtime_checkable
class Floor(Protocol):
    """In the place of a system."""

    name: str
    baseline: str | None
    module: str | None

    def fits(self, shape: Shape, /) -> bool: ...

    def run(self, shape: Shape, count: int, limit: float) -> tuple[float, float]:
        """The seconds that ``count`` messages took, and the processor time."""
        ...


@dataclass
class PacketFloor(Floor):
    """Packets of the same size over the same socket, sent and received by a loop in C."""

    name: str = "C loop"
    baseline: str | None = "C loop"
    module: str | None = None

    def fits(self, shape: Shape, /) -> bool:
        return shape.small and not shape.payload.numbered and compiler() is not None

    def run(self, shape: Shape, count: int, limit: float) -> tuple[float, float]:
        kind = "round-trip" if shape.round_trip else "one-way"
        numbers = (shape.producers, shape.consumers, count, shape.payload.nbytes + _AROUND)
        done = subprocess.run(
            [_program(), kind, *map(str, numbers)], capture_output=True, text=True, timeout=limit, check=True
        )
        elapsed, cpu = map(float, done.stdout.split())
        return elapsed, cpu


@dataclass
class CopyFloor(Floor):
    """One copy of each message from memory to memory, both of which were touched before."""

    name: str = "memcpy"
    baseline: str | None = "memcpy"
    module: str | None = "numpy"

    def fits(self, shape: Shape, /) -> bool:
        return shape.buffer

    def run(self, shape: Shape, count: int, limit: float) -> tuple[float, float]:  # noqa: ARG002
        numpy = importlib.import_module("numpy")
        source = numpy.full(shape.payload.nbytes // 8, 2.0)
        target = numpy.zeros_like(source)
        numpy.copyto(target, source)
        start = time.monotonic()
        for _ in range(count):
            numpy.copyto(target, source)
        elapsed = time.monotonic() - start
        return elapsed, elapsed


def compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@cache
def _program() -> str:
    """The compiled loop, in a directory that ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="mp_ipcchan-benchmarks-")
    _folders.append(folder)
    program = os.path.join(folder.name, "floor")
    command = compiler()
    assert command
    subprocess.run([*command.split(), "-O2", "-o", program, str(_SOURCE)], check=True, capture_output=True, text=True)
    return program


#: Removed when the interpreter ends.
_folders: list[tempfile.TemporaryDirectory[str]] = []
