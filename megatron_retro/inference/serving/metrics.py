"""Counters and histograms in Prometheus' text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter

SECONDS = (0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """All numbers of one service. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._gauges: dict[str, float] = {}
        self._histograms: dict[str, tuple[list[int], list[float]]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._counters[_labelled(name, labels)] += amount  # type: ignore[assignment]

    def set(self, name: str, value: float) -> None:
        with self._lock:
            self._gauges[name] = value

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        with self._lock:
            buckets, total = self._histograms.setdefault(name, ([0] * (len(SECONDS) + 1), [0.0]))
            buckets[bisect_left(SECONDS, seconds)] += 1
            total[0] += seconds

    def render(self) -> str:
        """The text that Prometheus reads."""
        with self._lock:
            lines: list[str] = []
            for name in sorted({key.split("{")[0] for key in self._counters}):
                lines.append(f"# TYPE {name} counter")
                mine = [key for key in self._counters if key.split("{")[0] == name]
                lines += [f"{key} {self._counters[key]}" for key in sorted(mine)]
            for name, value in sorted(self._gauges.items()):
                lines += [f"# TYPE {name} gauge", f"{name} {value}"]
            for name, (buckets, total) in sorted(self._histograms.items()):
                lines += _histogram(name, buckets, total[0])
            return "\n".join(lines) + "\n"


def _labelled(name: str, labels: dict[str, str]) -> str:
    if not labels:
        return name
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inside}}}"


def _histogram(name: str, buckets: list[int], total: float) -> list[str]:
    lines, seen = [f"# TYPE {name} histogram"], 0
    for bound, amount in zip((*map(str, SECONDS), "+Inf"), buckets, strict=True):
        seen += amount
        lines.append(f'{name}_bucket{{le="{bound}"}} {seen}')
    return [*lines, f"{name}_sum {total:.6f}", f"{name}_count {seen}"]
