"""What a ReceiverSet reports, to be told apart with ``match`` or by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ..errors import Disconnected
from ._undecoded import UndecodedMessage


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A message came for the member ``id``; ``message.to()`` decodes it."""

    id: int
    message: UndecodedMessage

    def unwrap(self) -> tuple[int, UndecodedMessage]:
        """``(id, message)``."""
        return self.id, self.message


@dataclass(frozen=True, slots=True)
class ChannelClosed:
    """Every sender of the member ``id`` is gone, and it has left the set. Reported once, behind its last message."""

    id: int

    def unwrap(self) -> NoReturn:
        """Raises ``Disconnected``."""
        raise Disconnected(f"every sender of member {self.id} is gone, and all messages have been received")


@dataclass(frozen=True, slots=True)
class Ready:
    """The member ``id`` is a plain descriptor, and readable; reported again and again, as long as it is.

    A process's sentinel is readable once the process has ended: remove it then.
    """

    id: int

    def unwrap(self) -> NoReturn:
        """Raises ``ValueError``: there is no message."""
        raise ValueError(f"member {self.id} is a descriptor: it is ready, but has no message")
