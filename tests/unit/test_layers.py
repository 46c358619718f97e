"""Imports point down: each module imports only from those that stand above it in this table."""

from __future__ import annotations

import ast
from pathlib import Path

import mp_ipcchan

PACKAGE = Path(mp_ipcchan.__file__).parent

LAYERS = [
    ["errors", "_deadline", "_interrupt", "_servers._peer", "_servers._watch"],
    ["_message", "_segments._memory", "_servers._address"],
    ["_lanes._lane_frame", "_segments._segment", "_transport._frame", "_transport._carrier"],
    ["_segments._segment_pool", "_segments._segment_cache"],
    ["_segments._sealed_array"],
    ["_transport._cargo", "_transport._window"],
    ["_transport._spill"],
    ["_transport.unix"],
    ["_servers._listener"],
    ["_codec", "_typed_codec"],
    ["_segments._shared_memory"],
    ["_drainer", "_packets", "_waker"],
    ["_backlog", "_inlet"],
    ["_outlet"],
    ["_link"],
    ["_fd", "_endpoint", "_delivery"],
    ["_async", "_opaque"],
    ["_sender", "_receiver"],
    ["_channel", "_servers._rendezvous", "_servers._lobby", "_connection"],
    ["_typed_fields", "_servers._host"],
    ["_servers._server"],
    ["_queues._counter", "_queues._ledger"],
    ["_queues._ends"],
    ["_queues._books"],
    ["_queues._queue"],
    ["_queues._queue_travel", "_reach", "_sets._undecoded"],
    ["_sets._events", "_sets._lookout", "_sets._members"],
    ["_sets._membership"],
    ["_sets._receiver_set"],
    ["_sets._router"],
    ["_process"],
    ["_reduction"],
    ["_context", "_lanes._switchboard"],
    ["_lanes._lane_message"],
    ["_lanes._lane_feed", "_lanes._lane_inlet", "_lanes._lane_outlet"],
    ["_lanes._lane_travel"],
    ["_lanes._lane"],
    ["_lanes._lane_intake"],
    ["_lanes._trunk"],
    ["_lanes._mux"],
    [
        "_pools._variables",
        "_pools._schedule",
        "_pools._logs",
        "_pools._resident",
        "_pools._lifeline",
        "_pools._stats",
        "_pools._ring",
        "_pools._future",
        "_pools._ticket",
    ],
    ["_pools._feed", "_pools._progress", "_pools._engine_url"],
    ["_pools._call"],
    ["_pools._chunk"],
    ["_pools._task", "_pools._worker", "_pools._map"],
    ["_pools._outcome", "_pools._member", "_pools._commons"],
    ["_pools._crew"],
    ["_pools._looking"],
    ["_pools._hearing"],
    ["_pools._engine"],
    ["_pools._executor"],
    ["_bench", "_pools._foreign"],
    ["_pools._workforce"],
    ["_pools._async_result"],
    ["_pools._imap"],
    ["_pools._pool"],
    ["__main__"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
#: What decides and never acts: no sockets, no descriptors, no threads, no clock.
PURE = ["_lanes._lane_frame", "_transport._frame", "_reach", "_pools._schedule", "errors"]
ACTING = {"os", "socket", "select", "threading", "time", "fcntl", "mmap"}


def _modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = ast.parse(path.read_text())
    return found


def _imports(name: str, tree: ast.Module) -> set[str]:
    """The modules of this package that ``name`` imports when it is run, not for its types alone."""
    found: set[str] = set()
    package = name.split(".")[:-1]
    for node in ast.walk(_without_type_checking(tree)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module:
                found.add(".".join([*base, node.module]))
            else:
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return {one for one in found if one in LEVEL}


def _without_type_checking(tree: ast.Module) -> ast.Module:
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    ]
    return ast.Module(kept, [])


def test_every_module_has_its_place() -> None:
    assert set(_modules()) == set(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in _modules().items()
        for other in _imports(name, tree)
        if LEVEL[other] >= LEVEL[name]
    ]
    assert not wrong


def test_codec_and_transport_never_meet() -> None:
    modules = _modules()
    assert not any(one.startswith("_transport") for one in _imports("_codec", modules["_codec"]))
    for name in LEVEL:
        if name.startswith("_transport"):
            assert "_codec" not in _imports(name, modules[name])


def test_pure_modules_do_not_act() -> None:
    modules = _modules()
    for name in PURE:
        imported = {
            alias.name for node in ast.walk(modules[name]) if isinstance(node, ast.Import) for alias in node.names
        }
        assert not imported & ACTING, name
