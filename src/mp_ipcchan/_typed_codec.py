"""Objects of one type to messages and back, for peers that don't trust each other: MessagePack, and no pickle.

What arrives is read into private memory, held against the type, and made of nothing but what the type
says: a peer can't name a class or a function. A message is checked where it is sent, too, by decoding it
as the receiver will, so a mistake shows where it was made.

An endpoint in a message stands in its bytes as an extension of MessagePack that tells its *number* in
the message, where its descriptors are in the table beside, and what else it needs. An object that
stands at several places has one number; each descriptor is handed out once. What kind of endpoint it
is, the type says, never the message. A class that can stand in a type is registered with a ``Field``.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ._message import INLINE_SIZE, PLAIN, PLAIN_SIZE, Handle, Message, Outgoing, Parcel
from .errors import ProtocolError

if TYPE_CHECKING:
    import msgspec

#: The largest message of a typed channel, unless ``channel`` is told otherwise (bytes). It bounds what a
#: peer can make a receiver allocate.
MAX_SIZE = 1 << 28
#: The code of an endpoint among the extensions of MessagePack.
_EXTENSION = 105


class Field(Protocol):
    """How objects of one class travel in typed messages."""

    def check(self, obj: Any, of: TypedCodec | None, /) -> None:
        """Raise ``TypeError`` where ``obj`` is not what a field of this class takes; ``of``: its argument, if any."""

    def pack(self, obj: Any, /) -> tuple[object, Sequence[Handle]]:
        """What goes into the bytes of the message (MessagePack's own types), and the descriptors."""

    def rebuild(self, payload: Any, of: TypedCodec | None, kinds: bytes, fds: list[int], /) -> Any:
        """The object, from what a stranger says: owns the descriptors from its first line on, whatever it raises."""


_fields: dict[type, Field] = {}


def register(cls: type, field: Field) -> None:
    """Let objects of exactly ``cls`` stand in messages, and ``cls`` and ``cls[U]`` in types."""
    _fields[cls] = field


def _import_msgspec() -> Any:
    try:
        import msgspec
    except ImportError as error:
        raise ImportError("typed channels need msgspec: pip install 'mp_ipcchan[msgspec]'") from error
    return msgspec


def codec_of(type: Any, max_size: int = MAX_SIZE) -> TypedCodec:  # noqa: A002  (the contract's name)
    """The codec for messages of ``type``. Raises ``TypeError`` where that can't be expressed, ``ImportError``."""
    try:
        hash(type)
    except TypeError:
        return TypedCodec(type, max_size)
    return _kept_codec(type, max_size)


def codec_for(type: Any, max_size: int = MAX_SIZE) -> TypedCodec | None:  # noqa: A002
    """As ``codec_of``; None where there is no type, whose messages are pickles, of any size."""
    if type is None and max_size != MAX_SIZE:
        raise TypeError("max_size is for channels with a type: channel(type, max_size=...)")
    return None if type is None else codec_of(type, max_size)


@functools.lru_cache(maxsize=256)
def _kept_codec(type: Any, max_size: int) -> TypedCodec:  # noqa: A002
    return TypedCodec(type, max_size)


class TypedCodec:
    """Encodes and decodes messages of one type, of at most ``max_size`` bytes."""

    __slots__ = ("_declared", "_decode", "_encode", "_packings", "_unpackings", "encode", "loads", "max_size", "type")

    def __init__(self, type: Any, max_size: int) -> None:  # noqa: A002
        if max_size < 1:
            raise ValueError(f"max_size must be at least 1, not {max_size}")
        msgspec = _import_msgspec()
        self.type: Any = type
        self.max_size: int = max_size
        carries = _check_expressible(msgspec, type)
        #: What stands in the type: each field as it was declared, with its class and argument.
        self._declared: dict[Any, tuple[Field, TypedCodec | None]] = {}
        #: Those that are not in use, as the encoders of ``_codec``.
        self._packings: list[_Packing] = []
        self._unpackings: list[_Unpacking] = []
        self._encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[Any], Any] = msgspec.msgpack.Decoder(type).decode
        #: Makes the message for an object. Raises what tells that it doesn't fit; endpoints are as before then.
        self.encode: Callable[[Any], Outgoing] = self._encode_with_handles if carries else self._encode_plain
        #: What a plain frame holds. Raises what tells that it is nothing of the type.
        self.loads: Callable[[bytes], Any] = self._loads_with_handles if carries else self._loads_plain

    def __repr__(self) -> str:
        return f"TypedCodec({self.type!r}, {self.max_size})"

    # -- out ---------------------------------------------------------------------------------

    def _encode_plain(self, obj: Any) -> Outgoing:
        body = self._encode(obj)
        self._decode(body)
        self._check_size(len(body))
        return _message(body, ())

    def _encode_with_handles(self, obj: Any) -> Outgoing:
        try:
            packing = self._packings.pop()
        except IndexError:
            packing = _Packing(self)
        try:
            body = packing.encode(obj)
            packing.check(body)
            self._check_size(len(body))
        except BaseException:
            Message((), (), packing.handles).unsent()
            packing.clear()
            raise
        handles = packing.handles[:]
        packing.clear()
        self._packings.append(packing)
        return _message(body, handles)

    def _check_size(self, size: int) -> None:
        if size > self.max_size:
            raise ValueError(f"a message of {size} bytes is larger than the channel's max_size, {self.max_size}")

    # -- in ----------------------------------------------------------------------------------

    def _loads_plain(self, frame: bytes) -> Any:
        return self._decode(frame[PLAIN_SIZE:])

    def _loads_with_handles(self, frame: bytes) -> Any:
        return self._unpack(Parcel(frame[PLAIN_SIZE:], (), b"", []))

    def decoder(self, parcel: Parcel) -> Iterator[Any]:
        """An iterator whose one item is the object in ``parcel``, which is closed then, as ``_codec.decoder``'s."""
        return map(self._decode_parcel, (parcel,))

    def _decode_parcel(self, parcel: Parcel) -> Any:
        try:
            if parcel.buffers:
                raise ProtocolError("a message brings buffers, which no typed message has")
            self._check_size(len(parcel.body))
            # Private, and only then looked at: its sender may still write to a segment.
            parcel.body = bytes(parcel.body)
            return self._unpack(parcel)
        finally:
            parcel.close()

    def _unpack(self, parcel: Parcel) -> Any:
        try:
            unpacking = self._unpackings.pop()
        except IndexError:
            unpacking = _Unpacking(self)
        try:
            obj = unpacking.decode(parcel)
        except BaseException:
            # By name: the traceback of the error would keep them open.
            for made in unpacking.made.values():
                made.close()
            unpacking.made.clear()
            raise
        unpacking.made.clear()
        unpacking.places.clear()
        self._unpackings.append(unpacking)
        return obj

    def declared(self, declaration: Any) -> tuple[Field, TypedCodec | None]:
        """The field that stands in the type as ``declaration``, and the codec for its argument, if it has one."""
        try:
            return self._declared[declaration]
        except KeyError:
            origin, argument = _split(declaration)
            of = None if argument is _NONE else codec_of(argument, self.max_size)
            known = self._declared[declaration] = _fields[origin], of
            return known


