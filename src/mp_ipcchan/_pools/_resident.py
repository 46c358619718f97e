"""How much memory a process has, and whether the kernel killed one for want of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int | None = None) -> int:
    """The bytes of memory that a process (by default this one) has now, as ``ps`` shows them (RSS); 0 if it is gone."""
    try:
        with open(f"/proc/{pid or 'self'}/statm", "rb", buffering=0) as file:
            return int(file.read(128).split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def readable(size: int) -> str:
    """A number of bytes for people: "1.5 GiB"."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


class OutOfMemoryKills:
    """The kernel's count of processes of this control group that it killed for want of memory."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._file = _counter_file(root)
        self._seen = self._read()

    def grew(self) -> bool:
        """Whether there were any since this was asked last."""
        before, self._seen = self._seen, self._read()
        return self._seen > before

    def _read(self) -> int:
        if self._file is None:
            return 0
        try:
            found = re.search(r"^oom_kill (\d+)$", self._file.read_text(), re.MULTILINE)
        except OSError:
            return 0
        return int(found[1]) if found else 0


def _counter_file(root: Path) -> Path | None:
    """The file that has the count, under control groups of version 2 or 1; None where there is none."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            kind, name = "cgroup2", "memory.events"
        elif "memory" in controllers.split(","):
            kind, name = "cgroup", "memory.oom_control"
        else:
            continue
        for mount in mounts:
            fields, _, tail = mount.partition(" - ")
            mounted, point = fields.split()[3:5]
            system, _, options = tail.split(" ", 2)
            if system != kind or (kind == "cgroup" and "memory" not in options.split(",")):
                continue
            # In a container, the mount's root may be the group itself, and the path be told from further out.
            inside = path.removeprefix(mounted) if mounted != "/" else path
            for place in (inside, ""):
                file = root / point.lstrip("/") / place.lstrip("/") / name
                if file.exists():
                    return file
    return None
