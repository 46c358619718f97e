"""A bar that shows how far a map is: ``progress=True``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")


def wanted(progress: object) -> bool:
    """Whether there is to be a bar. ``TypeError`` for a function, which nobody would call."""
    if callable(progress):
        raise TypeError(f"progress=True shows a bar; it doesn't take a function: {progress!r}")
    return bool(progress)


def new_bar(*iterables: Iterable[Any]) -> Any:
    """A bar of tqdm's, as long as the shortest of ``iterables`` that tells. ``ImportError`` where there is no tqdm."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError("progress=True needs tqdm; install mp_ipcchan[progress]") from error
    return tqdm(total=min((len(one) for one in iterables if isinstance(one, Sized)), default=None))


def advancer(bar: Any) -> Callable[[int | None], None]:
    """A function that moves ``bar`` by so many calls, or with None closes it."""

    def advance(calls: int | None) -> None:
        if calls is None:
            bar.close()
        else:
            bar.update(calls)

    return advance


def shown(results: Iterator[T], bar: Any) -> Iterator[T]:
    """``results``, with ``bar`` moving along."""
    try:
        for result in results:
            bar.update(1)
            yield result
    finally:
        bar.close()
        close = getattr(results, "close", None)
        if close is not None:
            close()
