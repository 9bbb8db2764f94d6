"""One console style: messages on standard error, a progress bar on a terminal, the same facts as lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from megatron_retro.errors import MegatronRetroError, Requeue

_LINE_SECONDS = 10.0
_BAR_SECONDS = 0.1
_BAR_WIDTH = 24


# What a terminal would obey, and what turns the direction of text, by how it is shown.
_CONTROLS = {
    **{code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"},
    **{code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}


def shown(text: str) -> str:
    """Text of a corpus, a file or a model as a terminal may print it: what would be obeyed is written out."""
    return text.translate(_CONTROLS)


def say(message: str) -> None:
    """Tell the person who started the program."""
    print(shown(message), file=sys.stderr, flush=True)


def show_error(error: MegatronRetroError) -> None:
    """Show a named error, once: whoever first knows that the program ends with it does."""
    if not vars(error).get("shown"):
        vars(error)["shown"] = True
        say(str(error) if isinstance(error, Requeue) else f"error: {error}")


def alarm(message: str) -> None:
    """Tell something that must not be overlooked."""
    rule = "!" * 78
    say(f"{rule}\nWARNING: {message}\n{rule}")


def warn(message: str) -> None:
    """An alarm that all ranks of a job would give alike: the first rank gives it for all."""
    distributed = sys.modules.get("torch.distributed")  # who has not imported it is in no group
    if distributed is None or not distributed.is_initialized() or distributed.get_rank() == 0:
        alarm(message)


def readable_count(value: float) -> str:
    """`1234567` -> `1.23M`."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def readable_bytes(value: float) -> str:
    """`1234567` -> `1.2 MB`."""
    for limit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= limit:
            return f"{value / limit:.1f} {suffix}"
    return f"{value:.0f} B"


def readable_seconds(value: float) -> str:
    """`3725` -> `1h02m`."""
    seconds = round(value)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    if seconds >= 60:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{value:.1f}s" if value < 10 else f"{seconds}s"


Advance = Callable[[float], None]


def unseen(amount: float) -> None:
    """What is done while nobody is shown it."""


class Progress:
    """What is done of how much, at which rate, for how much longer."""

    def __init__(
        self, what: str, total: float | None, unit: str, stream: TextIO | None = None, *, done: float = 0.0
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._before = done
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = self._last = time.monotonic()

    def advance(self, amount: float, note: str = "") -> None:
        """Add to what is done, and show it when it is time to."""
        self.done += amount
        now = time.monotonic()
        if now - self._last >= (_BAR_SECONDS if self._terminal else _LINE_SECONDS):
            self._last = now
            self._show(note, end="")

    def close(self, note: str = "") -> None:
        self._show(note, end="\n")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def facts(self) -> str:
        """Amount, rate and remaining time as text."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._before) / elapsed
        of_total = f"/{readable_count(self.total)}" if self.total else ""
        text = f"{readable_count(self.done)}{of_total} {self.unit}  {readable_count(rate)}/s"
        if self.total and rate and self.done < self.total:
            return f"{text}  {readable_seconds((self.total - self.done) / rate)} left"
        return f"{text}  {readable_seconds(elapsed)}"

    def _show(self, note: str, end: str) -> None:
        text = f"{self.what}: {self.facts()}" + (f"  {note}" if note else "")
        if not self._terminal:
            print(text, file=self._stream, flush=True)
            return
        filled = round(_BAR_WIDTH * min(self.done / self.total, 1.0)) if self.total else 0
        bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
        print(f"\r\x1b[K[{bar}] {text}", file=self._stream, end=end, flush=True)


def render_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain text table; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *cells]) for column in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[column], (int, float)) for row in rows) for column in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, numeric, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in pairs).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])
