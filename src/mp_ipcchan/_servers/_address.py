"""Names of servers: what they may be, where they lead, and whether nobody else can take them.

A name is the path of a socket, or "@" and a word: an abstract address, which is no file and belongs
to the network namespace. The kernel lets nobody connect to a path whose directories he may not enter, and
frees an abstract address when its server dies; but anybody may connect to one, or take it while it is free.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from ._peer import may_be_anybody

#: The longest path of a socket (bytes): sun_path holds 108, with the zero behind it, or ahead of an abstract one.
LONGEST = 107
#: The file that a OneShotServer is found by; says to ``connect`` that a second client is not to wait.
ONE_SHOT = "one-shot"
PREFIX = "ipcchan-"


def is_abstract(name: str) -> bool:
    return name.startswith("@")


def is_one_shot(name: str) -> bool:
    """Whether a name is one that ``OneShotServer`` has made."""
    if not name.endswith(ONE_SHOT):
        return False
    directory, file = os.path.split(name)
    return file == ONE_SHOT and os.path.basename(directory).startswith(PREFIX)


def address_of(name: str) -> bytes:
    """What the kernel calls ``name``. Raises ``OSError`` where it can't be the name of a server."""
    encoded = os.fsencode(name)
    if not encoded or encoded == b"@" or b"\0" in encoded:
        raise OSError(errno.EINVAL, "the name of a server is a path, or '@' and a word, without a zero", name)
    if is_abstract(name):
        encoded = b"\0" + encoded[1:]
    if len(encoded) > LONGEST + is_abstract(name):
        reason = f"the name of a server has at most {LONGEST} bytes, this one has {len(encoded)}: take a shorter path"
        raise OSError(errno.ENAMETOOLONG, reason, name)
    return encoded


def is_served(address: bytes) -> bool:
    """Whether some process has a socket at this path. That process doesn't notice.

    The kernel looks a socket up before it compares kinds: one of another kind is told so, and a dead one refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(address) not in (errno.ECONNREFUSED, errno.ENOENT)


def check_directory(path: str) -> None:
    """Raise ``PermissionError`` where others might put a socket of theirs in the place of ``path``.

    That is where its directory, or one above it, belongs to somebody else or may be written to. ``FileNotFoundError``
    and ``NotADirectoryError`` where there is none.
    """
    directory = os.path.realpath(os.path.dirname(path))
    try:
        _check(os.stat(directory), directory, last=True)
        for above in Path(directory).parents:
            _check(above.stat(), str(above), last=False)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"{error.strerror}: make the directory first, one that only this user may write to"
        raise type(error)(error.errno, reason, directory) from error


def _check(status: os.stat_result, directory: str, last: bool) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)
    # In a user namespace the directories of the machine's root show as nobody's.
    trusted = status.st_uid in (0, os.geteuid()) or (not last and may_be_anybody(status.st_uid))
    # What a sticky directory (/tmp) holds nobody else can move away. But he can put something there.
    sealed = not status.st_mode & 0o022 or (not last and status.st_mode & stat.S_ISVTX)
    if not trusted or not sealed:
        why = "belongs to another user" if not trusted else "may be written to by others"
        reason = f"others could take the name of this server: {directory} {why}; choose a private directory"
        raise PermissionError(errno.EPERM, reason, directory)
