"""What a process is given: the endpoints that can be reached from its arguments.

Fork pickles nothing, so what spawn would find by pickling must be found by looking: through
containers and the state of objects, and into the closures and defaults of functions, but not into
modules, classes and the globals of functions, where everything can be reached from anything.
"""

from __future__ import annotations

import gc
import types
from multiprocessing import queues
from threading import Thread

from ._endpoint import Endpoint

#: Of these, nothing is looked into: they lead everywhere, or to what their pickles leave out.
_OPAQUE: tuple[type, ...] = (
    queues.Queue,
    queues.SimpleQueue,
    Thread,
    type,
    types.ModuleType,
    types.CodeType,
    types.FrameType,
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
)


def make_opaque(cls: type) -> None:
    """Objects of ``cls`` keep their endpoints to themselves: a process whose target knows one isn't given those."""
    global _OPAQUE
    _OPAQUE = (*_OPAQUE, cls)


def endpoints_within(root: object) -> list[Endpoint]:
    """Every sender and receiver that can be reached from ``root``, once each."""
    found: list[Endpoint] = []
    seen: set[int] = set()
    # Held as long as their ids are: some are made on the way and would give theirs to others.
    held: list[object] = []
    waiting: list[object] = [root]
    while waiting:
        obj = waiting.pop()
        if isinstance(obj, _OPAQUE) or id(obj) in seen:
            continue
        seen.add(id(obj))
        held.append(obj)
        if isinstance(obj, Endpoint):
            found.append(obj)
        elif isinstance(obj, dict):
            # Not by its referents: an object's own dict has none from 3.13 on.
            waiting += obj
            waiting += obj.values()
        elif isinstance(obj, types.FunctionType):
            waiting += (obj.__closure__, obj.__defaults__, obj.__kwdefaults__)
        else:
            waiting += gc.get_referents(obj)
    return found
