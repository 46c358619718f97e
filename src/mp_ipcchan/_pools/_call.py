"""Calls on their way to a worker, and their outcomes on the way back.

A call is ``(function, (args, options, variables))``: ``variables`` are the context's, or None.
"""

from __future__ import annotations

import contextvars
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final, TypeVar

from .. import _codec
from .._interrupt import raised_by_handler
from .._message import PACKET_SIZE, PLAIN, PLAIN_SIZE, Incoming, Outgoing, Parcel
from . import _variables

#: How a task ended. The rest of the outcome: the result; or the traceback's text and the pickled exception.
DONE: Final = 0
RAISED: Final = 1
#: The call could not be decoded: as RAISED, and nothing was run.
UNDECODED: Final = 2
#: The task was taken back before it began; nothing follows.
SKIPPED: Final = 3
#: The result could not be encoded: as RAISED, and the result's ``repr``.
UNENCODED: Final = 4

#: Functions of ours that call what they get as their first argument: a task of one is a task of that.
runners: set[Callable[..., Any]] = set()

R = TypeVar("R", bound=Callable[..., Any])


def runner(function: R) -> R:
    """Mark ``function`` as one of ``runners``."""
    runners.add(function)
    return function


def is_runner(function: Callable[..., Any]) -> bool:
    """Whether ``function`` is one of ``runners``. Callables of the user's may have no hash."""
    return function.__class__ is FunctionType and function in runners


#: Pickle's codes for "a pair of the last two", and the end.
_PAIR = b"\x86."
_STOP = b"."
#: How pickles of ours name what they call. May be in a string or a number as well.
_CALLS = (pickle.STACK_GLOBAL, pickle.EXT1, pickle.EXT2, pickle.EXT4)
#: Of functions that went by their names: module and name, and what a frame begins with.
_heads: dict[Callable[..., Any], tuple[str, str, bytes]] = {}
_MOST_HEADS = 256
#: What such a frame begins with, and the functions that came so, with module and name.
_BY_NAME = PLAIN + b"\x80\x05c"
_functions: dict[bytes, tuple[str, str, Callable[..., Any]]] = {}


class ByValue:
    """Pickles what it holds with cloudpickle: functions and classes by what is in them, not by their name."""

    def __init__(self, obj: object) -> None:
        self._obj = obj
        self.__qualname__ = getattr(obj, "__qualname__", None) or repr(type(obj))
        #: Made when it is first needed, and kept: the function of a map goes with each of its chunks.
        self._pickle: bytes | None = None

    def pickled(self) -> bytes:
        """The pickle. Raises why there is none."""
        if self._pickle is None:
            # Imported late: most programs never need it.
            import cloudpickle  # type: ignore[import-untyped]

            self._pickle = cloudpickle.dumps(self._obj)
        return self._pickle

    def __reduce__(self) -> Any:
        return pickle.loads, (self.pickled(),)


def portable(function: Callable[..., Any]) -> Any:
    """``function``, or what arrives as it where it can't be found by its name, being a lambda or local."""
    return ByValue(function) if "<" in getattr(function, "__qualname__", "") else function


def encode_call(
    function: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    variables: _variables.Values | None = None,
) -> Outgoing:
    """The message for a call; what pickle can't take goes by value. Raises why that can't be, which tells the cause.

    Pickle itself would only say that a lambda is one.
    """
    try:
        return _encode(function, (args, options, variables))
    except Exception as error:
        if raised_by_handler(error):
            raise
    function, args = _function_by_value(function, args)
    try:
        return _encode(function, (args, options, variables))
    except Exception as error:
        if raised_by_handler(error):
            raise
        try:
            return _encode(function, _rest_by_value(function, args, options, variables))
        except Exception as by_value:
            if raised_by_handler(by_value):
                raise
            # An endpoint among the arguments is where it belongs; something else there is at fault.
            raise (error if _codec.is_refusal(by_value) else by_value) from None


def encode_by_value(
    function: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    variables: _variables.Values | None = None,
) -> Outgoing:
    """The message for a call that has gone by names that a worker doesn't know: all of it by value that can go so."""
    function, args = _function_by_value(function, args)
    try:
        return _encode(function, _rest_by_value(function, args, options, variables))
    except Exception as error:
        if raised_by_handler(error):
            raise
        return _encode(function, (args, options, variables))


def _function_by_value(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
    """``function`` and ``args`` with the user's function by value, else by name. Raises why it can't go at all.

    A function of the main program takes the variables along that it uses, so there are such as only go by name.
    """
    if is_runner(function):
        return function, (_function_by_value(args[0], ())[0], *args[1:])
    if isinstance(function, ByValue):
        return function, args
    by_value: Any = ByValue(function)
    try:
        by_value.pickled()
    except Exception as error:
        if raised_by_handler(error):
            raise
        try:
            pickle.dumps(function)
        except Exception as by_name:
            raise (by_name if raised_by_handler(by_name) else error) from None
        return function, args
    return by_value, args


def _rest_by_value(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any], variables: _variables.Values | None
) -> Any:
    """What follows on ``function`` in a call, by value, but for the user's function that a runner is to call."""
    if is_runner(function):
        return (args[0], *map(ByValue, args[1:])), options, variables
    return ByValue((args, options, variables))


