"""Plots as SVG, from the JSON of a run: bars beside the peers, and lines over the size of a message.

Written out by hand, so that nothing needs to be installed; in colours that stand out on light and dark pages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

_INK, _FAINT, _PAPER = "#1f2933", "#cbd2d9", "#ffffff"
_OURS, _STDLIB, _PEER, _FLOOR = "#0b6e99", "#9aa5b1", "#e0a458", "#616e7c"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_STDLIB_NAMES = ("mp.", "multiprocessing", "stdlib")
_FLOOR_NAMES = ("C loop", "memcpy")
_OUR_NAMES = ("channel", "ctx.", "ProcessPoolExecutor", "bytes_channel", "ReceiverSet", "mp_ipcchan")

#: The panels of the first plot: case, title, systems in order.
_PANELS = (
    (
        "one-way",
        "Small tuple, one way",
        ("channel (many)", "channel", "ctx.Pipe", "ctx.Queue", "mp.Pipe", "mp.Queue", "faster-fifo", "pyzmq PUSH/PULL"),
    ),
    (
        "round-trip",
        "Small tuple, there and back",
        ("channel", "ctx.Pipe", "ctx.Queue", "mp.Pipe", "mp.Queue", "faster-fifo", "pyzmq PAIR", "C loop"),
    ),
    (
        "array-1MiB",
        "Array of 1 MiB",
        ("ctx.Queue", "channel", "mp.Pipe", "mp.Queue", "faster-fifo", "pyzmq PUSH/PULL", "torch.Queue", "memcpy"),
    ),
    (
        "array-64MiB",
        "Array of 64 MiB",
        ("ctx.Queue", "channel", "mp.Pipe", "mp.Queue", "faster-fifo", "pyzmq PUSH/PULL", "torch.Queue", "memcpy"),
    ),
    (
        "submit",
        "Executor, tiny tasks: submit",
        ("ProcessPoolExecutor", "stdlib executor", "loky"),
    ),
    (
        "apply_async",
        "Pool, tiny tasks: apply_async",
        ("ctx.Pool", "mp.Pool", "billiard.Pool"),
    ),
)

_WIDTH, _MARGIN, _LABEL = 440, 18, 144
_BAR, _GAP = 15, 5


@dataclass
class _Drawing:
    """The text of an SVG file, as it grows."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>')

    def line(self, points: Sequence[tuple[float, float]], stroke: str, width: float = 1.0, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}"{dashes}/>')

    def circle(self, x: float, y: float, radius: float, fill: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"/>')

    def text(
        self, x: float, y: float, text: str, size: int = 11, anchor: str = "start", bold: bool = False, fill: str = _INK
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>'
            f"{escape(text)}</text>"
        )

    def __str__(self) -> str:
        size = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" width="{self.width:.0f}" height="{self.height:.0f}"'
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FONT}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f'<rect width="100%" height="100%" rx="6" fill="{_PAPER}"/>',
                *self.parts,
                "</svg>\n",
            )
        )


def draw(document: dict[str, Any]) -> dict[str, str]:
    """The plots that the run has figures for, by the names of their files."""
    results = {result["shape"]: result for result in document["results"]}
    where = _environment(document["environment"])
    drawings = {"benchmarks.svg": _bars(results, where), "benchmark-sizes.svg": _sizes(results, where)}
    return {name: str(drawing) for name, drawing in drawings.items() if drawing is not None}


def _environment(environment: dict[str, Any]) -> str:
    return f"{environment['python']}, {environment['system']}, {environment['cpus']} processors"


def _colour(system: str) -> str:
    if system.startswith(_STDLIB_NAMES):
        return _STDLIB
    if system in _FLOOR_NAMES:
        return _FLOOR
    return _OURS if system.startswith(_OUR_NAMES) else _PEER


def _medians(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {system["system"]: system for system in result["systems"] if system["status"] == "ok"}


# -- bars --------------------------------------------------------------------------------------


def _bars(results: dict[str, Any], where: str) -> _Drawing | None:
    panels = [(results[name], title, systems) for name, title, systems in _PANELS if name in results]
    if not panels:
        return None
    # Two side by side; both as high as the one with more bars.
    rows = [panels[first : first + 2] for first in range(0, len(panels), 2)]
    heights = [
        48 + (_BAR + _GAP) * max(len(set(systems) & set(_medians(one))) for one, _, systems in row) for row in rows
    ]
    drawing = _Drawing(2 * _WIDTH, 62 + sum(heights), "mp_ipcchan beside its peers")
    drawing.text(_MARGIN, 26, "mp_ipcchan beside its peers, in one run", 15, bold=True)
    drawing.text(_MARGIN, 43, f"medians, with the slowest and fastest round; {where}", 11)
    _legend(drawing, 2 * _WIDTH - 330, 26)
    top = 62
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            _panel(drawing, _WIDTH * column, top, *panel)
        top += height
    return drawing


def _legend(drawing: _Drawing, x: float, y: float) -> None:
    for name, colour, step in (
        ("ours", _OURS, 62),
        ("standard library", _STDLIB, 122),
        ("others", _PEER, 66),
        ("floor", _FLOOR, 0),
    ):
        drawing.rect(x, y - 9, 10, 10, colour)
        drawing.text(x + 14, y, name)
        x += step


def _panel(
    drawing: _Drawing, left: float, top: float, result: dict[str, Any], title: str, systems: Sequence[str]
) -> None:
    found = _medians(result)
    shown = [found[name] for name in systems if name in found]
    better = "lower" if result["lower_is_better"] else "higher"
    drawing.text(left + _MARGIN, top + 16, title, 12, bold=True)
    drawing.text(left + _WIDTH - _MARGIN, top + 16, f"{result['unit']}, {better} is better", 10, "end")
    if not shown:
        return
    room = _WIDTH - _LABEL - 2 * _MARGIN - 52
    # The widest stroke, too, ends inside.
    scale = room / max(max(system["median"], min(system["max"], 1.4 * system["median"])) for system in shown)
    y = top + 28
    for system in shown:
        x = left + _MARGIN + _LABEL
        drawing.text(x - 6, y + 11, system["system"], 11, "end", bold=_colour(system["system"]) == _OURS)
        drawing.rect(x, y, max(1.0, system["median"] * scale), _BAR, _colour(system["system"]))
        low, high = system["min"] * scale, min(system["max"], 1.4 * system["median"]) * scale
        drawing.line([(x + low, y + _BAR / 2), (x + high, y + _BAR / 2)], _INK)
        drawing.text(x + max(high, system["median"] * scale) + 5, y + 11.5, _short(system["median"]), 11)
        y += _BAR + _GAP


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.0f} k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# -- lines -------------------------------------------------------------------------------------

