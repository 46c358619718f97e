"""Frames: what is written is read, and whatever else comes is refused with ProtocolError."""

from __future__ import annotations

import pickle
import random
import struct

import pytest

from mp_ipcchan._message import MAX_HANDLES, PLAIN, HandleKind
from mp_ipcchan._transport._frame import (
    CARRIER_FLAG,
    HEADER_SIZE,
    MAGIC,
    SEGMENT_FLAG,
    SHUT,
    FrameKind,
    head,
    pack,
    parse,
    parse_record,
    record,
    unpack,
)
from mp_ipcchan.errors import ProtocolError

KINDS = bytes([HandleKind.SENDER, HandleKind.FILE])


def test_plain_header_is_a_pickle_that_does_nothing() -> None:
    for obj in (None, 0, "text", [1, {2: b"3"}], b"x" * 100_000):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(PLAIN + pickle.dumps(obj, protocol)) == obj


def test_envelope_inline() -> None:
    packet = head(FrameKind.ENVELOPE, 0, KINDS, (3, 0), 4) + b"bodyabc"
    frame = parse(packet, 2)
    assert (frame.kinds, frame.lengths, frame.body_size, frame.start) == (KINDS, (3, 0), 4, len(packet) - 7)
    assert not frame.in_segment
    assert not frame.in_carrier


@pytest.mark.parametrize(
    ("flags", "descriptors"), [(0, 2), (SEGMENT_FLAG, 3), (CARRIER_FLAG, 1), (SEGMENT_FLAG | CARRIER_FLAG, 2)]
)
def test_descriptors_are_counted(flags: int, descriptors: int) -> None:
    packet = head(FrameKind.ENVELOPE, flags, KINDS, (), 0)
    assert parse(packet, descriptors).descriptors == descriptors
    for wrong in {0, 1, 2, 3, 4} - {descriptors}:
        with pytest.raises(ProtocolError, match="descriptors"):
            parse(packet, wrong)


def test_pack() -> None:
    frames = [PLAIN + bytes(size) for size in (0, 1, 1000)]
    packet = pack(frames)
    assert unpack(parse(packet, 0), packet) == frames


def test_pack_of_something_else() -> None:
    packet = pack([PLAIN, b"stranger"])
    with pytest.raises(ProtocolError):
        unpack(parse(packet, 0), packet)


def test_record() -> None:
    written = record(7, (1, 2), KINDS)
    read = parse_record(written[:16])
    assert read.body_size == 7
    assert read.table_size == len(written) - 16
    assert read.parse_table(written[16:]) == ((1, 2), KINDS)


@pytest.mark.parametrize("counts", [(MAX_HANDLES + 1, 0), (0, 1 << 31), (2**32 - 1, 2**32 - 1)])
def test_record_with_too_much(counts: tuple[int, int]) -> None:
    with pytest.raises(ProtocolError):
        parse_record(struct.pack("<QII", 0, *counts))


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"a stranger's greeting, long enough for a header",
        MAGIC,
        SHUT[:-1],
        SHUT + b"more",
        head(FrameKind.PACK, 0, b"", (), 0),
        head(FrameKind.PACK, 0, b"", (5,), 0) + b"four",
        head(FrameKind.PACK, SEGMENT_FLAG, b"", (4,), 0) + b"four",
        head(FrameKind.SPILL, 0, b"", (0, 1), 0),
        head(FrameKind.SPILL, SEGMENT_FLAG, b"", (0, 1, 2), 10),
        head(FrameKind.SPILL, SEGMENT_FLAG, b"", (11, 1), 10),
        head(FrameKind.ENVELOPE, 0, b"", (), 5) + b"four",
        head(FrameKind.ENVELOPE, 0, b"", (2**63,), 2**63),
        head(FrameKind.ENVELOPE, 4, b"", (), 0),
        head(FrameKind.ENVELOPE, 0, b"\x63", (), 0),
        struct.pack("<4sBBHIIQ", MAGIC, 99, 0, 0, 0, 0, 0),
        struct.pack("<4sBBHIIQ", MAGIC, 1, 0, 1, 0, 0, 0),
        struct.pack("<4sBBHIIQ", MAGIC, 1, 0, 0, 2**32 - 1, 0, 0),
        struct.pack("<4sBBHIIQ", MAGIC, 1, 0, 0, 0, 2**32 - 1, 0),
    ],
)
def test_strangers_are_refused(packet: bytes) -> None:
    for descriptors in (0, 1, 2):
        with pytest.raises(ProtocolError):
            parse(packet, descriptors)


def test_random_headers_are_read_or_refused() -> None:
    """Nothing but ProtocolError comes of any header; what is read adds up."""
    choose = random.Random(20)
    for _ in range(20_000):
        packet = bytearray(head(FrameKind.ENVELOPE, 0, KINDS, (3, 0), 4) + b"bodyabc")
        for _ in range(choose.randint(1, 4)):
            packet[choose.randrange(HEADER_SIZE + 18)] = choose.choice((0, 1, 2, 3, 255, choose.randrange(256)))
        try:
            frame = parse(bytes(packet), 2)
        except ProtocolError:
            continue
        if frame.kind is FrameKind.ENVELOPE and not frame.in_segment:
            assert frame.start + frame.body_size + sum(frame.lengths) == len(packet)