def _encode(function: Callable[..., Any], rest: Any) -> Outgoing:
    """As ``_codec.encode((function, rest))``, in half the time where ``function`` goes by its name.

    For each function it pickles, pickle looks whether its name leads to it; so does this, but faster.
    """
    if function.__class__ is FunctionType or function.__class__ is BuiltinFunctionType:
        module, name, head = _heads.get(function) or (function.__module__, function.__qualname__, b"")
        found = sys.modules.get(module)
        if found is not None and found.__dict__.get(name) is function:
            head = head or _keep_head(function)
            item = _codec.encode(rest)
            if isinstance(item, bytes):
                frame = head + item[PLAIN_SIZE:-1] + _PAIR
                if len(frame) <= PACKET_SIZE:
                    return frame
            else:
                *pieces, last = item.body
                item.body = [head[PLAIN_SIZE:], *pieces, bytes(last)[:-1] + _PAIR]
                return item
    return _codec.encode((function, rest))


def _keep_head(function: Callable[..., Any]) -> bytes:
    module, name = function.__module__, function.__qualname__
    head = b"%b%b\n%b\n" % (_BY_NAME, module.encode(), name.encode())
    if len(_heads) >= _MOST_HEADS:
        _heads.clear()
    _heads[function] = module, name, head
    return head


def decode(incoming: Incoming) -> Any:
    """What ``encode_call`` or ``encode_outcome`` was given."""
    if isinstance(incoming, Parcel):
        return next(_codec.decoder(incoming))
    return pickle.loads(incoming)


def _decode_call(incoming: Incoming) -> Any:
    """As ``decode``, in a third of the time where a call of that function has come before.

    Pickle imports the module for each call; this looks whether the name still leads to the function, as ``_encode``.
    """
    if incoming.__class__ is not bytes or not incoming.startswith(_BY_NAME):
        return decode(incoming)
    end = incoming.find(b"\n", incoming.find(b"\n") + 1) + 1
    head = incoming[:end]
    known = _functions.get(head)
    if known is not None:
        module, name, function = known
        found = sys.modules.get(module)
        if found is not None and found.__dict__.get(name) is function:
            return function, pickle.loads(incoming[end : -len(_PAIR)] + _STOP)
    call = pickle.loads(incoming)
    if len(_functions) >= _MOST_HEADS:
        _functions.clear()
    module, name = head[len(_BY_NAME) : -1].decode().split("\n")
    _functions[head] = module, name, call[0]
    return call


def is_plain(frame: bytes) -> bool:
    """Whether decoding ``frame``, an outcome, calls nothing: it has numbers, strings and the like, and collections."""
    return not any(map(frame.__contains__, _CALLS))


def outcome_of(incoming: Incoming) -> Outgoing:
    """Run the call in ``incoming``; the message that tells how it ended. Raises nothing that a task may raise."""
    try:
        function, (args, options, variables) = _decode_call(incoming)
    except BaseException as error:
        return failure(UNDECODED, error)
    try:
        if variables:
            result = contextvars.copy_context().run(_variables.call_with, variables, function, args, options)
        else:
            result = function(*args, **options)
    except BaseException as error:
        return failure(RAISED, error)
    try:
        return _codec.encode((DONE, result))
    except Exception as error:
        return _codec.encode((UNENCODED, *describe(error), shown(result)))
    except BaseException as error:
        return failure(RAISED, error)


#: The message for a task that was taken back.
SKIPPED_FRAME: Final = _codec.encode((SKIPPED,))
#: What begins a frame for a worker that is no call: a pickle without the head that calls have.
ORDER: Final = PLAIN + b"\x8a\x08"
#: Sent beside an outcome that went another way, for a parent that may not look there.
WAKE_FRAME: Final = _codec.encode(None)


def order_to_catch_up(total: int) -> bytes:
    """Tells a worker how many tasks have been sent to it: it answers for those that never came."""
    return ORDER + total.to_bytes(8, "little") + b"."


def ordered(frame: bytes) -> int:
    """The number in a frame that begins with ``ORDER``; ``END_FRAME``'s is negative."""
    return int.from_bytes(frame[len(ORDER) : -1], "little", signed=True)


#: What a worker is sent last.
END_FRAME: Final = ORDER + (-1).to_bytes(8, "little", signed=True) + b"."


def failure(kind: int, error: BaseException) -> Outgoing:
    """The outcome of a task that raised ``error``."""
    return _codec.encode((kind, *describe(error)))


def shown(result: object) -> str:
    """``repr(result)``, whatever happens."""
    try:
        return repr(result)
    except Exception as error:
        return f"<{type(result).__name__} whose repr raised {type(error).__name__}>"


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
