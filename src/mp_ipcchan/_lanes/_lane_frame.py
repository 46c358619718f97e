"""What stands behind a message on a shared socket: which lane it is of. Pure: no sockets, no descriptors.

A message of a lane is a message as any other, with a *trailer* behind its body, so nothing but the two
ends of the socket knows of it: it is packed, put into a segment or spilled as all are. Little-endian::

    Q stream | B what it is

    DATA      the message before it
    LANES     the same, and between the two a table of the endpoints of lanes that it brings:
              for each I position | B kind (HandleKind) | Q stream, and behind them I how many
    GRANT     before it Q: the cost of everything that was taken from this stream since it began
    END       every sender is gone
    GONE      the receiver is gone

A trailer and not a header: what is unpickled then begins as it did.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

from .._message import MAX_HANDLES, PLAIN, PLAIN_SIZE, Buffer, HandleKind
from ..errors import ProtocolError

#: How much a stream may have under way or unread on the other side (a cost, roughly bytes).
WINDOW = 65536
#: What each message costs beside its length.
OVERHEAD = 64
#: What one with descriptors costs, or with more than so many bytes, which may lie in a segment.
HEAVY = WINDOW // 4
_LIGHT = 32768

TRAILER = struct.Struct("<QB")
_TOTAL = struct.Struct("<Q")
_ENTRY = struct.Struct("<IBQ")
_COUNT = struct.Struct("<I")


#: No more than this stands behind a body (bytes).
LONGEST_ENDING = MAX_HANDLES * _ENTRY.size + _COUNT.size + TRAILER.size


class Op(enum.IntEnum):
    DATA = 0
    LANES = 1
    GRANT = 2
    END = 3
    GONE = 4


#: As a plain int, for the way of every message.
DATA = int(Op.DATA)


class Crossing(NamedTuple):
    """An endpoint that crosses the socket in a message: its place among the handles, and its stream."""

    position: int
    kind: int
    stream: int


def weigh(size: int, descriptors: bool) -> int:
    """What a message of this size takes of its stream's window; both sides come to the same."""
    return HEAVY if descriptors or size > _LIGHT else size + OVERHEAD


def control(op: Op, stream: int, total: int = 0) -> bytes:
    """The frame of a message about a stream."""
    return PLAIN + _TOTAL.pack(total) + TRAILER.pack(stream, op)


def total_of(data: Buffer) -> int:
    """What ``control`` was given. Raises ``ProtocolError``."""
    if len(data) != PLAIN_SIZE + _TOTAL.size + TRAILER.size:
        raise ProtocolError("a message about a lane is of another size than those are")
    return int(_TOTAL.unpack_from(data, PLAIN_SIZE)[0])


def ending(stream: int, crossings: Sequence[Crossing]) -> bytes:
    """What stands behind the body of a message."""
    if not crossings:
        return TRAILER.pack(stream, Op.DATA)
    entries = [_ENTRY.pack(*crossing) for crossing in crossings]
    return b"".join((*entries, _COUNT.pack(len(entries)), TRAILER.pack(stream, Op.LANES)))


def split(data: Buffer) -> tuple[int, Op, int]:
    """The stream, what it is, and where the trailer begins. Raises ``ProtocolError``."""
    end = len(data) - TRAILER.size
    if end < 0:
        raise ProtocolError("a message on a mux is too short to say which lane it is of")
    stream, number = TRAILER.unpack_from(data, end)
    try:
        return stream, Op(number), end
    except ValueError:
        raise ProtocolError(f"a message on a mux is of kind {number}, which there isn't") from None


def split_crossings(data: Buffer, end: int) -> tuple[list[Crossing], int]:
    """The table that ends at ``end``, and where it begins. Raises ``ProtocolError``."""
    start = end - _COUNT.size
    count = _COUNT.unpack_from(data, start)[0] if start >= 0 else 0
    start -= count * _ENTRY.size
    if count < 1 or start < 0:
        raise ProtocolError("a message on a mux lies about the endpoints that it brings")
    found = [Crossing(*_ENTRY.unpack_from(data, start + at * _ENTRY.size)) for at in range(count)]
    positions = [one.position for one in found]
    if sorted(set(positions)) != positions or {one.kind for one in found} - {HandleKind.SENDER, HandleKind.RECEIVER}:
        raise ProtocolError("a message on a mux brings endpoints that there can't be")
    return found, start
