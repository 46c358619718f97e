"""A client of the key-value store in service_server.py, which must be running, at the name given first.

python service_client.py NAME set colour blue
python service_client.py NAME get colour
python service_client.py NAME watch colour
python service_client.py NAME count words 1000     (sets words to 1, 2, ..., 1000, checking each answer)
"""

import argparse
import sys
from collections.abc import Iterator
from types import TracebackType

from service_server import Get, Request, Set, Value, Watch
from typing_extensions import Self

from mp_ipcchan import ReceiverGone, channel, connect

#: How long (seconds) to wait for the service, for a place in its queue or an answer.
PATIENCE = 20.0


class Client:
    """A connection to the store, and the channel that its answers come by: one for all, since they come in order."""

    def __init__(self, name: str) -> None:
        self._requests = connect(name, PATIENCE, type=Request)
        self._reply, self._answers = channel(Value)

    def get(self, key: str) -> Value:
        return self._ask(Get(key, self._reply))

    def set(self, key: str, value: Value) -> Value:
        """Store a value; the one before."""
        return self._ask(Set(key, value, self._reply))

    def watch(self, key: str) -> Iterator[Value]:
        """The value now, and each that comes; ends with the service, whose sender is the only one left."""
        reply, values = channel(Value)
        with values:
            with reply:
                self._requests.send(Watch(key, reply))
            yield from values

    def _ask(self, request: Request) -> Value:
        self._requests.send(request)
        return self._answers.recv(PATIENCE)

    def close(self) -> None:
        for end in (self._requests, self._reply, self._answers):
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="A client of service_server.py.")
    parser.add_argument("name")
    parser.add_argument("action", choices=["get", "set", "watch", "count"])
    parser.add_argument("key")
    parser.add_argument("value", nargs="?")
    arguments = parser.parse_args()
    try:
        with Client(arguments.name) as client:
            return run(client, arguments)
    except ReceiverGone:
        return complain("the service has ended, or doesn't let this user in")
    except OSError as error:
        return complain(str(error))


def run(client: Client, arguments: argparse.Namespace) -> int:
    match arguments.action:
        case "get":
            print(client.get(arguments.key))
        case "set":
            client.set(arguments.key, arguments.value)
        case "watch":
            for value in client.watch(arguments.key):
                print(value, flush=True)
        case "count":
            for number in range(1, int(arguments.value) + 1):
                before = client.set(arguments.key, number)
                if before != (number - 1 or None):
                    return complain(f"{arguments.key} was {before}, not {number - 1}: is somebody else counting?")
            print(client.get(arguments.key))
    return 0


def complain(text: str) -> int:
    print(text, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
