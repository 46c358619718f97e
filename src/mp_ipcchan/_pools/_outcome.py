"""Outcomes that have come back: what becomes of the task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .._message import Incoming
from ..errors import SerializationError
from . import _call
from ._task import Task

#: Makes what a task fails with whose result can't be encoded, of the reason and the result's ``repr``.
Unsendable = Callable[[BaseException, str], BaseException]

#: How much of a result's ``repr`` is worth showing.
_LONGEST_SHOWN = 200


def settle(
    task: Task,
    incoming: Incoming,
    remote_traceback: Callable[[Any], BaseException],
    unsendable: Unsendable | None = None,
) -> bool:
    """End ``task`` by its outcome; False where it is to be run again instead.

    Decoding is the user's code, and so are the future's callbacks: whatever they raise concerns this task alone.
    """
    try:
        outcome = _call.decode(incoming)
        kind = outcome[0]
    except BaseException as error:
        wrapped = SerializationError(f"the result of {task.described} can't be unpickled: {error}")
        wrapped.__cause__ = error
        _end(task, wrapped)
        return True
    if kind == _call.DONE:
        try:
            task.succeed(outcome[1])
        except BaseException:
            report("exception calling callback")
        return True
    if kind == _call.SKIPPED:
        # It was about to begin when it was taken back, so it was left with its worker, and neither ran it; or it never
        # came there.
        if task.refused is None and task.repeatable:
            return False
        _end(task, task.refused or SerializationError(f"sending {task.name} was interrupted; what it carries is back"))
        return True
    if kind == _call.UNDECODED and not task.by_value and task.repeatable:
        # The worker doesn't know the function, or a class, by its name: it was defined after the worker was started.
        try:
            task.encode_by_value()
            return False
        except BaseException:
            # The worker's error says more.
            pass
    _, text, pickled, *shown = outcome
    raised = revive(text, pickled, remote_traceback)
    if kind == _call.UNDECODED and isinstance(raised, (AttributeError, ImportError)):
        raised = _unknown_there(task, raised)
    if shown:
        raised = unsendable(raised, *shown) if unsendable is not None else _noted(task, raised, *shown)
    _end(task, raised)
    return True


def _unknown_there(task: Task, raised: BaseException) -> BaseException:
    """What a task fails with of which a worker doesn't know a name: ``raised``, or why it can't go by value."""
    reason = task.why_not_by_value()
    if reason is None:
        return raised
    error = SerializationError(
        f"a worker does not know what the call of {task.name} refers to ({raised}): what is defined after the workers "
        f"have started goes to them by value, and {task.name} can't: {type(reason).__name__}: {reason}"
    )
    error.__cause__ = reason
    return error


def _noted(task: Task, raised: BaseException, shown: str) -> BaseException:
    """``raised``, why a result can't be pickled, with a note that says so, where Python has notes."""
    add_note = getattr(raised, "add_note", None)
    if add_note is not None:
        try:
            add_note(f"the result of {task.described} can't be pickled: {shown[:_LONGEST_SHOWN]}")
        except Exception:
            # It is the user's exception, whose notes may be anything.
            pass
    return raised


def _end(task: Task, error: BaseException) -> None:
    try:
        task.fail(error)
    except BaseException:
        report("exception calling callback")


def fail(tasks: list[tuple[Task, BaseException]]) -> None:
    """End tasks with an error each."""
    for task, error in tasks:
        task.let_go()
        _end(task, error)


def cancel(tasks: list[Task]) -> None:
    """End tasks that were not begun."""
    for task in tasks:
        task.let_go()
        try:
            task.future.cancel()
        except BaseException:
            report("exception calling callback")


def report(what: str) -> None:
    """Log the exception that is being handled, which code of the user's has raised in a thread of ours."""
    logging.getLogger("concurrent.futures").exception(what)


def revive(text: str, pickled: bytes | None, remote_traceback: Callable[[Any], BaseException]) -> BaseException:
    """The exception that a task raised, with the traceback of the worker as its cause."""
    error: object
    if pickled is None:
        error = SerializationError(f"the task raised an exception that can't be pickled: {_last_words(text)}")
    else:
        try:
            error = _call.decode(pickled)
        except BaseException as reason:
            error = SerializationError(
                f"the task raised an exception that can't be unpickled ({reason}): {_last_words(text)}"
            )
        if not isinstance(error, BaseException):
            error = SerializationError(
                f"the task raised an exception whose pickle makes {type(error).__name__!r} of it: {_last_words(text)}"
            )
    assert isinstance(error, BaseException)
    error.__cause__ = remote_traceback(text)
    return error


def _last_words(text: str) -> str:
    """Type and text of the exception that a traceback tells of: behind the last one's frames, which are indented."""
    words = text.rpartition("Traceback (most recent call last):\n")[2]
    return next((line for line in words.splitlines() if line and not line[0].isspace()), "of unknown type")
