"""``MP_IPCCHAN_ENGINE``: where the pools of a program run that doesn't say so itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any
from urllib.parse import urlsplit

VARIABLE = "MP_IPCCHAN_ENGINE"
#: How long (seconds) a scheduler may take to answer.
_PATIENCE = 10


def check(engine: object) -> None:
    """Raise ``TypeError`` where ``engine`` is no executor, with what to give in its place, if that is known."""
    hint = ""
    if isinstance(engine, str):
        hint = f"; a scheduler's URL goes into the environment ({VARIABLE}=dask://host:port), or give its executor"
    elif isinstance(engine, type):
        hint = f": {engine.__name__} is a class; make one"
    elif callable(getattr(engine, "get_executor", None)):
        hint = "; give what its get_executor() returns"
    if hint or not callable(getattr(engine, "submit", None)):
        raise TypeError(f"engine must be a concurrent.futures.Executor, not {type(engine).__name__}{hint}")


def from_environment() -> tuple[Executor | None, Callable[[], object] | None]:
    """The executor that the environment names, and what closes it; nothing where it names none."""
    url = os.environ.get(VARIABLE)
    return connect(url) if url else (None, None)


def connect(url: str) -> tuple[Executor, Callable[[], object]]:
    """The executor that ``url`` names, and what closes it.

    Raises ``ValueError`` for what isn't such a URL, ``ImportError`` where the package is missing, ``ConnectionError``
    where nobody answers.
    """
    parts = urlsplit(url)
    if parts.scheme != "dask":
        raise ValueError(f"{VARIABLE}={url!r}: there is no engine {parts.scheme!r}; use dask://host:port")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{VARIABLE}={url!r} does not name a scheduler; use dask://host:port")
    return _dask(f"tcp://{parts.netloc}", url)


def _dask(address: str, url: str) -> tuple[Executor, Callable[[], object]]:
    try:
        from distributed import Client  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(f"{VARIABLE}={url!r} needs Dask; install mp_ipcchan[dask]") from error
    try:
        make: Any = Client
        client = make(address, timeout=_PATIENCE, set_as_default=False)
    except OSError as error:
        raise ConnectionError(f"{VARIABLE}={url!r}: no scheduler answers there: {error}") from error
    executor: Executor = client.get_executor(pure=False)
    return executor, client.close
