"""A key-value store as a service: a program of its own, with any number of clients that come and go.

Each client sends requests on its one connection. A request carries the Sender for its answer, since a Sender is a
value like any other; a client may have the answers sent to whom it likes. Messages are held against their type, on both
sides, and are no pickles: a client can ask for what is below, and make the service do nothing else.

Nothing is polled: one thread sleeps until a client comes or says something. A client that is killed is gone from the
set it was in; what it had asked for is answered to nobody, which is an exception to be ignored, and everybody else is
served as before. One that doesn't fetch its answers gets no more once some 170 are waiting, so that it can't fill the
memory of the service.

    python service_server.py /tmp/private/store.sock
    python service_client.py /tmp/private/store.sock set colour blue
    python service_client.py /tmp/private/store.sock get colour

Killed and started again it takes its name over; what it had stored is gone, this is an example. SIGTERM ends it.
"""

import argparse
import selectors
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from mp_ipcchan import (
    Disconnected,
    Empty,
    Full,
    Receiver,
    ReceiverGone,
    Sender,
    SerializationError,
    Server,
)

#: How many requests of one client are answered before others have their turn.
BATCH = 16
#: How long (seconds) a client may be connected and say nothing.
PATIENCE = 10.0


#: What is stored.
Value = str | int | None


class Get(msgspec.Struct, frozen=True, tag=True):
    """Asks for the value of a key; answered with that, or None."""

    key: str
    reply: Sender[Value]


class Set(msgspec.Struct, frozen=True, tag=True):
    """Stores a value; answered with the one before, or None."""

    key: str
    value: Value
    reply: Sender[Value]


class Watch(msgspec.Struct, frozen=True, tag=True):
    """Asks for each value that a key will get; they are sent until the reply's receiver is closed."""

    key: str
    reply: Sender[Value]


Request = Get | Set | Watch


@dataclass
class Store:
    """What the service knows. Decides what is sent to whom, and sends nothing itself."""

    values: dict[str, Value] = field(default_factory=dict)
    watchers: dict[str, list[Sender[Value]]] = field(default_factory=dict)

    def handle(self, request: Request) -> list[tuple[Sender[Value], Value]]:
        """What is to be sent now."""
        match request:
            case Get(key, reply):
                return [(reply, self.values.get(key))]
            case Set(key, value, reply):
                previous, self.values[key] = self.values.get(key), value
                return [(reply, previous), *((watcher, value) for watcher in self.watchers.get(key, []))]
            case Watch(key, reply):
                self.watchers.setdefault(key, []).append(reply)
                return [(reply, self.values.get(key))]

    def forget(self, sender: Sender[Value]) -> None:
        """Nobody hears what is sent there."""
        for key, watchers in list(self.watchers.items()):
            self.watchers[key] = [one for one in watchers if one is not sender]


class Service:
    """The loop: clients that come, and what they say."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.store = Store()
        self.selector = selectors.DefaultSelector()
        self.selector.register(server, selectors.EVENT_READ, self.welcome)

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for key, _ in self.selector.select():
                key.data()

    def welcome(self) -> None:
        try:
            client, request = self.server.accept(0)
        except Empty:
            return
        serve: Callable[[], None] = lambda: self.serve(client)  # noqa: E731
        self.selector.register(client, selectors.EVENT_READ, serve)
        self.answer(request)

    def serve(self, client: Receiver[Request]) -> None:
        """Answer what a client has asked; see it off where it has left, or been killed."""
        try:
            for request in client.recv_many(BATCH, 0):
                self.answer(request)
        except Empty:
            pass
        except (Disconnected, SerializationError) as reason:
            self.dismiss(client, reason)

    def answer(self, request: Request) -> None:
        for reply, value in self.store.handle(request):
            try:
                reply.try_send(value)
            except (ReceiverGone, Full):
                # Dead, or so far behind that what it doesn't fetch would fill our memory.
                self.store.forget(reply)
                reply.close()

    def dismiss(self, client: Receiver[Request], reason: Exception) -> None:
        if not client.closed:
            self.selector.unregister(client)
            client.close()
            if not isinstance(reason, Disconnected):
                print(f"a client was dropped: {reason}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A key-value store for the processes of this user.")
    parser.add_argument("name", nargs="?", help="a path in a private directory, or @word (default: a new path)")
    arguments = parser.parse_args()
    with Server(arguments.name, patience=PATIENCE, type=Request) as server:
        # Raised wherever it is, as Ctrl-C is; the block removes the name.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        # Whoever starts it may wait for this line: from here on clients can connect.
        print(server.name, flush=True)
        Service(server).run()


if __name__ == "__main__":
    main()