def _message(body: bytes, handles: Sequence[Handle]) -> Outgoing:
    return Message([body], (), handles) if handles or len(body) > INLINE_SIZE else PLAIN + body


class _Packing:
    """An encoder that collects endpoints, and the decoder that checks what it made."""

    __slots__ = ("_claimed", "_codec", "_decode", "_ext", "_items", "_pack_place", "_places", "encode", "handles")

    def __init__(self, codec: TypedCodec) -> None:
        msgspec = _import_msgspec()
        self._codec = codec
        self.handles: list[Handle] = []
        #: The endpoints by number. It keeps them while their ids stand for them in ``_places``.
        self._items: list[object] = []
        self._places: dict[int, Any] = {}
        self._claimed: set[int] = set()
        self._ext = msgspec.msgpack.Ext
        self._pack_place: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self.encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder(enc_hook=self._pack).encode
        self._decode: Callable[[bytes], Any] = msgspec.msgpack.Decoder(codec.type, dec_hook=self._find).decode

    def _pack(self, obj: Any) -> Any:
        place = self._places.get(id(obj))
        if place is None:
            field = _fields.get(type(obj))
            if field is None:
                raise TypeError(f"objects of type {type(obj).__name__!r} don't go into typed messages")
            payload, handles = field.pack(obj)
            first = len(self.handles)
            self.handles += handles
            described = (len(self._items), first, len(handles), payload)
            place = self._places[id(obj)] = self._ext(_EXTENSION, self._pack_place(described))
            self._items.append(obj)
        return place

    def check(self, body: bytes) -> None:
        """Raise what the receiver would."""
        self._decode(body)
        if len(self._claimed) != len(self._items):
            raise TypeError("an endpoint stands where the channel's type has none")

    def _find(self, declaration: Any, value: Any) -> Any:
        number = _place(value)[0]
        obj = self._items[number]
        field, of = self._codec.declared(declaration)
        field.check(obj, of)
        self._claimed.add(number)
        return obj

    def clear(self) -> None:
        self.handles.clear()
        self._items.clear()
        self._places.clear()
        self._claimed.clear()


