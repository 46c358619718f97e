"""Frames: what the bytes of a packet mean. Pure: no sockets, no descriptors.

A *plain* frame is ``PLAIN`` and the payload, which fills the rest of the packet: no counts, so
none that could lie.

Every other frame begins with ``MAGIC`` and a fixed header of 24 bytes, little-endian::

    4s magic | B kind | B flags | H zero | I handles | I lengths | Q body size

and is followed by one byte a handle (its ``HandleKind``), eight bytes a length, and, unless the
payload lies in a segment, the body and the buffers, back to back.

    kind      handles          lengths                   payload
    ENVELOPE  the message's    sizes of its buffers      body, buffers
    PACK      none             sizes of the frames       plain frames, back to back
    SPILL     its carriers     table's place, messages   in a segment always: messages, table
    SHUT      none             none                      none: the queue was shut down

In a segment the buffers are aligned (``_segment.layout``). Descriptors lie in the packet in this
order: the segment, the carrier, then the handles; the flags tell which there are.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

from .._message import KNOWN_KINDS, MAX_BUFFERS, MAX_HANDLES, PLAIN
from ..errors import ProtocolError

MAGIC = b"ipc1"

_HEADER = struct.Struct("<4sBBHIIQ")
HEADER_SIZE = _HEADER.size
_RECORD = struct.Struct("<QII")
RECORD_SIZE = _RECORD.size

SEGMENT_FLAG = 1
CARRIER_FLAG = 2


class FrameKind(enum.IntEnum):
    ENVELOPE = 1
    PACK = 2
    SPILL = 3
    SHUT = 4


class Frame(NamedTuple):
    """The parsed head of a packet; ``start`` is where its payload begins."""

    kind: FrameKind
    flags: int
    kinds: bytes
    lengths: tuple[int, ...]
    body_size: int
    start: int

    @property
    def in_segment(self) -> bool:
        return bool(self.flags & SEGMENT_FLAG)

    @property
    def in_carrier(self) -> bool:
        return bool(self.flags & CARRIER_FLAG)

    @property
    def descriptors(self) -> int:
        """How many descriptors the packet itself must bring."""
        return self.in_segment + (1 if self.in_carrier else len(self.kinds))


def head(kind: FrameKind, flags: int, kinds: bytes, lengths: Sequence[int], body_size: int) -> bytes:
    """The bytes of a frame up to its payload."""
    return b"".join(
        (
            _HEADER.pack(MAGIC, kind, flags, 0, len(kinds), len(lengths), body_size),
            kinds,
            struct.pack(f"<{len(lengths)}Q", *lengths),
        )
    )


def parse(packet: bytes, descriptors: int) -> Frame:
    """Read the head of a packet that isn't plain, and hold every count in it against what came.

    Raises ``ProtocolError``; afterwards each number in the result can be relied on.
    """
    if len(packet) < HEADER_SIZE or not packet.startswith(MAGIC):
        raise ProtocolError(f"a packet of {len(packet)} bytes does not begin as one of ours: {packet[:16]!r}")
    _, kind_number, flags, zero, n_handles, n_lengths, body_size = _HEADER.unpack_from(packet)
    start = HEADER_SIZE + n_handles + 8 * n_lengths
    if zero or flags & ~(SEGMENT_FLAG | CARRIER_FLAG) or start > len(packet):
        raise ProtocolError(
            f"the header of a packet of {len(packet)} bytes lies: "
            f"{n_handles} handles, {n_lengths} lengths, flags {flags}"
        )
    try:
        kind = FrameKind(kind_number)
    except ValueError:
        raise ProtocolError(f"a packet is of kind {kind_number}, which there isn't") from None
    kinds = packet[HEADER_SIZE : HEADER_SIZE + n_handles]
    if not KNOWN_KINDS.issuperset(kinds):
        raise ProtocolError("a packet lists a descriptor of a kind that there isn't")
    lengths = struct.unpack_from(f"<{n_lengths}Q", packet, HEADER_SIZE + n_handles)
    frame = Frame(kind, flags, kinds, lengths, body_size, start)
    if frame.descriptors != descriptors:
        raise ProtocolError(f"a packet announces {frame.descriptors} descriptors and brings {descriptors}")
    _check_payload(frame, len(packet) - start)
    return frame


def _check_payload(frame: Frame, present: int) -> None:
    if frame.kind is FrameKind.ENVELOPE:
        expected = 0 if frame.in_segment else frame.body_size + sum(frame.lengths)
    elif frame.kind is FrameKind.PACK:
        expected = sum(frame.lengths)
        if frame.flags or frame.kinds or frame.body_size:
            raise ProtocolError("a packet of packed messages brings descriptors")
        if not frame.lengths:
            raise ProtocolError("a packet of packed messages is empty")
    elif frame.kind is FrameKind.SPILL:
        expected = 0
        if not frame.in_segment or len(frame.lengths) != 2 or not _holds_table(frame):
            raise ProtocolError("the last packet of a process says wrongly where its messages lie")
        if frame.in_carrier:
            raise ProtocolError("the last packet of a process comes in a carrier")
    else:
        expected = 0
        if frame.flags or frame.kinds or frame.lengths or frame.body_size:
            raise ProtocolError("the packet that tells the end of a queue brings more than that")
    if expected != present:
        raise ProtocolError(f"a packet announces a payload of {expected} bytes and brings {present}")


def _holds_table(frame: Frame) -> bool:
    """Whether the table of a spill lies within its segment: an entry for each message and one for their end."""
    table, count = frame.lengths
    return table + 8 * (count + 1) <= frame.body_size


def slices(start: int, lengths: Sequence[int]) -> Iterator[slice]:
    """Where each of several stretches of bytes lies, back to back from ``start``."""
    ends = [*accumulate(lengths, initial=start)]
    return map(slice, ends, ends[1:])


def pack(frames: Sequence[bytes]) -> bytes:
    """Many plain frames as one packet, in order."""
    return head(FrameKind.PACK, 0, b"", [len(frame) for frame in frames], 0) + b"".join(frames)


def unpack(frame: Frame, packet: bytes) -> list[bytes]:
    """The plain frames of a packet that ``pack`` made."""
    frames = [*map(packet.__getitem__, slices(frame.start, frame.lengths))]
    if not all(map(bytes.startswith, frames, repeat(PLAIN))):
        raise ProtocolError("a packet of packed messages holds something else")
    return frames


#: Told to every reader of a queue that was shut down.
SHUT = head(FrameKind.SHUT, 0, b"", (), 0)


class Record(NamedTuple):
    """The head of one message in a spill. A table of ``table_size`` bytes follows, then body and buffers."""

    body_size: int
    handles: int
    buffers: int

    @property
    def table_size(self) -> int:
        return self.handles + 8 * self.buffers

    def parse_table(self, table: bytes) -> tuple[tuple[int, ...], bytes]:
        """The buffers' sizes and the kinds of the handles."""
        kinds = table[: self.handles]
        if not KNOWN_KINDS.issuperset(kinds):
            raise ProtocolError("a message lists a descriptor of a kind that there isn't")
        return struct.unpack_from(f"<{self.buffers}Q", table, self.handles), kinds


def record(body_size: int, buffer_sizes: Sequence[int], kinds: bytes) -> bytes:
    """The head and the table of one message in a spill; its body and buffers follow back to back."""
    return b"".join(
        (
            _RECORD.pack(body_size, len(kinds), len(buffer_sizes)),
            kinds,
            struct.pack(f"<{len(buffer_sizes)}Q", *buffer_sizes),
        )
    )


def parse_record(head: bytes) -> Record:
    """Read what ``record`` wrote, without the table. Raises ``ProtocolError`` for more than a message has."""
    body_size, handles, buffers = _RECORD.unpack(head)
    if handles > MAX_HANDLES or buffers > MAX_BUFFERS:
        raise ProtocolError(f"a message lists {handles} descriptors and {buffers} buffers")
    return Record(body_size, handles, buffers)
