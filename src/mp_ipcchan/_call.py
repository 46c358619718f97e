"""Calls on their way to a worker, and their outcomes on the way back."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from . import _codec
from ._message import Incoming, Outgoing, Parcel

#: How a task ended. The rest of the outcome: the result; or the traceback's text and the pickled exception.
DONE: Final = 0
RAISED: Final = 1
#: The call could not be decoded: as RAISED, and nothing was run.
UNDECODED: Final = 2
#: The task was taken back before it began; nothing follows.
SKIPPED: Final = 3


class ByValue:
    """Pickles what it holds with cloudpickle: functions and classes by what is in them, not by their name."""

    def __init__(self, obj: object) -> None:
        self._obj = obj

    def __reduce__(self) -> Any:
        # Imported late: most programs never need it.
        import cloudpickle  # type: ignore[import-untyped]

        return pickle.loads, (cloudpickle.dumps(self._obj),)


def encode_call(function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Outgoing:
    """The message for a call; what pickle can't take goes by value. Raises what pickle says of it otherwise."""
    try:
        return _codec.encode((function, args, options))
    except Exception as error:
        try:
            return encode_by_value(function, args, options)
        except Exception:
            raise error from None


def encode_by_value(function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Outgoing:
    """The message for a call whose function goes by value; if need be, its arguments as well."""
    try:
        return _codec.encode((ByValue(function), args, options))
    except Exception:
        return _codec.encode((ByValue(function), ByValue(args), ByValue(options)))


def decode(incoming: Incoming) -> Any:
    """What ``encode_call`` or ``encode_outcome`` was given."""
    if isinstance(incoming, Parcel):
        return next(_codec.decoder(incoming))
    return pickle.loads(incoming)


def outcome_of(incoming: Incoming) -> Outgoing:
    """Run the call in ``incoming``; the message that tells how it ended. Raises nothing that a task may raise."""
    try:
        function, args, options = decode(incoming)
    except Exception as error:
        return _failure(UNDECODED, error)
    try:
        result = function(*args, **options)
    except BaseException as error:
        return _failure(RAISED, error)
    try:
        return _codec.encode((DONE, result))
    except Exception as error:
        return _failure(RAISED, error)


#: The message for a task that was taken back.
SKIPPED_FRAME: Final = _codec.encode((SKIPPED,))


def _failure(kind: int, error: BaseException) -> Outgoing:
    return _codec.encode((kind, *describe(error)))


def describe(error: BaseException) -> tuple[str, bytes | None]:
    """The text of an exception's traceback, and the exception pickled by itself: if that fails, there is the text."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return text, _pickled(error.with_traceback(None))


def _pickled(error: BaseException) -> bytes | None:
    for dumps in (pickle.dumps, _by_value):
        try:
            return dumps(error)
        except Exception:
            continue
    return None


def _by_value(obj: object) -> bytes:
    return pickle.dumps(ByValue(obj))