class _Unpacking:
    """A decoder that makes endpoints of a parcel's descriptors."""

    __slots__ = ("_codec", "_decode", "_parcel", "made", "places")

    def __init__(self, codec: TypedCodec) -> None:
        self._codec = codec
        self._parcel: Parcel | None = None
        #: The endpoints by number, and what each was declared as.
        self.made: dict[int, Any] = {}
        self.places: dict[int, Any] = {}
        self._decode: Callable[[Any], Any] = _import_msgspec().msgpack.Decoder(codec.type, dec_hook=self._make).decode

    def decode(self, parcel: Parcel) -> Any:
        self._parcel = parcel
        try:
            obj = self._decode(parcel.body)
        finally:
            self._parcel = None
        if not parcel.is_spent():
            raise ProtocolError("a message brings descriptors that it doesn't mention")
        return obj

    def _make(self, declaration: Any, value: Any) -> Any:
        number, first, count, payload = _place(value)
        if number in self.made:
            if self.places[number] != declaration:
                raise ProtocolError("a message has one endpoint at places of different types")
            return self.made[number]
        assert self._parcel is not None
        field, of = self._codec.declared(declaration)
        kinds, fds = self._parcel.take(first, count)
        self.places[number] = declaration
        made = self.made[number] = field.rebuild(payload, of, kinds, fds)
        return made


def _place(value: Any) -> tuple[int, int, int, Any]:
    """What an extension in a message says of an endpoint. ``TypeError`` for another value."""
    msgspec = _import_msgspec()
    if not isinstance(value, msgspec.msgpack.Ext) or value.code != _EXTENSION:
        raise TypeError(f"expected an endpoint, got {type(value).__name__!r}")
    return _place_decoder().decode(value.data)  # type: ignore[no-any-return]


@functools.cache
def _place_decoder() -> msgspec.msgpack.Decoder[Any]:
    return _import_msgspec().msgpack.Decoder(tuple[int, int, int, Any])  # type: ignore[no-any-return]


# -- what a type says ----------------------------------------------------------------------------

_NONE = object()


def _split(declaration: Any) -> tuple[Any, Any]:
    """``Sender[U]`` as its class and U; ``_NONE`` for a class without an argument."""
    arguments = typing.get_args(declaration)
    return typing.get_origin(declaration) or declaration, arguments[0] if arguments else _NONE


def _check_expressible(msgspec: Any, root: Any) -> bool:
    """Raise ``TypeError`` where ``root``, or the argument of an endpoint in it, is nothing that can be checked.

    Returns whether messages of ``root`` carry endpoints.
    """
    carries = False
    waiting = [root]
    seen: list[Any] = []
    for declared in waiting:
        if declared in seen or isinstance(declared, typing.TypeVar):
            continue
        seen.append(declared)
        try:
            info = msgspec.inspect.type_info(declared)
            msgspec.msgpack.Decoder(declared)
        except Exception as error:
            raise TypeError(f"messages can't be of type {declared!r}: {error}") from error
        customs, classes = _parts(msgspec, info)
        for custom in customs:
            if custom not in _fields:
                raise TypeError(
                    f"messages can't be of type {declared!r}: nothing tells how to check a {custom!r}. Use msgspec's "
                    f"Struct, dataclasses, the builtin types and endpoints"
                )
        if declared is root:
            carries = bool(customs)
        if customs:
            for hint in (declared, *(hint for one in classes for hint in _hints(one))):
                waiting += _arguments(hint)
    return carries


def _parts(msgspec: Any, info: Any) -> tuple[set[Any], list[Any]]:
    """The classes in a type that msgspec knows nothing of, and those with fields."""
    customs: set[Any] = set()
    classes: list[Any] = []
    waiting = [info]
    seen: set[int] = set()
    for node in waiting:
        if isinstance(node, tuple):
            waiting += node
        elif isinstance(node, (msgspec.inspect.Type, msgspec.inspect.Field)) and id(node) not in seen:
            seen.add(id(node))
            if isinstance(node, msgspec.inspect.CustomType):
                customs.add(node.cls)
            elif hasattr(node, "fields"):
                classes.append(node.cls)
            waiting += [getattr(node, name) for name in node.__struct_fields__]
    return customs, classes


def _hints(cls: Any) -> list[Any]:
    try:
        return list(typing.get_type_hints(typing.get_origin(cls) or cls, include_extras=True).values())
    except Exception:
        # msgspec could tell; so what these say is checked when it is first used.
        return []


def _arguments(hint: Any) -> list[Any]:
    """What the endpoints within ``hint`` are of."""
    origin, argument = _split(hint)
    if origin in _fields:
        return [] if argument is _NONE else [argument]
    return [found for one in typing.get_args(hint) for found in _arguments(one)]
