"""Log records of workers reach the parent's handlers, and warnings its filters.

A worker's loggers keep their levels, and no handlers but one, on the root: it sends what comes to the
parent, over a channel that all workers of a pool share. There, a record goes through the logger of the same
name, as if it had been logged there. Levels are the parent's: a worker is told of them when it is started,
and ahead of the next task where they have changed.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from .. import _codec
from .._link import Link
from .._message import Outgoing

#: Levels by the logger's name, "" for the root; and what ``logging.disable`` was given.
Levels: TypeAlias = tuple[dict[str, int], int]

#: What a message of the channel is.
RECORD, WARNING = range(2)

#: In the root's cache of answers, which ``logging`` clears whenever any level changes.
_UNCHANGED: Any = "mp_ipcchan: no level has changed"
_last: Levels | None = None


def levels() -> Levels:
    """The levels of this process's loggers; the same object while they are the same.

    Cheap where nothing has changed: it is asked for whenever tasks are handed out.
    """
    global _last
    cache: dict[Any, Any] = logging.root._cache  # type: ignore[attr-defined]
    if _UNCHANGED in cache and _last is not None:
        return _last
    cache[_UNCHANGED] = True
    manager = logging.root.manager
    found = {
        name: logger.level
        for name, logger in list(manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and logger.level
    }
    found[""] = logging.root.level
    if _last != (found, manager.disable):
        _last = (found, manager.disable)
    return _last


def set_levels(wanted: Levels) -> None:
    """In a worker: let loggers have these levels, and all others none of their own."""
    found, disable = wanted
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level and name not in found:
            logger.setLevel(logging.NOTSET)
    for name, level in found.items():
        logging.getLogger(name or None).setLevel(level)
    logging.disable(disable)


# -- in a worker -----------------------------------------------------------------------------


def forward(link: Link, wanted: Levels, told: Callable[[], None]) -> None:
    """Send this process's records and warnings through ``link`` from now on; ``told`` is called after each.

    Handlers that were inherited, or configured by a main module that is imported again, are the parent's to call.
    """
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for logger in (logging.root, *loggers):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
    set_levels(wanted)
    send = _Sending(link, told)
    logging.root.addHandler(_Handler(send))

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        as_text = (WARNING, str(message), UserWarning, filename, lineno)
        send(_first_that_pickles((WARNING, message, category, filename, lineno), as_text))

    warnings.showwarning = show  # type: ignore[assignment]


class _Sending:
    def __init__(self, link: Link, told: Callable[[], None]) -> None:
        self._send = link.outlet.send_now
        self._told = told

    def __call__(self, item: Outgoing) -> None:
        try:
            # The kernel has it before the task's outcome, so it is handled before that.
            self._send(item)
        except OSError:
            # The parent has gone, or no descriptors are left: a log record must not make a task fail.
            return
        self._told()


class _Handler(logging.Handler):
    def __init__(self, send: Callable[[Outgoing], None]) -> None:
        super().__init__()
        self._forward = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record; what can't be pickled in it goes as text."""
        try:
            fields = dict(vars(record))
            if record.exc_info:
                fields["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
                fields["exc_info"] = None
            as_text = {**{name: _plain(value) for name, value in fields.items()}, "args": None}
            as_text["msg"] = record.getMessage()
            self._forward(_first_that_pickles((RECORD, fields), (RECORD, as_text)))
        except Exception:
            self.handleError(record)


def _plain(value: object) -> object:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _first_that_pickles(*candidates: object) -> Outgoing:
    for candidate in candidates[:-1]:
        try:
            # Tried by itself, and undone: what can't be unpickled would not arrive.
            pickle.loads(pickle.dumps(candidate))
        except Exception:
            continue
        return _codec.encode(candidate)
    return _codec.encode(candidates[-1])


# -- in the parent ---------------------------------------------------------------------------


def handle(message: Any) -> None:
    """Let the parent's logger, or its warnings filters, have what a worker has sent."""
    kind, *rest = message
    if kind == RECORD:
        record = logging.makeLogRecord(rest[0])
        logger = logging.getLogger(record.name if record.name != "root" else None)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    else:
        text, category, filename, lineno = rest
        try:
            warnings.warn_explicit(text, category, filename, lineno)
        except Warning as error:
            # A filter makes errors of warnings, but it is too late to raise it where it happened.
            logging.getLogger("mp_ipcchan").warning("a task warned: %s: %s", category.__name__, error)
