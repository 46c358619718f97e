"""The command line: ``python -m mp_ipcchan info`` and ``bench``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import sys
from pathlib import Path

from . import __version__
from ._message import CHANNEL_BUFFER, INLINE_SIZE
from ._segments._segment_pool import MOST_BYTES
from ._transport import unix


def _info() -> str:
    """What this library finds here; the text to paste into a bug report."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    buffer_limit = _read("/proc/sys/net/core/wmem_max")
    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    methods = ", ".join(multiprocessing.get_all_start_methods())
    lines = [
        f"mp_ipcchan {__version__}, {platform.python_implementation()} {platform.python_version()}",
        f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} processors",
        "backend: AF_UNIX SOCK_SEQPACKET sockets, memfd segments",
        f"start methods: {methods}; the default here is {multiprocessing.get_start_method()}",
        "",
        f"descriptors: {soft} (at most {hard}), {len(os.listdir('/proc/self/fd'))} open now",
        "    a channel takes 2, a queue 4 to 6; so many may also wait in unread messages, for all processes of a user",
        f"socket buffers: up to {buffer_limit} bytes each (net.core.wmem_max)",
        f"    channels and queues ask for {CHANNEL_BUFFER}, pipes for {unix.PIPE_BUFFER};",
        "    a process that ends with unsent messages asks for more than the former",
        f"messages: above {INLINE_SIZE} bytes they travel in memory segments",
        f"    a process keeps up to {MOST_BYTES >> 20} MiB of them for those that follow, at a descriptor each",
    ]
    if shared:
        lines.append(
            f"    segments count against memory, not against /dev/shm ({shared.f_bavail * shared.f_frsize} free)"
        )
    if not os.path.isdir("/proc/self/fd"):
        lines.append("/proc is not mounted: queues can't tell which processes were killed")
    return "\n".join(lines)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "an unknown number of"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mp_ipcchan")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions and the limits that matter, for a bug report")
    bench = commands.add_parser("bench", help="print this machine's figures beside the stdlib's (half a minute)")
    bench.add_argument("--quick", action="store_true", help="only see that everything runs")
    options = parser.parse_args()
    if options.command == "info":
        print(_info())  # noqa: T201
    else:
        # Not before it is asked for: it needs the executors.
        from ._bench import report

        print(report(options.quick))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
