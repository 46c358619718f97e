"""A listening socket and its name, which goes with it: at its end, or when its successor finds it dead.

Guarantees: of several servers that start at one path, one gets it and the others hear that it is in use, whatever
a dead one has left there. A name is removed by the process that made it, while it is still that server's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

from .._message import CHANNEL_BUFFER
from .._transport import unix
from ._address import LONGEST, ONE_SHOT, PREFIX, address_of, check_directory, is_abstract, is_served

#: The file of a server that wasn't given a name.
_MANY = "server"
#: How long (seconds) to wait while others start or take over a server in the same directory: microseconds, mostly.
_PATIENCE = 5.0

#: Whether this process has cleaned up after others; once is enough.
_swept = False


class Listener:
    """Listens at ``name``, or, where that is None, at a new path in a directory of its own.

    ``others``: whether other users may reach it, where its directory lets them. ``once``: a second client that
    connects before the first was accepted finds no room.
    """

    def __init__(self, name: str | None, *, others: bool, once: bool) -> None:
        directory = None
        if name is not None:
            address_of(name)
        if name is None:
            directory = _make_directory(0o711 if others else 0o700)
            name = os.path.join(directory, ONE_SHOT if once else _MANY)
        elif not is_abstract(name):
            # Absolute: the process may go elsewhere before it is to remove it.
            name = os.path.abspath(name)
        self.name: str = name
        self.once: bool = once
        self.sock: socket.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            unix.prepare(self.sock, CHANNEL_BUFFER)
            # Nobody else has this one: only those sockets are shared that came from or go to other processes.
            self.sock.setblocking(False)
            inode = self._bind(0o666 if others else 0o600, directory is not None)
            self.sock.listen(0 if once else socket.SOMAXCONN)
        except BaseException:
            self.sock.close()
            if directory is not None:
                _remove_directory(directory)
            raise
        self._remove = weakref.finalize(self, _remove, self.sock, name, inode, directory, os.getpid())

    def _bind(self, mode: int, private: bool) -> tuple[int, int] | None:
        """Take the name. Returns the file's device and inode, where there is one."""
        address = address_of(self.name)
        if is_abstract(self.name):
            try:
                self.sock.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _taken(self.name) from None
                raise
            return None
        if private:
            self.sock.bind(address)
        else:
            check_directory(self.name)
            with _alone_in(os.path.dirname(self.name)):
                _clear(self.name, address)
                self.sock.bind(address)
        # Nobody gets in between: it doesn't listen yet.
        os.chmod(self.name, mode)
        return _identity(self.name)

    @property
    def closed(self) -> bool:
        return not self._remove.alive

    def close(self) -> None:
        """Remove the name, and stop listening; may be called twice."""
        self._remove()

    def forget(self) -> None:
        """In a forked child: stop holding what is the parent's."""
        self._remove.detach()
        self.sock.close()


def _remove(sock: socket.socket, name: str, inode: tuple[int, int] | None, directory: str | None, owner: int) -> None:
    if os.getpid() == owner:
        # While this still listens nobody takes it for dead, and puts another in its place.
        if inode is not None and _identity(name) == inode:
            _unlink(name)
        if directory is not None:
            _remove_directory(directory)
    sock.close()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _remove_directory(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError:
        pass


# -- a name that was chosen --------------------------------------------------------------------


@contextmanager
def _alone_in(directory: str) -> Iterator[None]:
    """Keep other servers from starting in ``directory`` meanwhile: two that find a dead one must not both replace it.

    A lock on the directory itself, so that no file is left behind.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() > end:
                    reason = f"another process has kept this directory locked for {_PATIENCE:g} seconds"
                    raise OSError(errno.EBUSY, reason, directory) from None
                sleep(0.001)
        try:
            yield
        finally:
            # Not left to the closing: a child forked just now has a duplicate.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _clear(path: str, address: bytes) -> None:
    """Remove the socket of a dead server."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise FileExistsError(errno.EEXIST, "there is something else than a socket at the name of this server", path)
    if is_served(address):
        raise _taken(path)
    os.unlink(path)


def _taken(name: str) -> OSError:
    return OSError(errno.EADDRINUSE, "another server has this name, and is alive", name)


# -- a name of its own -------------------------------------------------------------------------


def _make_directory(mode: int) -> str:
    _sweep(tempfile.gettempdir())
    prefix = f"{PREFIX}{os.getpid()}-"
    directory = tempfile.mkdtemp(prefix=prefix)
    if len(os.fsencode(os.path.join(directory, ONE_SHOT))) > LONGEST:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix=prefix, dir="/tmp")
    os.chmod(directory, mode)
    return directory


def _sweep(where: str) -> None:
    """Remove what killed servers of this user have left; the first server of a process does so.

    A socket in such a directory that refuses is dead for good: each has one server, ever.
    """
    global _swept
    if _swept:
        return
    _swept = True
    try:
        with os.scandir(where) as entries:
            left = [entry.path for entry in entries if entry.name.startswith(PREFIX) and _is_own(entry)]
    except OSError:
        return
    for directory in left:
        for path in (os.path.join(directory, file) for file in (ONE_SHOT, _MANY)):
            if len(os.fsencode(path)) <= LONGEST and os.path.lexists(path) and not is_served(os.fsencode(path)):
                _unlink(path)
                _remove_directory(directory)


def _is_own(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    except OSError:
        return False