_LINES = ("channel", "ctx.Queue", "ctx.Pipe", "mp.Queue", "mp.Pipe", "faster-fifo", "pyzmq PUSH/PULL", "memcpy")
_STROKES = {
    "channel": ("#0b6e99", ""),
    "ctx.Queue": ("#0b6e99", "7 3"),
    "ctx.Pipe": ("#0b6e99", "2 3"),
    "mp.Queue": ("#7b8794", "7 3"),
    "mp.Pipe": ("#7b8794", "2 3"),
    "faster-fifo": ("#b5651d", "7 3"),
    "pyzmq PUSH/PULL": ("#e0a458", ""),
    "memcpy": ("#1f2933", "1 4"),
}
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}


def _size(name: str) -> int:
    text = name.removeprefix("bytes-")
    unit = text.lstrip("0123456789")
    return int(text.removesuffix(unit)) * _UNITS[unit]


def _sizes(results: dict[str, Any], where: str) -> _Drawing | None:
    """Bytes a second over the size of a message, both logarithmic."""
    curves = dict(_curves(results))
    points = [point for curve in curves.values() for point in curve]
    if len({size for size, _ in points}) < 2:
        return None
    drawing = _Drawing(2 * _WIDTH, 400, "Bytes a second over the size of a message")
    drawing.text(_MARGIN, 26, "bytes from process to process: MiB a second over the size of a message", 15, bold=True)
    drawing.text(_MARGIN, 43, f"medians; both axes are logarithmic; {where}", 11)
    left, right, top, bottom = 70.0, 2 * _WIDTH - 150.0, 62.0, 362.0
    sizes = sorted({size for size, _ in points})
    low, high = math.floor(math.log10(min(y for _, y in points))), math.ceil(math.log10(max(y for _, y in points)))

    def place(size: float, rate: float) -> tuple[float, float]:
        x = left + (right - left) * math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])
        return x, bottom - (bottom - top) * (math.log10(rate) - low) / (high - low)

    for power in range(low, high + 1):
        _, y = place(sizes[0], 10.0**power)
        drawing.line([(left, y), (right, y)], _FAINT)
        drawing.text(left - 8, y + 4, f"{10.0**power:,g}", 11, "end")
    for size in sizes:
        x, _ = place(size, 10.0**low)
        drawing.line([(x, bottom), (x, bottom + 4)], _INK)
        unit = max((name for name, factor in _UNITS.items() if size >= factor), key=_UNITS.__getitem__)
        drawing.text(x, bottom + 18, f"{size // _UNITS[unit]} {unit}", 11, "middle")
    labels: list[float] = []
    for name, curve in sorted(curves.items(), key=lambda item: -item[1][-1][1]):
        colour, dash = _STROKES[name]
        placed = [place(size, rate) for size, rate in curve]
        drawing.line(placed, colour, 2.0, dash)
        for x, y in placed:
            drawing.circle(x, y, 2.5, colour)
        # Labels don't cover each other: each is below the one before.
        label = max([placed[-1][1] + 4, *(label + 14 for label in labels)])
        labels.append(label)
        drawing.line([(right + 4, placed[-1][1]), (right + 14, label - 4)], colour)
        drawing.line([(right + 14, label - 4), (right + 38, label - 4)], colour, 2.0, dash)
        drawing.text(right + 42, label, name, 11, bold=_colour(name) == _OURS)
    return drawing


def _curves(results: dict[str, Any]) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    for name in _LINES:
        curve = []
        for shape, result in results.items():
            system = _medians(result).get(name) if shape.startswith("bytes-") else None
            if system is not None:
                curve.append((_size(shape), _rate(result["unit"], _size(shape), system["figures"])))
        if curve:
            yield name, sorted(curve)


def _rate(unit: str, size: int, figures: Sequence[float]) -> float:
    """MiB a second."""
    median = statistics.median(figures)
    return median * 1024 if unit == "GiB/s" else median * 1e3 * size / (1 << 20)
